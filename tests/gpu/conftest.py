"""A GPU to run engines on: a real one (marked `gpu`, skipped where there is none), and the fake one
of tests, on which the same tests run everywhere."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import make_model
from fake_cuda import FakeCuda, on_device
from fake_graphs import FakeGraphs
from graph_kernels import GraphKernels
from windlass.build import open as build
from windlass.build.devices import Gpu
from windlass.device.cuda import Usage
from windlass.engine.engine import Engine
from windlass.ids import DEVICE
from windlass.kernels.cuda_graphs import GraphCaptures
from windlass.kernels.interface import Kernels
from windlass.kernels.reference import TorchKernels
from windlass.options import CPU, EngineOptions
from windlass.units import GIB

Open = Callable[..., AbstractContextManager[Engine]]
TAKEN = 300 << 20  # of the fake's memory, by its context


class OnGpu:
    """Opens engines on it, by options alone."""

    def keep_graphs(self) -> None:
        """From now on, as a real one does; results are no longer those of a CPU to the bit."""

    is_exact = False  # whether what it computes is what a CPU does, to the bit

    def open(
        self, path: Path, *, source: Any = None, profile: Any = None, **options: Any
    ) -> AbstractContextManager[Engine]:
        return build.open_engine(_options(path, **options), source=source, profile=profile)


class OnFakeGpu(OnGpu):
    is_exact = True

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limits: list[int] = []
        self._monkeypatch = monkeypatch
        self._seed = 0
        self.device = FakeCuda(name=DEVICE)
        self._keeps_graphs = False

    def keep_graphs(self) -> None:
        self._keeps_graphs, self.is_exact = True, False

    @contextmanager
    def open(
        self, path: Path, *, source: Any = None, profile: Any = None, **options: Any
    ) -> Iterator[Engine]:
        self._seed += 1
        device = self.device = FakeCuda(name=DEVICE, seed=self._seed)
        self._monkeypatch.setattr(build, "open_gpu", self._open_gpu)
        self._monkeypatch.setattr(build, "uses_gpu", lambda options: options.device == "auto")
        opened = super().open
        with device.watched(), opened(path, source=source, profile=profile, **options) as engine:
            engine._weights._queue.changed.wait = device.wait  # type: ignore[method-assign]
            yield engine
        assert not device.memory.races

    def _open_gpu(self, options: EngineOptions, tracer: object) -> Gpu | None:
        if options.device == CPU:
            return None
        device = self.device

        def make() -> Kernels:
            if not self._keeps_graphs:
                return TorchKernels()
            graphs = FakeGraphs(device.in_kernel)
            captures = GraphCaptures(device, graphs)
            return GraphKernels(captures, graphs.launch, device.unseen)

        return Gpu(
            device,
            "a fake GPU",
            lambda: on_device(device, make),
            lambda readers: device.below,
            lambda: Usage(4 * GIB, TAKEN, 0),
            self.limits.append,
            self._peak,
        )

    def _peak(self) -> int:
        memory = self.device.memory
        return TAKEN + max(memory.peak_bytes, memory.num_bytes)


def _options(path: Path, **options: Any) -> EngineOptions:
    return EngineOptions(
        model=str(path),
        **{
            "device": "cuda", "generation_config": "vllm", "host_memory": 16 * GIB,
            "max_model_len": 64, "max_num_seqs": 3, "max_num_batched_tokens": 100, **options,
        },
    )  # fmt: skip


_REAL = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)


@pytest.fixture(params=["fake", _REAL])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> OnGpu:
    return OnFakeGpu(monkeypatch) if request.param == "fake" else OnGpu()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random checkpoint of a family, in bf16."""
    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            path = made[family] = tmp_path_factory.mktemp(family)
            make_model(family, path, dtype=torch.bfloat16)
        return made[family]

    return find

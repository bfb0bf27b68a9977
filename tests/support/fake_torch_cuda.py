"""What `device/cuda.py` asks of torch.cuda, on a machine without a GPU: it notes the calls and
counts what is registered. The device is to be one that torch has here, the CPU or meta, whose
streams compute at once."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from windlass.device import cuda as module

_REAL_EMPTY = torch.empty


class Error(RuntimeError):
    """As torch raises for an error of CUDA."""


@dataclass
class FakeTorchCuda:
    """One GPU with `total` bytes, `free` of them; registering refuses beyond `lockable` bytes."""

    total: int = 8 << 30
    free: int = 7 << 30
    lockable: int = 1 << 62
    pins: bool = True
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    registered: dict[int, int] = field(default_factory=dict)
    fraction: float = 1.0
    pending: str = ""  # an error that the next launch tells of
    failing: str = ""  # what waiting for an event raises

    def __post_init__(self) -> None:
        self._current = threading.local()
        self.default = FakeTorchStream(self, "default")

    # --- as in torch.cuda -------------------------------------------------------------------------

    def current_stream(self, device: Any = None) -> "FakeTorchStream":
        return getattr(self._current, "stream", self.default)

    @contextmanager
    def stream(self, stream: "FakeTorchStream") -> Iterator[None]:
        before = self.current_stream()
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def cudart(self) -> Any:
        return SimpleNamespace(
            cudaError=SimpleNamespace(success=0),
            cudaHostRegister=self._register,
            cudaHostUnregister=self._unregister,
            cudaGetErrorString=lambda error: f"error {error}",
        )

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return self.free, self.total

    def memory_reserved(self, device: Any) -> int:
        return 5 << 20

    def max_memory_reserved(self, device: Any) -> int:
        return 6 << 20

    def set_per_process_memory_fraction(self, fraction: float, device: Any) -> None:
        assert isinstance(fraction, float) and 0 <= fraction <= 1
        self.fraction = fraction

    def get_device_capability(self, device: Any) -> tuple[int, int]:
        return 8, 6

    def get_device_name(self, device: Any) -> str:
        return "Fake GPU"

    def synchronize(self, device: Any) -> None:
        self.calls.append(("synchronize",))

    def empty_cache(self) -> None:
        self.calls.append(("empty_cache",))

    def graph_pool_handle(self) -> tuple[int, int]:
        return 0, 7

    def reset_peak_memory_stats(self, device: Any) -> None:
        pass

    # --- what it does -----------------------------------------------------------------------------

    def _register(self, address: int, size: int, flags: int) -> int:
        assert flags == 1 and size > 0 and address % 4096 == 0
        if sum(self.registered.values()) + size > self.lockable:
            self.pending = "error 2"
            return 2
        self.registered[address] = size
        return 0

    def _unregister(self, address: int) -> int:
        del self.registered[address]
        return 0

    def empty(self, *shape: Any, **options: Any) -> torch.Tensor:
        """In place of torch.empty."""
        if options.pop("pin_memory", False) and not self.pins:
            self.pending = "error 3"
            raise Error("CUDA error: no pinning\nmore")
        if options.get("device") is not None:
            if options["device"] == "cuda":
                del options["device"]
            if self.pending:
                error, self.pending = self.pending, ""
                raise Error(f"CUDA error: {error}")
            self.calls.append(("empty", self.current_stream().name))
        return _REAL_EMPTY(*shape, **options)


class FakeTorchStream:
    def __init__(self, cuda: FakeTorchCuda, name: str) -> None:
        self.cuda = cuda
        self.name = name

    def wait_event(self, event: "FakeTorchEvent") -> None:
        self.cuda.calls.append(("wait", self.name, event.stream))


class FakeTorchGraph:
    def __init__(self, cuda: FakeTorchCuda) -> None:
        self.cuda = cuda

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        stream = self.cuda.current_stream().name
        assert stream != "default", "CUDA captures no default stream"
        self.cuda.calls.append(("capture", stream, pool, capture_error_mode))

    def capture_end(self) -> None:
        self.cuda.calls.append(("captured",))
        if self.cuda.failing:
            raise Error(self.cuda.failing)

    def replay(self) -> None:
        self.cuda.calls.append(("replay", self.cuda.current_stream().name))


class FakeTorchEvent:
    cuda: FakeTorchCuda

    def __init__(self, blocking: bool = False) -> None:
        self.blocking = blocking
        self.stream = ""

    def record(self, stream: FakeTorchStream) -> None:
        self.stream = stream.name
        self.cuda.calls.append(("record", stream.name, self.blocking))

    def synchronize(self) -> None:
        assert self.stream, "an event that nobody recorded"
        if self.cuda.failing:
            raise Error(self.cuda.failing)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeTorchCuda:
    """`device/cuda.py` with a fake torch.cuda."""
    cuda = FakeTorchCuda()
    names = cycle(("compute", "down", "up", "back"))

    class Event(FakeTorchEvent):
        pass

    Event.cuda = cuda
    attributes: dict[str, Callable[..., Any] | Any] = {
        name: getattr(cuda, name)
        for name in (
            "current_stream", "stream", "device", "cudart", "mem_get_info", "memory_reserved",
            "max_memory_reserved", "set_per_process_memory_fraction", "get_device_name",
            "get_device_capability",
            "synchronize", "empty_cache", "reset_peak_memory_stats", "graph_pool_handle",
        )
    }  # fmt: skip
    own = SimpleNamespace(
        **attributes,
        is_available=lambda: True,
        device_count=lambda: 1,
        Event=Event,
        CUDAGraph=lambda: FakeTorchGraph(cuda),
        Stream=lambda device: FakeTorchStream(cuda, next(names)),
    )
    for name, value in vars(own).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", cuda.empty)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **o: cuda.empty(*shape, **o).zero_())
    monkeypatch.setattr(module, "STEP_BYTES", 8192)
    return cuda

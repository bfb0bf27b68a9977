"""Few rows as graphs of the kernels of a CUDA device, which the interpreter replays: the same bits
as kernel by kernel."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from engines import make_model
from fake_graphs import FakeGraphs
from graph_engines import answers, graph_engine, plan_of, watch_replays
from windlass.ids import WeightKey
from windlass.kernels import cuda_graphs
from windlass.kernels.cuda import CudaKernels
from windlass.kernels.cuda_graphs import GraphCaptures


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes those whose launches a fake graph notes."""
    old = interpreter.GridExecutor.__call__
    known: list[FakeGraphs] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        launch = partial(old, self)
        return known[-1].launch(launch, *args, **kwargs) if known else launch(*args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)

    def make(captures: GraphCaptures, graphs: FakeGraphs) -> CudaKernels:
        known.append(graphs)
        return CudaKernels(80, captures=captures)

    return make


def test_the_same_bits_as_without(
    kernels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "_LEAST_POSITIONS", 16)
    monkeypatch.setattr(cuda_graphs, "_LEAST_PAGES", 1)
    replayed = watch_replays(monkeypatch)
    make_model("gpt_oss", tmp_path, dtype=torch.bfloat16)
    open_engine = partial(graph_engine, tmp_path, kernels, plan=plan_of(tmp_path))
    job = partial(answers, lengths=(4, 2), steps=(3, 4))
    with open_engine(enforce_eager=True) as (engine, _):
        want = job(engine)
    assert not replayed
    with open_engine() as (engine, graphs):
        assert job(engine) == want
    assert len(replayed) == graphs.num_replayed > graphs.num_captured > 0
    replayed.clear()
    with open_engine(slots=4) as (engine, _):
        assert job(engine) == want
    assert any(isinstance(key, WeightKey) for key in replayed)
    assert {key[0] for key in replayed if type(key) is tuple} == {"experts", "combine"}

"""Few rows as graphs that a device keeps: whole engines give the same bits as without, whatever
changes from pass to pass."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from engines import make_model
from fake_graphs import FakeGraphs, GraphError
from graph_engines import answers, graph_engine, plan_of, watch_replays
from graph_kernels import GraphKernels
from windlass.device.host_memory import HostAllocator
from windlass.errors import WindlassError
from windlass.ids import Part, WeightKey
from windlass.kernels import cuda_graphs
from windlass.kernels.cuda_graphs import GraphCaptures, SlotTable
from windlass.kernels.interface import AttentionWork
from windlass.tensors import Tensors


def _kernels(captures: GraphCaptures, graphs: FakeGraphs) -> GraphKernels:
    return GraphKernels(captures, graphs.launch)


# attention with biases and sinks; latent, with a dense layer and a shared expert; recurrent layers
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen3_next"])
def test_the_same_bits_as_without(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "_LEAST_POSITIONS", 16)  # tables grow on the way
    monkeypatch.setattr(cuda_graphs, "_LEAST_PAGES", 1)
    replayed = watch_replays(monkeypatch)
    make_model(family, tmp_path, dtype=torch.bfloat16)
    open_engine = partial(graph_engine, tmp_path, _kernels, plan=plan_of(tmp_path))
    with open_engine(enforce_eager=True) as (engine, graphs):
        want, hits = answers(engine), engine.stats().expert_requests
    assert not replayed and not graphs.num_captured
    with open_engine() as (engine, graphs):
        assert answers(engine) == want and engine.stats().expert_requests == hits
    assert len(replayed) == graphs.num_replayed > graphs.num_captured
    assert all(isinstance(key, int) for key in replayed)
    replayed.clear()
    with open_engine(slots=4, most=1) as (engine, graphs):
        assert answers(engine) == want and engine.stats().expert_requests == hits
    blocks = {key for key in replayed if isinstance(key, WeightKey)}
    assert {key.part for key in blocks} == {Part.BLOCK}
    assert {key[0] for key in replayed if type(key) is tuple} == {"experts", "combine"}


# --- the capture ----------------------------------------------------------------------------------


def _work(*lengths: int, is_prompt: bool = False) -> AttentionWork:
    rows = range(len(lengths))
    pages = tuple((row,) * (length // 16 + 1) for row, length in enumerate(lengths))
    ones, kinds = (1,) * len(lengths), (is_prompt,) * len(lengths)
    return AttentionWork(tuple(rows), ones, lengths, pages, kinds)


class _Device:
    def __init__(self, most: int = 8) -> None:
        self.graphs = FakeGraphs()
        self.captures = GraphCaptures(HostAllocator(), self.graphs, most=most)


def test_a_piece_is_computed_then_captured_then_replayed() -> None:
    device = _Device()
    capture, x, calls = device.captures.new(), torch.ones(2), []

    def body() -> torch.Tensor:
        calls.append(0)
        x.add_(1)
        assert device.captures.rows is not None
        return x + device.captures.rows.tiles_5T[3] + device.captures.tensor([5, 5])

    got = []
    for length in range(4):
        capture.begin(_work(length, 3))
        found = capture.run("piece", body)
        assert found is not None
        got.append(found.tolist())
    assert got == [[7 + 2 * n, 10 + n] for n in range(4)]
    assert len(calls) == 2 and (device.graphs.num_captured, capture.num_replayed) == (1, 3)
    assert device.captures.rows is None and capture.seconds() == {}
    capture.begin(_work(5000, 3))  # more than there is room for: from the beginning
    assert capture.run("piece", body) is not None and len(calls) == 3


def test_prompts_are_not_captured() -> None:
    capture = _Device().captures.new()
    capture.begin(_work(3, is_prompt=True))
    assert capture.run("piece", lambda: pytest.fail("computed")) is None


def test_the_graphs_that_were_not_used_for_longest_are_given_up() -> None:
    device = _Device(most=2)
    captures = [device.captures.new() for _ in range(3)]
    for which, num in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        for _ in range(2):
            captures[which].begin(_work(0))
            captures[which].run("piece", lambda: torch.ones(1))
        assert device.graphs.num_captured == num


def test_experts_that_are_held_are_those_of_the_table() -> None:
    capture = _Device().captures.new()
    held = capture.experts(4)
    assert isinstance(held, SlotTable)
    capture.begin(_work(0))
    results = []
    for slots in ({0: 7}, {1: 3, 2: 5}, {3: 1}, {2: (6, "otherwise")}):
        held.hold({e: {"slot": slot} for e, slot in slots.items()})  # type: ignore[dict-item]

        def body() -> torch.Tensor | str:
            return "alone" if held.found(_Found.of) is None else held.slots_E + 0

        found = capture.run("experts", body)
        results.append(found.tolist() if isinstance(found, torch.Tensor) else found)
    assert results == [[7, -1, -1, -1], [-1, 3, 5, -1], [-1, -1, -1, 1], None]
    assert sorted(held) == [2] and len(held) == 1 and capture.num_replayed == 2


class _Found(NamedTuple):
    slot: int
    layout: str

    @classmethod
    def of(cls, w: Tensors) -> "_Found":
        slot: Any = w["slot"]
        return cls(*slot) if isinstance(slot, tuple) else cls(slot, "alike")


KEPT: dict[str, torch.Tensor] = {}


def _keeps_what_it_made(x: torch.Tensor) -> torch.Tensor:
    return KEPT.setdefault("x", x * 2) + 1


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (lambda x: x if x.sum().item() else x + 1, "waits|looks"),
        (lambda x: x[x.nonzero()[:, 0]], "waits"),
        (lambda x: x + torch.tensor([1.0, 2.0]), "numbers of the host"),
        (lambda x: x + x.tolist()[0], "looks"),
    ],
)
def test_what_no_graph_can_hold_is_found(body: Any, error: str) -> None:
    capture, x = _Device().captures.new(), torch.ones(2)
    capture.begin(_work(0, 0))
    assert capture.run("piece", lambda: body(x)) is not None
    with pytest.raises(GraphError, match=error):
        capture.run("piece", lambda: body(x))


def test_memory_that_is_gone_or_of_the_pool_is_found() -> None:
    device = _Device()
    capture, here = device.captures.new(), [torch.ones(2)]
    capture.begin(_work(0, 0))
    for _ in range(2):
        capture.run("piece", lambda: here[0] + 1)
    here[0] = torch.ones(2)  # the first is freed
    with pytest.raises(GraphError, match="memory that is gone"):
        capture.run("piece", lambda: here[0] + 1)
    KEPT.clear()
    _, result = device.graphs.capture(lambda: _keeps_what_it_made(here[0]))
    assert result.isnan().all() and KEPT["x"].isnan().all()


def test_other_numbers_than_the_first_time_and_a_refusal_of_the_device_are_errors() -> None:
    device = _Device()
    capture, numbers = device.captures.new(), iter(([1], [2]))
    capture.begin(_work(0))
    capture.run("piece", lambda: device.captures.tensor(next(numbers)))
    with pytest.raises(AssertionError, match="other numbers"):
        capture.run("piece", lambda: device.captures.tensor(next(numbers)))

    def refused() -> None:
        if device.captures._num_constants is not None:
            raise RuntimeError("operation not permitted\nmore")

    capture.run("other", refused)
    with pytest.raises(WindlassError, match=r"\(operation not permitted\): --enforce-eager"):
        capture.run("other", refused)

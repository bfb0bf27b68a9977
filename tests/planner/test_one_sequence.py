"""How much memory for how many tokens/s: more is never slower, and a trace of another model says
nothing."""

from dataclasses import replace

import pytest

from machines import machine
from planning import SPECS, round_sizes
from traces import topical_ids, trace_of
from windlass.cli import main
from windlass.errors import UsageError
from windlass.forecast.interface import ExpertTable
from windlass.ids import Part
from windlass.perf.sizes import Problem
from windlass.planner import one_sequence as module
from windlass.planner.one_sequence import one_sequence

WHOLE = SPECS["olmoe-1b-7b"]
SPEC = replace(WHOLE, blocks=WHOLE.blocks[:2])
TABLE = ExpertTable.of(SPEC)


def trace(num_experts, sequences=None):
    ids = topical_ids(2, 24, 2, num_experts, TABLE.top_k)
    return trace_of(ids, num_experts, sequences=sequences, num_prompt=2)


def test_more_memory_is_faster_and_each_size_says_what_it_takes(monkeypatch):
    monkeypatch.setattr(module, "_SHARES", (0.05, 0.2, 0.5, 1.0))
    monkeypatch.setattr(module, "_MOST_LAYERS", 2)
    monkeypatch.setattr(module, "_FEWEST_PASSES", 18)
    problem = Problem(SPEC, round_sizes(SPEC), machine())
    told: list[str] = []
    # two at once were recorded, one after the other is replayed
    two = trace(TABLE.num_experts[0], sequences=[0, 1] * 12)
    found = one_sequence(two, problem, told.append, read_threads=4, forecast="learned")
    assert len(told) == 3 and found.passes == 18
    assert [one.resident for one in found.sizes] == [0.2, 0.5, 1.0], "6 of 128 do not hold a token"
    speeds = [one.tokens_per_s for one in found.sizes]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]
    assert [one.hits for one in found.sizes] == sorted(one.hits for one in found.sizes)
    size = problem.sizes.slot_bytes[Part.EXPERT]
    assert [one.expert_bytes // size for one in found.sizes] == [26, 64, 128]
    assert found.to_json()["sizes"][0]["tokens_per_s"] == speeds[0]
    lines = found.lines()
    assert "18 recorded passes (forecast: usage)" in lines[0] and len(lines) == 4
    assert "for 20 % of the experts: " in lines[1]


def test_a_trace_of_another_model_is_refused():
    problem = Problem(SPEC, round_sizes(SPEC), machine())
    with pytest.raises(UsageError, match="for a trace of tiny: 128 experts in 2 layers, top 8"):
        one_sequence(trace(32), problem, lambda text: None, read_threads=4, forecast="learned")


def test_the_command_refuses_a_file_that_is_no_trace(tmp_path, capsys):
    path = tmp_path / "t"
    path.write_text("hello\n")
    assert main(["plan", "--machine", "laptop", "--replay", str(path)]) == 2
    assert "not a routing trace" in capsys.readouterr().err

"""Estimates of jobs: they add up, keep above the bounds, follow rates and memory, and agree with
what they leave out (layers, passes and sequences that others stand for)."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amounts import some
from planning import SPECS, few_layers, machine, sizes_of
from windlass.errors import UsageError
from windlass.ids import Part
from windlass.perf import estimate as module
from windlass.perf import simulation as timing
from windlass.perf.estimate import estimate
from windlass.perf.job_passes import PassRun
from windlass.perf.op_cost import Seen
from windlass.perf.sample import sample_layers
from windlass.perf.simulation import ClockedModel, PassTimes
from windlass.perf.sizes import Problem
from windlass.planner.budget import make_plan
from windlass.planner.constraints import PlanConstraints
from windlass.units import GIB
from windlass.workload import Workload

OLMOE, SMALL = SPECS["olmoe-1b-7b"], SPECS["qwen3-moe-1b"]
MACHINE = machine()


def _plan(spec, budget, **wanted):
    return make_plan(spec, sizes_of(spec), budget, PlanConstraints(**wanted))


def _estimate(spec, budget, workload, profile=MACHINE, *, on_clock=True, **wanted):
    plan = _plan(spec, budget, **wanted)
    return estimate(Problem(spec, sizes_of(spec), profile), plan, workload, on_clock=on_clock)


LENGTHS = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=40)


@settings(max_examples=some(8, of=16), deadline=None)
@given(LENGTHS, st.sampled_from((1, 2, 4, 16)), st.integers(1, 64), st.booleans())
def test_phases_add_up_and_keep_above_their_bounds(lengths, gigabytes, seqs, on_clock):
    work = Workload(*zip(*lengths, strict=True))
    found = _estimate(SMALL, gigabytes * GIB, work, on_clock=on_clock, max_num_seqs=seqs)
    near = pytest.approx
    assert found.total_s == near(found.load_s + found.prefill_s + found.decode_s)
    assert found.total_s == near(sum(phase.seconds for phase in found.phases.values()))
    phases = found.phases.values()
    assert sum(phase.output_tokens for phase in phases) == work.total_output_tokens
    assert sum(phase.prompt_tokens for phase in phases) >= work.total_prompt_tokens
    for name, phase in found.phases.items():
        if name != "load":
            assert max(phase.bound.values()) <= phase.seconds * (1 + 1e-9)
            assert max(phase.busy.values()) <= phase.seconds * (1 + 1e-9)
    assert json.loads(json.dumps(found.to_json()))["phases"].keys() == found.phases.keys()


def test_a_layer_that_drafts_costs_as_one_more_of_each_pass():
    """A layer more of 24, and the matrix that joins its rows."""
    last = SMALL.blocks[-1]
    drafting = replace(SMALL, blocks=(*SMALL.blocks, replace(last, drafts=True)))
    one = replace(SMALL, blocks=(*SMALL.blocks, last))
    plan = _plan(SMALL, 16 * GIB)
    for rows in (1, 512):
        work = PassRun(1, Seen(rows, 100.0 * rows, 0, 0.0), rows)
        plain, more, most = (
            ClockedModel(Problem(spec, sizes_of(spec), MACHINE), plan).run(work).busy["host"]
            for spec in (SMALL, one, drafting)
        )
        assert plain < more < most < plain + 3 * (more - plain)


WORK = Workload.from_lengths(128, 16, 96)


@few_layers()
def test_a_slow_disk_binds_and_a_fast_one_leaves_the_host():
    slow = _estimate(OLMOE, 3 * GIB, WORK, machine(disk=0.1))
    fast = _estimate(OLMOE, 3 * GIB, WORK, machine(disk=1e6))
    assert slow.bottleneck == "disk" and fast.bottleneck == "host"
    assert slow.total_s == pytest.approx(slow.busy["disk"], rel=0.1)
    assert fast.total_s == pytest.approx(fast.busy["host"], rel=0.02)
    resident = _estimate(OLMOE, 60 * GIB, WORK, machine(disk=1e6))
    assert fast.total_s <= 1.1 * resident.total_s


FASTER = (st.sampled_from((1, 2, 5, 20)), st.floats(0.1, 30), st.floats(0.1, 10),
          st.floats(1.05, 8))  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(*FASTER)
def test_a_faster_machine_is_never_slower(gigabytes, disk, compute, more):
    _check_faster(gigabytes, disk, compute, more, on_clock=False)


@settings(max_examples=some(3, of=8), deadline=None)  # of a second each
@given(*FASTER)
def test_a_faster_machine_is_never_slower_on_the_clock(gigabytes, disk, compute, more):
    with few_layers():
        _check_faster(gigabytes, disk, compute, more, on_clock=True)


def _check_faster(gigabytes, disk, compute, more, *, on_clock):
    def seconds(**rates):
        profile = machine(**rates)
        found = _estimate(SMALL, gigabytes * GIB, WORK, profile, on_clock=on_clock)
        return found.total_s

    base = seconds(disk=disk, compute=compute)
    slack = 1.02 if on_clock else 1 + 1e-9  # arrivals fall otherwise, by a few experts
    assert seconds(disk=disk * more, compute=compute) <= base * slack
    assert seconds(disk=disk, compute=compute * more) <= base * slack
    assert seconds(disk=disk * more, compute=compute * more) <= base / more**0.5 * slack


@few_layers()
def test_more_resident_experts_mean_less_reading():
    fixed = dict(max_num_seqs=32, max_num_batched_tokens=1024)
    found = [_estimate(OLMOE, 4 * GIB, WORK, expert_slots=n, **fixed) for n in (8, 64, 160)]
    reads = [one.busy["disk"] for one in found]
    assert reads[0] > 1.03 * reads[1] > 1.03 * 1.03 * reads[2] > 0


def test_the_first_pass_pays_for_what_stays_in_memory():
    found = _estimate(OLMOE, 60 * GIB, Workload.from_lengths(1, 50, 1), machine(compute=1e3))
    sizes = sizes_of(OLMOE)
    weights = sum(sizes.slot_bytes[p] * n for p, n in sizes.num_parts.items())
    whole = weights / MACHINE.disk.best
    assert 0 < found.load_s < whole  # one token does not need every expert
    found = _estimate(OLMOE, 60 * GIB, Workload.from_lengths(512, 2, 8), machine(compute=1e3))
    assert found.load_s == pytest.approx(whole, rel=0.05)
    assert found.phases["decode"].busy["disk"] == 0


def test_few_layers_stand_for_many(monkeypatch):
    short = _estimate(OLMOE, 4 * GIB, WORK)
    monkeypatch.setattr(timing, "_MOST_EXPERTS", 10_000)
    whole = _estimate(OLMOE, 4 * GIB, WORK)
    assert short.total_s == pytest.approx(whole.total_s, rel=0.03)
    assert short.busy["disk"] == pytest.approx(whole.busy["disk"], rel=0.03)


def test_samples_have_every_kind_of_layer_in_its_share():
    first, second = SMALL.blocks[0], OLMOE.blocks[0]
    blocks = (first,) * 3 + (second, first, first, first) * 15
    spec = replace(SMALL, blocks=blocks)
    sample = sample_layers(spec, most_experts=640)
    assert len(sample.spec.blocks) < len(blocks)
    kept = [block == second for block in sample.spec.blocks]
    for is_second, count in ((True, 15), (False, 48)):
        own = [w for w, s in zip(sample.weights, kept, strict=True) if s is is_second]
        assert sum(own) * sample.factor == pytest.approx(count)


@few_layers()
def test_few_sequences_stand_for_a_large_job(monkeypatch):
    lengths = [(50 + 37 * i % 400, 1 + 29 * i % 120) for i in range(4000)]
    work = Workload(*zip(*lengths, strict=True))
    some = _estimate(SMALL, 3 * GIB, work, max_num_seqs=64)
    monkeypatch.setattr(module, "_FEW_SEQUENCES", 10_000)
    whole = _estimate(SMALL, 3 * GIB, work, max_num_seqs=64)
    assert some.total_s == pytest.approx(whole.total_s, rel=0.03)
    assert some.phases.keys() == whole.phases.keys()


def test_what_prompts_share_is_computed_once():
    """Near a job of short prompts, and one long one; rows see more positions."""
    shared = Workload((320,) * 200, (16,) * 200, (0,) + (256,) * 199)
    short, each = Workload((320,) + (64,) * 199, (16,) * 200), Workload((320,) * 200, (16,) * 200)

    def seconds(work, **wanted):
        limits = dict(max_num_seqs=128, max_model_len=1024, **wanted)
        return _estimate(SMALL, 60 * GIB, work, **limits)

    found, near = seconds(shared), seconds(short)
    for name, phase in near.phases.items():
        assert found.phases[name].prompt_tokens == phase.prompt_tokens, name
        assert found.phases[name].seconds >= phase.seconds, "the header is seen by all rows"
    assert found.prefill_s == pytest.approx(near.prefill_s, rel=0.1)
    assert found.prefill_tokens_s == pytest.approx(near.prefill_tokens_s, rel=0.1)
    assert found.total_tokens_s > 3.5 * near.total_tokens_s, "users count all tokens"
    off = seconds(shared, prefix_caching=False)
    assert found.decode_s == pytest.approx(off.decode_s, rel=0.1), "contexts are the same"
    assert off == seconds(each, prefix_caching=False) and off.prefill_s > 3 * found.prefill_s


def test_few_sequences_stand_for_a_large_job_that_shares(monkeypatch):
    lengths = [(250 + 37 * i % 400, 1 + 29 * i % 120, 192 * (i > 0)) for i in range(1200)]
    work = Workload(*zip(*lengths, strict=True))
    some = _estimate(SMALL, 3 * GIB, work, max_num_seqs=64, on_clock=False)
    monkeypatch.setattr(module, "_FEW_SEQUENCES", 10_000)
    whole = _estimate(SMALL, 3 * GIB, work, max_num_seqs=64, on_clock=False)
    assert some.total_s == pytest.approx(whole.total_s, rel=0.03)


@few_layers()
def test_passes_between_the_timed_ones_are_as_on_the_clock():
    problem, plan = Problem(OLMOE, sizes_of(OLMOE), MACHINE), _plan(OLMOE, 4 * GIB)

    def decode(rows):
        return PassRun(1, Seen(rows, rows * 200.0, 0, 0.0), rows)

    times = PassTimes(problem, plan, [decode(n) for n in (1, 4, 16, 64, 200)])
    for rows in (2, 30, 100):
        model = ClockedModel(problem, plan)
        model.run(decode(rows))
        model.run(decode(rows))
        found = model.run(decode(rows))
        assert times.of(decode(rows)).seconds == pytest.approx(found.seconds, rel=0.08), rows


@few_layers()
def test_baselines_are_slower():
    plan = _plan(OLMOE, 4 * GIB)
    problem = Problem(OLMOE, sizes_of(OLMOE), MACHINE)

    def seconds(**changes):
        return estimate(problem, replace(plan, **changes), WORK).total_s

    base = seconds()
    assert seconds(overlap=False) > 1.1 * base
    assert seconds(schedule="model-based", micro_batch_tokens=64) > 1.5 * base


def test_what_cannot_be_estimated_is_said():
    with pytest.raises(UsageError, match="a sequence has 1999000 tokens"):
        _estimate(SMALL, 4 * GIB, Workload.from_lengths(1_998_000, 1000, 1))
    sizes = replace(sizes_of(SMALL), weight_kinds={Part.EXPERT: "int3"})
    with pytest.raises(UsageError, match="no rate for int3 weights"):
        estimate(Problem(SMALL, sizes, MACHINE), _plan(SMALL, 4 * GIB), WORK)

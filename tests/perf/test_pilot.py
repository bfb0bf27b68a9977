"""Predicted beside measured: what is compared, when rates are rescaled, what is planned anew."""

import json
import re
from dataclasses import replace

import pytest

from engines import engine_for, make_model, prompts, request, run_all
from machines import machine
from planning import SPECS, few_layers, round_sizes
from windlass.cli import main
from windlass.cli.summary import phase_json, phase_lines
from windlass.perf.accuracy import compare
from windlass.perf.estimate import LANES, Estimate, Phase
from windlass.phases import PhaseStats
from windlass.planner.budget import PlanConstraints, bytes_here, make_plan
from windlass.planner.pilot import (
    Pilot,
    Problem,
    run_of,
    scaled,
    variants,
)
from windlass.schedule.batch import CHUNK_TOKENS, Segment
from windlass.units import GIB
from windlass.workload import Workload

SPEC, SIZES = SPECS["olmoe-1b-7b"], round_sizes(SPECS["olmoe-1b-7b"])
PLAN = make_plan(
    SPEC, SIZES, 4 * GIB, PlanConstraints(max_num_seqs=64, max_num_batched_tokens=1024)
)
WORK = Workload.from_lengths(100, 20, 200)


@pytest.fixture(scope="module", autouse=True)
def fast():
    """What is measured is said in multiples of an estimate, however many layers it rests on."""
    with few_layers():
        yield


# --- the comparison ---


def _phase(seconds, *, passes=1, prompt=0, output=0, disk=0.0, host=0.0):
    lanes = dict.fromkeys(LANES, 0.0)
    return Phase(
        seconds=seconds, passes=passes, prompt_tokens=prompt, output_tokens=output,
        busy={**lanes, "disk": disk, "host": host}, bound={**lanes, "disk": disk / 2, "host": host},
        bottleneck="disk",
    )  # fmt: skip


def _estimate(**phases):
    nothing = dict.fromkeys(LANES, 0.0)
    return Estimate(
        prefill_s=0, decode_s=0, load_s=0, total_s=0, prefill_tokens_s=0, decode_tokens_s=0,
        total_tokens_s=0, busy=nothing, bound=nothing, bottleneck="disk", phases=phases,
    )  # fmt: skip


PREDICTED = _estimate(
    load=_phase(1.0, passes=0, disk=1.0),
    prefill=_phase(4.0, prompt=900, output=10, disk=3.0, host=2.0),
    decode=_phase(5.0, passes=9, output=90, disk=8.0, host=1.0),
)
MEASURED = {
    "prefill": PhaseStats(seconds=4.0, passes=1, prompt_tokens=900, output_tokens=10, disk_s=3.5,
                          wait_s=1.0),
    "decode": PhaseStats(seconds=8.0, passes=9, output_tokens=90, disk_s=8.0),
}  # fmt: skip


def test_phases_are_compared_with_the_load_in_prefill():
    check = compare(PREDICTED, MEASURED)
    assert list(check.phases) == ["prefill", "decode", "total"] and check.done == 1
    prefill = check.phases["prefill"]
    assert (prefill.predicted_s, prefill.measured_s) == (5.0, 4.0)
    assert prefill.error == pytest.approx(0.25)
    assert prefill.predicted_busy["disk"] == 4.0 and prefill.measured_busy["disk"] == 3.5
    assert prefill.measured_busy["host"] == 3.0
    assert prefill.shares_of_bound == {"disk": 0.5, "host": 0.5}
    assert check.total.predicted_s == 10.0 and check.total.measured_s == 12.0
    # 2 s of the disk bind prefill, 4 s of it decode; 12 s were taken
    assert check.share_of_bound == pytest.approx(6 / 12)
    lines = check.lines()
    assert "prefill 5.00 s, took 4.00 s (+25 %), decode 5.00 s, took 8.00 s (-38 %)" in lines[0]
    assert "50 % reached" in lines[1] and "bottleneck: disk" in lines[1]
    assert json.loads(json.dumps(check.to_json()))["phases"]["total"]["error"] < 0


def test_a_job_that_ended_early_is_compared_with_its_share():
    half = {"prefill": replace(MEASURED["prefill"], prompt_tokens=490)}
    check = compare(PREDICTED, half, replanned="why")
    assert check.done == 0.5 and check.total.predicted_s == 5.0
    assert check.phases["decode"].error is None
    assert "for 50 % of the expected tokens" in check.lines()[0] and check.lines()[-1] == "why"
    assert compare(PREDICTED, {}).lines() == []


# --- the pilot ---


def _segments(decode, prompts=0):
    one = Segment(
        sequence=0, token_ids=(1,), first_position=100, pages=(), state_slot=-1, is_prompt=False,
        long_rope=False, wants_logits=True,
    )  # fmt: skip
    chunk = replace(one, token_ids=(1,) * CHUNK_TOKENS, first_position=0, is_prompt=True)
    return [one] * decode + [replace(chunk, wants_logits=False)] * prompts


def test_the_rows_of_a_pass_are_counted_as_the_planner_does():
    run = run_of(_segments(3, 2))
    assert (run.seen.decode_rows, run.seen.prompt_rows, run.num_logits) == (3, 128, 3)
    assert run.seen.decode_positions == 3 * 101
    assert run.seen.prompt_positions == 2 * 64 * 65 / 2


class Run:
    """A pilot of the plan, and passes that take what is said."""

    def __init__(self, plan=PLAN):
        self.said = []
        problem = Problem(spec=SPEC, sizes=SIZES, plan=plan, profile=machine(), workload=WORK)
        self.pilot = Pilot(problem, tell=self.said.append)
        self.pilot.after(_segments(64), PhaseStats(seconds=99.0), list)  # the first says nothing

    def passes(self, count, *, disk, host, idle=0.0, left=((100, 20, 64),) * 90, segments=None):
        """Passes whose lanes are so many times as slow as the profile says, and that wait for
        nothing for the share `idle` of their time."""
        segments, plans = segments or _segments(64), []
        times = self.pilot._pass_times() if not self.said else self.times
        self.times = times
        run = run_of(segments)
        timed, sample = times.of(run), times.sample_s(run.num_logits)
        lanes = disk * timed.busy["disk"], host * (timed.busy["host"] + sample)
        before = max(timed.busy.values()) + sample
        seconds = (timed.seconds + sample - before + max(lanes)) / (1 - idle)
        took = PhaseStats(
            seconds=seconds, passes=1, disk_s=lanes[0], wait_s=max(0.0, seconds - lanes[1])
        )
        for _ in range(count):
            plans.append(self.pilot.after(segments, took, lambda: left))
        return [plan for plan in plans if plan is not None]


def test_passes_as_predicted_change_nothing():
    run = Run()
    assert run.passes(20, disk=1.0, host=1.0) == []
    assert run.passes(20, disk=1.1, host=1.1) == [] and run.said == []
    assert run.pilot._profile == machine()


def test_a_slower_disk_is_noticed_said_once_and_believed():
    run = Run()
    run.passes(3, disk=2.0, host=1.0)
    assert run.said == []
    run.passes(1, disk=2.0, host=1.0)
    assert len(run.said) == 1 and "disk at 50 %, host at 100 % of its rate" in run.said[0]
    assert run.pilot._profile.disk.best == pytest.approx(machine().disk.best / 2)
    assert run.pilot._profile.host.memory_rate == pytest.approx(machine().host.memory_rate)
    rates = run.pilot._profile
    run.passes(12, disk=2.0, host=1.0)  # now as predicted
    assert run.pilot._profile == rates and len(run.said) == 1
    run.passes(4, disk=4.0, host=1.0)
    assert run.pilot._profile.disk.best < 0.7 * rates.disk.best and len(run.said) == 1
    assert run.pilot.check({}).replanned == run.said[0]


def test_a_faster_machine_is_noticed_too():
    run = Run()
    run.passes(4, disk=0.5, host=0.5)
    assert "disk at 200 %, host at 200 % of its rate" in run.said[0]
    assert run.pilot._profile.disk.best == pytest.approx(2 * machine().disk.best)


def test_time_that_no_rate_explains_is_believed_as_well():
    run = Run()
    run.passes(4, disk=1.0, host=1.0, idle=0.5)
    assert re.search("take (1.9|2.0). times", run.said[0])
    assert run.pilot._slower == pytest.approx(2.0, rel=0.05)
    profile = run.pilot._profile
    assert profile.disk.best == pytest.approx(machine().disk.best)
    run.passes(8, disk=1.0, host=1.0, idle=0.5)
    assert run.pilot._profile is profile, "judged by what is known now"


def test_what_is_planned_anew_fits_the_same_memory():
    narrow = replace(PLAN, max_num_seqs=16, max_num_batched_tokens=1024)
    run = Run(narrow)
    most = bytes_here(narrow, SPEC, SIZES)
    (plan,) = run.passes(4, disk=5.0, host=1.0, segments=_segments(16))
    assert plan.max_num_seqs > 16, "a slow disk wants more rows per pass"
    assert bytes_here(plan, SPEC, SIZES) <= most
    kept = ("max_num_seqs", "max_num_batched_tokens", "mixed_prefill_tokens")
    assert replace(plan, **{name: getattr(narrow, name) for name in kept}) == narrow
    assert f"sequences per pass 16 -> {plan.max_num_seqs}" in run.said[0]
    assert plan.max_num_batched_tokens >= plan.max_num_seqs + CHUNK_TOKENS


def test_nothing_is_planned_anew_where_nothing_is_left():
    run = Run(replace(PLAN, max_num_seqs=16))
    assert run.passes(8, disk=5.0, host=1.0, left=(), segments=_segments(16)) == []
    assert "the plan stays as it is" in run.said[0]


def test_variants_differ_and_can_run():
    found = variants(PLAN)
    assert PLAN not in found and len(set(found)) == len(found) > 10
    assert all(p.max_num_batched_tokens >= p.max_num_seqs + CHUNK_TOKENS for p in found)
    mixed = {p.mixed_prefill_tokens for p in found}
    assert None in mixed and all(m is None or m % CHUNK_TOKENS == 0 for m in mixed)


def test_scaled_machines_and_fitting_workloads():
    fast = scaled(machine(), disk=2.0, host=4.0)
    assert fast.disk.best == 2 * machine().disk.best
    assert fast.host.experts["int4"].best == 4 * machine().host.experts["int4"].best
    assert fast.host.call_s == machine().host.call_s / 4
    cut = Workload((100, 5), (20, 90), (64, 0)).shortened(50)
    assert cut == Workload((49, 5), (1, 45), (48, 0))


# --- in an engine ---


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pilot")
    make_model("qwen3_moe", folder)
    return folder


def test_an_engine_goes_on_by_another_plan_with_the_same_results(path):
    """A pilot that doubles and halves what runs at once, again and again."""
    requests = [request(f"r{i}", p, max_tokens=6) for i, p in enumerate(prompts((70, 9) * 8))]
    with engine_for(path) as engine:
        expected = {name: o.outputs[0].token_ids for name, o in run_all(engine, requests).items()}
    with engine_for(path) as engine:
        sizes, lengths = iter([2, 1, 3] * 20), []

        class Restless:
            def after(self, segments, took, left):
                assert took.passes == 1 and took.seconds > 0
                lengths.append(left())
                return replace(engine.plan, max_num_seqs=next(sizes))

            def check(self, phases):
                return None

        engine._pilot = Restless()
        found = run_all(engine, requests)
        assert engine.stats().passes > 20 and engine.capacity in (1, 2, 3)
    assert {name: output.outputs[0].token_ids for name, output in found.items()} == expected
    assert (
        sum(left for left, _, _ in lengths[0]) == sum(map(len, prompts((70, 9) * 8))) - 8 * 79 // 2
    )
    assert lengths[-1] == []


def test_what_waiting_prompts_will_find_is_not_left(path):
    header = prompts((130,))[0]
    with engine_for(path, max_num_seqs=1) as engine:
        for i in range(3):
            engine.add(request(f"r{i}", [*header, 3 + i], max_tokens=6))
        engine.step()
        assert engine._left() == [(0, 5, 0), (131, 6, 128), (131, 6, 128)]


def test_a_run_is_compared_in_its_summary(path):
    work = Workload.from_lengths(30, 8, 12)
    with engine_for(path) as engine:
        problem = Problem(
            spec=SPEC, sizes=SIZES, plan=replace(PLAN, max_num_seqs=8), profile=machine(),
            workload=work,
        )  # fmt: skip
        engine._pilot = Pilot(problem)
        run_all(engine, [request(f"r{i}", p) for i, p in enumerate(prompts((30,) * 12))])
        stats = engine.stats()
    assert stats.check.done == 1 and stats.check.total.measured_s == pytest.approx(stats.pass_s)
    assert stats.check.total.predicted_s > 0
    assert any(line.startswith("predicted: prefill") for line in phase_lines(stats))
    document = json.loads(json.dumps(phase_json(stats)))
    assert set(document["prediction"]["phases"]) >= {"prefill", "decode", "total"}
    with engine_for(path) as engine:
        run_all(engine, [request("r", [5, 6])])
        assert engine.stats().check is None and phase_json(engine.stats())["prediction"] is None


def test_generate_says_its_plan_first_and_how_it_went_at_the_end(path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(path / "no reports"))
    given = ["-m", str(path), "-n", "6", "--ignore-eos", "-t", "1", "--host-memory", "4GiB"]
    assert main(["generate", *given, "--json", "w5 w6 w7"]) == 0
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    plan = [line for line in lines if line.startswith("plan: ")]
    assert lines[: len(plan)] == plan and len(plan) == 4
    assert plan[-1].startswith("plan: for 1 sequence of 3 tokens in and 6 out: about ")
    assert "rates assumed" in plan[-1]
    begins = [line.split(":")[0] for line in lines[len(plan) :]]
    assert begins[-2:] == ["predicted", "of the bound"]
    text, document = shown.out.splitlines()
    found = json.loads(document)
    assert found["text"] == text and found["prediction"]["done"] == 1
    assert set(found["prediction"]["phases"]) == {"prefill", "decode", "total"}

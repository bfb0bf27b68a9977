"""Predicted beside measured: what is compared, and what is said of it."""

import json
from dataclasses import replace

import pytest

from machines import machine
from planning import SPECS, few_layers, round_sizes
from windlass.perf.accuracy import Prediction, compare
from windlass.perf.estimate import LANES, Estimate, Phase
from windlass.perf.sizes import Problem
from windlass.phases import PhaseStats
from windlass.planner.budget import make_plan
from windlass.planner.constraints import PlanConstraints
from windlass.units import GIB
from windlass.workload import Workload

SPEC, SIZES = SPECS["olmoe-1b-7b"], round_sizes(SPECS["olmoe-1b-7b"])
PLAN = make_plan(
    SPEC, SIZES, 4 * GIB, PlanConstraints(max_num_seqs=64, max_num_batched_tokens=1024)
)


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
    check = compare(PREDICTED, half)
    assert check.done == 0.5 and check.total.predicted_s == 5.0
    assert check.phases["decode"].error is None
    assert "for 50 % of the expected tokens" in check.lines()[0]
    assert compare(PREDICTED, {}).lines() == []


def test_rates_that_nobody_measured_have_no_accuracy():
    check = compare(PREDICTED, MEASURED, rates_assumed=True)
    (line,) = check.lines()
    assert "decode 5.00 s, took 8.00 s" in line and "assumed" in line and "%" not in line
    document = json.loads(json.dumps(check.to_json()))
    assert document["rates_assumed"] and document["phases"]["total"]["measured_s"] == 12
    assert {phase["error"] for phase in document["phases"].values()} == {None}
    assert not compare(PREDICTED, MEASURED).to_json()["rates_assumed"]


def test_what_is_expected_rests_on_the_profile():
    plan, work = replace(PLAN, max_num_seqs=8), Workload.from_lengths(3000, 8, 2)
    for source in ("assumed", "measured"):
        profile = replace(machine(), source=source)
        found = Prediction.of(Problem(SPEC, SIZES, profile), plan, work)
        assert found.rates_assumed == (source == "assumed")
        assert found.rates_assumed == profile.is_assumed
        assert sum(one.output_tokens for one in found.estimate.phases.values()) == 2 * 8
    cut = Prediction.of(Problem(SPEC, SIZES, profile), replace(plan, max_model_len=100), work)
    assert cut.estimate.total_s < found.estimate.total_s

"""What runs say of themselves at their end: beside what was predicted, and of weights."""

import json
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from engines import engine_for, make_model, prompts, request, run_all
from fake_engine import fake_store_stats
from machines import machine
from windlass.build import expected
from windlass.build.expected import Compared, EngineExpectation, OtherWork
from windlass.cli import main
from windlass.cli.summary import phase_json, phase_lines, prefetch_lines, weights_json
from windlass.llm import LLM
from windlass.params import SamplingParams
from windlass.perf.accuracy import Accuracy, PhaseCheck
from windlass.perf.estimate import LANES
from windlass.units import counted
from windlass.workload import Workload


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summary")
    make_model("qwen3_moe", folder)
    return folder


def test_a_run_is_compared_in_its_summary(path):
    with engine_for(path) as engine:
        assert engine.compare({}) is None, "nothing was planned for"
        run_all(engine, [request(f"r{i}", p) for i, p in enumerate(prompts((30,) * 12))])
        stats = engine.stats()
        known: Any = engine._expectation
        for profile, is_sure in ((machine(), True), (replace(machine(), source="assumed"), False)):
            work = Workload.from_lengths(30, 8, 12)
            problem = replace(known._chosen.problem, profile=profile)
            chosen = replace(known._chosen, problem=problem, workload=work)
            check = EngineExpectation(chosen).compare(
                engine.plan, None, stats.phases, is_warm=False
            )
            assert check is not None
            assert check.accuracy.done == 1
            assert check.accuracy.total.measured_s == pytest.approx(stats.pass_s)
            assert check.accuracy.total.predicted_s > 0
            assert any(line.startswith("predicted: prefill") for line in phase_lines(stats, check))
            document = json.loads(json.dumps(phase_json(stats, check)))["prediction"]
            assert set(document["phases"]) >= {"prefill", "decode", "total"}
            assert (document["phases"]["total"]["error"] is not None) == is_sure
            assert document["rates_assumed"] == (not is_sure)
        assert phase_json(stats, None)["prediction"] is None


def test_a_busy_machine_alarms_nobody():
    lanes = dict.fromkeys(LANES, 1.0)
    phase = PhaseCheck(
        predicted_s=1.0, measured_s=9.0, predicted_busy=lanes, measured_busy=lanes, bound=lanes,
        error=1 / 9 - 1,
    )  # fmt: skip
    found = Accuracy(phases={"decode": phase, "total": phase}, done=1, rates_assumed=False)
    assert "took 9.00 s (-89 %)" in Compared(found, 0.05).lines()[0]
    line = Compared(found, 0.6).lines()[0]
    assert "decode 1.00 s, took 9.00 s, total" in line and "-89" not in line
    assert line.endswith("; other programs took 60 % of the processors' time")
    assert Compared(found, 0.6).to_json()["others_cpu_share"] == 0.6
    assert Compared(found, 0.6).to_json()["phases"]["total"]["error"] < -0.8


def test_what_other_programs_take_is_what_this_one_does_not(tmp_path, monkeypatch):
    tick, own = os.sysconf("SC_CLK_TCK"), sum(os.times()[:2])
    monkeypatch.setattr(expected, "_STAT", tmp_path / "stat")
    (tmp_path / "stat").write_text("cpu 100 0 0 100 0 0 0 0 0 0\n")
    work = OtherWork()
    (tmp_path / "stat").write_text(f"cpu {100 + 600 * tick} 0 0 {100 + 400 * tick} 0 0 0 0 0 0\n")
    assert work.share() == pytest.approx(0.6, abs=0.01 + (sum(os.times()[:2]) - own) / 1000)
    monkeypatch.setattr(expected, "_STAT", tmp_path / "none")
    assert OtherWork().share() == 0


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
    assert lines[-1].startswith("predicted: ") and "assumed" in lines[-1] and "%" not in lines[-1]
    text, document = shown.out.splitlines()
    found = json.loads(document)
    assert found["text"] == text and found["prediction"]["done"] == 1
    assert set(found["prediction"]["phases"]) == {"prefill", "decode", "total"}


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory):
    """A model, and options that leave its experts on disk but for a few."""
    folder = tmp_path_factory.mktemp("offloaded")
    make_model("qwen3_moe", folder, dtype=torch.bfloat16)
    return folder, {"moe_expert_cache_size": "3", "host_memory": "4GiB", "threads": 1}


NONE = fake_store_stats(0)
COUNTERS = ("prefetch_issued", "prefetch_used", "prefetch_issued_bytes", "prefetch_used_bytes")


def test_what_was_prefetched_and_where_experts_were_found_reaches_all_ends(
    offloaded, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, options = offloaded
    with LLM(str(folder), max_model_len=64, **options) as llm:
        llm.generate("w5 w6 w7", SamplingParams(max_tokens=9, ignore_eos=True))
        stats = llm.get_metrics()
    assert all(getattr(stats.weights, name) > 0 for name in COUNTERS)
    assert 0 < stats.expert_shares["host"] < 1
    assert sum(stats.expert_shares.values()) == pytest.approx(1)
    flags = ["-m", str(folder), "--json", "-t", "1"]
    flags += ["--moe-expert-cache-size", "3", "--host-memory", "4GiB", "-c", "64"]
    body = {"prompt": "w5 w6 w7", "max_tokens": 9, "ignore_eos": True}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in").write_text(json.dumps(row) + "\n")
    files = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    for command in (
        ["generate", *flags, "-n", "9", "--ignore-eos", "w5 w6 w7"], ["run-batch", *flags, *files],
    ):  # fmt: skip
        assert main(command) == 0
        shown = capsys.readouterr()
        said = shown.out + shown.err
        document = json.loads(shown.out.splitlines()[-1])
        assert all(document[name] > 0 for name in COUNTERS)
        assert {"prefetch_late_bytes", "prefetch_cancelled_bytes"} <= set(document)
        assert 0 < document["expert_shares"]["host"] < 1
        assert "\nprefetched: " in said and ", on disk: " in said
        assert document["forecast_sources"] == "", "too few passes to judge any"
    words = "forecasts on: none; off, no better than without them: 1 layer ahead"
    stats = replace(stats, forecast_sources=words)
    assert prefetch_lines(stats)[1:] == [words] == prefetch_lines(replace(stats, weights=NONE))
    assert weights_json(stats)["forecast_sources"] == words


def test_one_of_a_thing_is_said_as_one():
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert [counted(n, "pass", "passes") for n in (1, 2)] == ["1 pass", "2 passes"]

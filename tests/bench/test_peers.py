"""The comparison with too little memory, without a peer: what is run under which key, that Windlass
plans for its job, and what tables and aims make of it."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engines import make_model
from windlass.options import read_config
from windlass.units import GIB, MIB

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from peers import launch, limited, models, report, run_windlass
from peers.document import Document
from peers.job import Job
from peers.launch import Outcome

CUT = "qwen3-30b-a3b-12-layers"
WISH = limited.LimitedWish(
    requests=4, prompt_tokens=16, output_tokens=3, llama_sequences=(2,), windlass_sequences=(0,),
    schedules=("module-based", "model-based"), limit_bytes=None, has_alone=False, is_quick=True,
    threads=1, timeout_s=1.0, phase_s=1.0,
)  # fmt: skip
SECONDS = {"module-based": 10.0, "model-based": 15.0, "llama.cpp": 25.0}


class Machine:
    """In place of engines: takes jobs, answers with the seconds of SECONDS."""

    def __init__(self) -> None:
        self.jobs: list[tuple[str, Job, int]] = []
        self.answers = {"module-based": "a", "model-based": "a"}

    def run(self, engine: str, job: Job, timeout_s: float, limit_bytes: int) -> Outcome:
        self.jobs.append((engine, job, limit_bytes))
        name, more = "llama.cpp", {}
        if engine == "windlass":
            name = job.settings.get("schedule", "module-based")
            total = {"predicted_s": 9.0, "shares_of_bound": {"disk": 0.5}}
            more = {"bytes_read": 1, "rates": "assumed", "answers": self.answers[name],
                    "prediction": {"share_of_bound": 0.9, "phases": {"total": total}}}  # fmt: skip
        result = {"prefill_s": 0.0, "decode_s": SECONDS[name], "prefill_share": 1.0,
                  "decode_share": 1.0, "peak_rss_bytes": 1, "more": more}  # fmt: skip
        return Outcome(status="ok", result=result, limited={"no_cgroup": None})


@pytest.fixture
def machine(monkeypatch):
    found = Machine()
    monkeypatch.setattr(launch, "run_in_group", found.run)
    return found


@pytest.fixture
def model(tmp_path):
    found = models.load(CUT, tmp_path)
    found.checkpoint.mkdir(parents=True)
    with (found.checkpoint / "model.safetensors").open("wb") as file:
        os.truncate(file.fileno(), 6 * GIB)  # without a byte on disk
    return found


def run(model, document, **changes):
    limited.Limited(document, replace(WISH, **changes)).run(model, ["windlass", "llama.cpp"])
    return document.data["limited"]


def test_the_cut_model_is_run_only_where_it_is_named(model):
    assert CUT in models.CUT_MODELS and CUT not in models.FULL_MODELS
    assert model.config["num_hidden_layers"] == 12 and model.config["num_experts"] == 128


def test_runs_of_another_limit_or_schedule_are_others(machine, model):
    document = Document(None, {}, stop_after_s=1e9)
    third = list(run(model, document))
    assert [e["limit_bytes"] for e in third] == 3 * [2 * GIB] and all(e["is_third"] for e in third)
    assert [e["settings"].get("schedule") for e in third] == [None, "model-based", None]
    assert "model-based" in third[1]["key"] and "based" not in third[0]["key"] + third[2]["key"]
    count = len(machine.jobs)
    assert len(run(model, document)) == 3 and len(machine.jobs) == count  # all are known
    more = run(model, document, limit_bytes=1_500_000_000)[3:]
    assert {e["limit_bytes"] for e in more} == {1430 * MIB} and not any(e["is_third"] for e in more)
    assert {limit for _, _, limit in machine.jobs[count:]} == {1430 * MIB}
    assert {job.settings["host_memory"] for engine, job, _ in machine.jobs[count:]
            if engine == "windlass"} == {1430 * MIB}  # fmt: skip


def test_one_request_runs_alone_once_and_only_if_asked(machine, model):
    document = Document(None, {}, stop_after_s=1e9)
    alone = [e for e in run(model, document, has_alone=True) if e["requests"] == 1]
    assert [(e["engine"], e["at_once"]) for e in alone] == [("windlass", 1), ("llama.cpp", 1)]


def test_other_answers_end_the_comparison(machine, model):
    machine.answers["model-based"] = "b"
    with pytest.raises(SystemExit, match="other answers"):
        run(model, Document(None, {}, stop_after_s=1e9))


def test_table_and_aims(machine, model):
    document = Document(None, {}, stop_after_s=1e9)
    run(model, document)
    document.data["models"][CUT] = {"checkpoint_bytes": 6 * GIB}
    rows = report.show(document.data).split("\n\n")[0].splitlines()[2:]
    assert "90 %" in rows[0] and "least time of disk 50 %" in rows[0] and " x" not in rows[0]
    assert rows[1].startswith("windlass model-based, 4 requests") and "1.50 x" in rows[1]
    assert rows[2].startswith("llama.cpp") and "2.50 x" in rows[2]
    aims = report.aims(document.data)
    found = [(each["wanted"], each["ratio"], each["is_met"]) for each in aims]
    assert found == [(1.5, 2.5, True), (0.85, 0.9, True)]


def test_a_planned_job_has_a_prediction_and_the_same_answers(tmp_path):
    make_model("qwen3_moe", tmp_path)
    vocab_size = read_config(tmp_path)["vocab_size"]
    found = {}
    for schedule in ("module-based", "model-based"):
        job = Job(
            model=str(tmp_path), vocab_size=vocab_size, threads=1, sequences=3, at_once=0,
            prompt_tokens=9, output_tokens=4,
            settings={"planned": True, "schedule": schedule},
        )  # fmt: skip
        result = run_windlass._run(job)
        assert result.more["plan"]["schedule"] == schedule
        assert result.more["prediction"]["phases"]["total"]["predicted_s"] > 0
        assert result.more["prediction"]["done"] == 1 and result.more["bytes_read"] > 0
        found[schedule] = (result.more["answers"], result.tokens)
    assert len(set(found.values())) == 1 and len(result.tokens) == 4

"""One replica, without ray: rows in, the lines of a job out."""

import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from fake_engine import FakeEngine
from replica_rows import computed
from windlass.batch.job import LeftRows, run_job
from windlass.batch.job_options import JobOptions
from windlass.batch.jobfile import JobFile, JobRow
from windlass.batch.progress import LineProgress
from windlass.cli import main
from windlass.options import EngineOptions
from windlass.ray.messages import KnownWork, ReplicaSpec
from windlass.ray.replica import Replica
from windlass.workload import Job, Workload


def rows_of(path: Path) -> list[JobRow]:
    found = JobFile(path)
    return list(found.rows(np.ones(len(found), dtype=np.bool_)))


def write(folder: Path) -> Path:
    lines = [
        f'{{"custom_id":"r{i}","method":"POST","url":"/v1/completions",'
        f'"body":{{"prompt":"row {i}","max_tokens":{1 + i % 9},"n":{1 + i % 2}}}}}'
        for i in range(30)
    ]
    lines[7] = "no json"
    lines[9] = lines[9].replace('"n":2', '"best_of":7')
    (folder / "in").write_text("\n".join(lines) + "\n")
    return folder / "in"


def spec() -> ReplicaSpec:
    return ReplicaSpec(options=EngineOptions(), served_names=("m",), created=1790000000)


class Source:
    def open(self, max_model_len: int | None, left: LeftRows) -> FakeEngine:
        return FakeEngine()


class Never:
    def is_stopping(self) -> bool:
        return False


def fingerprinted() -> FakeEngine:
    engine = FakeEngine(capacity=4)
    engine.fingerprint["kernels"] = "cpu"
    return engine


def test_lines_are_those_of_a_job(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path))
    job = JobOptions(
        input_file=tmp_path / "in", output_file=tmp_path / "out", error_file=None,
        served_names=("m",), identity={}, recorded={}, max_model_len=None, created=1790000000,
    )  # fmt: skip
    with (tmp_path / "log").open("w") as log, LineProgress(log) as progress:
        run_job(job, Source(), progress=progress, stopping=Never())
    with Replica(spec(), fingerprinted()) as replica:
        ended = computed(replica, rows[::-1])
    assert [one.index for one in ended] == list(range(30))[::-1]
    assert b"".join(one.line for one in ended[::-1]) == (tmp_path / "out").read_bytes()


def test_rows_come_back_as_they_end_and_the_window_is_kept(tmp_path: Path) -> None:
    rows, engine = rows_of(write(tmp_path)), fingerprinted()
    with Replica(spec(), engine) as replica:
        facts = replica.facts()
        assert (facts.capacity, facts.window) == (4, 8)
        assert pickle.loads(pickle.dumps(facts)).words().startswith(f"process {facts.pid}, ")
        ended = list(replica.exchange(rows, 1.0).ended)
        deadline = time.monotonic() + 30
        while len(ended) < 30 and time.monotonic() < deadline:
            report = replica.exchange((), 1.0)
            ended += report.ended
        assert sorted(one.index for one in ended) == list(range(30))
        assert engine.peak_flying <= 8 + 1  # a row of two choices may be the last
        assert pickle.loads(pickle.dumps(report)).stats.generated_tokens > 0
    assert engine.is_closed


def test_work_is_planned_for_what_fits() -> None:
    work = KnownWork(Job(Workload.from_lengths(100, 50, 3), True), 1000, wants_grammars=True)
    engine = FakeEngine()
    job = work.job(engine.tokenizer, engine.default_params, 64)
    assert job is not None and job.workload.longest <= 64
    assert work.row_bytes(64, 300) > 1000
    assert KnownWork(None).job(engine.tokenizer, engine.default_params, 64) is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ray-address", "auto"], "--ray-address: allowed with --replicas"),
        (["--replicas", "2", "--trace", "t"], "--trace: allowed without --replicas"),
        (["--replicas", "2", "--plan", "p"], "--plan: allowed without --replicas"),
        (["--replicas", "2", "--expert-usage", "u"], "--expert-usage: got a file"),
        (["--replicas", "2", "--device", "cuda:1"], "--device: got cuda:1, allowed auto, cpu"),
        (["--replicas", "0"], "--replicas: got '0', allowed an integer from 1"),
    ],
)
def test_options_that_do_not_go_together(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run-batch", "-i", str(write(tmp_path)), "-o", str(tmp_path / "o"), *more]) == 2
    assert f"windlass: {message}" in capsys.readouterr().err

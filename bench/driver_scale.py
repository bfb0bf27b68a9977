"""What a batch job costs beside its engine, by number of rows: time of each step and peak memory.

    python bench/driver_scale.py [--rows 100000 1000000] [--folder F] [--json FILE]
                                 [--only-steps] [--quick]

The job's own code. First the steps one by one, on one thread: the scan, reading rows, reading and
giving them to 64 replicas in handfuls of 8 (`dispatch`), making and appending result lines,
matching a journal, writing the output; a driver of replicas does all but make lines.
Then a job with an engine that answers at once: a first run is killed (SIGKILL, from within) when
half of the rows have ended, a second one resumes it and writes the output. Each in a process of
its own. Rows are chats of 490 bytes, answers have 410 characters. Peaks are the process's own, of
each step; `run` has the engine's thread and a body read and answered in it.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from fake_engine import FakeEngine, FakeTokenizer
from windlass.batch.flights import row_line
from windlass.batch.job import OpenJob
from windlass.batch.job_options import JobOptions
from windlass.batch.jobfile import JobFile, JobRow
from windlass.batch.journal import Journal, JournalState
from windlass.batch.ledger import Ledger
from windlass.batch.progress import Snapshot
from windlass.batch.prompt_lengths import job_lengths
from windlass.engine.outputs import CompletionOutput, RequestOutput
from windlass.engine.request import Request, StepResult
from windlass.engine.service import Service
from windlass.errors import JobError
from windlass.params import SamplingParams
from windlass.protocol.openai import ServedModel
from windlass.ray.dispatch import Dispatch

_QUESTION = "Where does this letter go, and why? It speaks of rent. " * 4
_ANSWER = "Into the folder of the landlord, as it asks for money. " * 7 + "So it is, I think."
_CAPACITY = 256
_FEW = 200_000  # rows of steps that cost the same for each, however many there are


def write_rows(path: Path, rows: int) -> None:
    """A job of `rows` chats."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            system = {"role": "system", "content": "You are a careful clerk who sorts letters."}
            user = {"role": "user", "content": f"{row}: {_QUESTION}"}
            body = {"model": "m", "max_tokens": 100, "messages": [system, user]}
            request = {"custom_id": f"row-{row}", "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps({**request, "body": body}) + "\n")


class _Instant(FakeEngine):
    """Answers whatever is asked in the next step. Kills the process after `kill_after` answers."""

    def __init__(self, kill_after: int | None) -> None:
        super().__init__(capacity=_CAPACITY, max_model_len=4096)
        self._asked: list[Request] = []
        self._left = kill_after

    @property
    def has_work(self) -> bool:
        return bool(self._asked)

    def validate(self, request: Request) -> None:
        pass

    def add(self, request: Request) -> None:
        self._asked.append(request)

    def step(self) -> StepResult:
        asked, self._asked = self._asked, []
        if self._left is not None:
            self._left -= len(asked)
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
        answer = CompletionOutput(
            index=0, text=_ANSWER, token_ids=(97,) * 100, finish_reason="stop"
        )
        return StepResult(
            tuple(
                RequestOutput(
                    request_id=request.request_id, prompt=None,
                    prompt_token_ids=request.prompt_token_ids, outputs=(answer,),
                )
                for request in asked
            ),
            (),
        )  # fmt: skip


class _Silent:
    """A progress that nobody sees, but is asked for as often as a terminal's."""

    def __init__(self) -> None:
        self._shown = 0.0

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._shown >= 0.25

    def say(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def update(self, snapshot: Snapshot) -> None:
        self._shown = time.monotonic()

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def is_stopping(self) -> bool:
        return False


class _Steps:
    """Seconds and peak memory of each step."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {"before_bytes": _peak_bytes()}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        begin, cpu = time.perf_counter(), time.process_time()
        yield
        self.found[f"{name}_s"] = time.perf_counter() - begin
        self.found[f"{name}_cpu_s"] = time.process_time() - cpu
        self.found[f"{name}_peak_bytes"] = _peak_bytes()


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def run(folder: Path, kill_after: int | None) -> dict[str, float]:
    """The job as `run-batch` has it."""
    steps, quiet = _Steps(), _Silent()
    options = JobOptions(
        input_file=folder / "in.jsonl", output_file=folder / "out.jsonl", error_file=None,
        served_names=("m",), identity={}, recorded={}, max_model_len=None, created=0,
    )  # fmt: skip
    with steps.step("open"):
        job = OpenJob(options, quiet)
    with job:
        before = job.summary().num_done
        engine = _Instant(kill_after)
        with Service(engine) as service, steps.step("run"):
            job.run(engine, service, quiet, shares=False)
        with steps.step("output"):
            job.write_output()
        return {**steps.found, "rows_before": before, "rows": job.summary().rows}


def steps(folder: Path) -> dict[str, float]:
    """The steps one by one, of the folder's input."""
    every = _Steps()
    with every.step("scan"):
        file = JobFile(folder / "in.jsonl")
    few = min(len(file), _FEW)
    with every.step("read_rows"):
        for row in islice(file.rows(_all(file)), few):
            last = row
    with every.step("dispatch"):
        _dispatch(file)
    body = {"object": "chat.completion", "choices": [{"message": {"content": _ANSWER}}]}
    response = {"status_code": 200, "request_id": "req_a", "body": body}
    with every.step("make_lines"):
        for _ in range(few):
            line = row_line(last, response, None)
    with every.step("lengths"):
        model = ServedModel(("m",), FakeTokenizer(), 4096, SamplingParams())
        assert job_lengths(file, _all(file), model) is not None
    with Journal(folder / "steps.journal") as journal:
        ledger = Ledger(file, journal, retry_failed=True)
        with every.step("append"):
            for index, digest in enumerate(file.digests()):
                ledger.add(index, digest.tobytes(), JournalState.OK, line)
                ledger.sync_if_due()
            journal.sync()
        with every.step("match"):
            ledger = Ledger(file, journal, retry_failed=True)
        if ledger.num_done != len(file):
            raise JobError(f"{folder}: {ledger.num_done} of {len(file)} rows have ended")
        with every.step("write_output"), (folder / "steps.jsonl").open("wb") as out:
            for result in ledger.results():
                assert result is not None, "all rows have ended"
                out.write(result[1])
        return {**every.found, "journal_bytes": journal.size_bytes}


def _all(file: JobFile) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    return np.ones(len(file), dtype=np.bool_)


def _dispatch(file: JobFile) -> None:
    """Rows read and given to 64 replicas, one after the other, each of which ends all it has."""

    def again(indices: Sequence[int]) -> list[JobRow]:
        raise AssertionError("none dies")

    dispatch = Dispatch(file.rows(_all(file)), len(file), again)
    for name in range(64):
        dispatch.join(name, 8)
    while dispatch.num_left:
        for name in range(64):
            for row in dispatch.next_rows(name):
                dispatch.end(name, row.index)
            dispatch.spend(name, 1.0)


def _child(*arguments: str) -> dict[str, Any] | None:
    """What a process with one of the two wrote; None where it was killed."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        return None
    if done.returncode:
        raise SystemExit(f"{command}: ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def bench(rows: int, folder: Path, *, only_steps: bool = False) -> dict[str, Any]:
    """One number of rows; the folder is new, and is gone after it."""
    folder.mkdir(parents=True)
    try:
        write_rows(folder / "in.jsonl", rows)
        size = (folder / "in.jsonl").stat().st_size
        found = {"rows": rows, "input_bytes": size, "steps": _child("--steps", str(folder))}
        return found if only_steps else found | {"resumed": _resumed(rows, folder)}
    finally:
        shutil.rmtree(folder)


def _resumed(rows: int, folder: Path) -> dict[str, Any]:
    """The run that goes on after one that was killed."""
    if _child("--run", str(folder), "--kill-after", str(rows // 2)) is not None:
        raise SystemExit("the first run was not killed")
    found = _child("--run", str(folder))
    assert found is not None, "nothing kills the second run"
    with (folder / "out.jsonl").open("rb") as output:
        written = sum(1 for _ in output)
    if written != rows or not 0 < found["rows_before"] < rows:
        raise SystemExit(f"{written} of {rows} rows, {found['rows_before']} before")
    return found


def _lines(found: dict[str, Any]) -> list[list[str]]:
    """The table of one number of rows."""
    rows, lines = found["rows"], []
    for kind in ("steps", "resumed")[: 1 + ("resumed" in found)]:
        taken = found[kind]
        left = rows - taken.get("rows_before", 0)
        for name in (key[: -len("_cpu_s")] for key in taken if key.endswith("_cpu_s")):
            count, seconds = left if name == "run" else rows, taken[f"{name}_s"]
            if name in ("read_rows", "make_lines"):
                count = min(rows, _FEW)
            own = taken[f"{name}_peak_bytes"] - taken["before_bytes"]
            lines.append(
                [f"{name} ({kind})", f"{seconds:.2f}", f"{count / seconds:.0f}",
                 f"{1e6 * taken[f'{name}_cpu_s'] / count:.1f}", f"{own / 1e6:.0f}",
                 f"{own / rows:.0f}"]
            )  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-steps", action="store_true", help="no run, no kill")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill-after", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run or options.steps:
        done = run(options.run, options.kill_after) if options.run else steps(options.steps)
        print(json.dumps(done))
        return
    from machine import Others, describe, table, write  # torch, which the job itself is without

    described, others, results = describe(), Others(), []
    heads = ("step", "s", "rows/s", "us of CPU a row", "MB above start", "bytes a row")
    for rows in [2000] if options.quick else options.rows:
        folder = options.folder / f"driver-scale-{os.getpid()}"
        found = bench(rows, folder, only_steps=options.only_steps)
        results.append(found)
        print(f"{rows} rows:")
        print(table(heads, _lines(found)), flush=True)
        # each time: many rows take long
        write({**described, "others_cores": others.cores(), "results": results}, options.json)


if __name__ == "__main__":
    main()

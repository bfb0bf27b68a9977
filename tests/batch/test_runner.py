"""Whole jobs in this process, on an engine without a model."""

import io
import json
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fake_engine import FakeEngine, fake_store_stats
from windlass.batch.flights import result_line
from windlass.batch.job import LeftRows, Summary, run_job
from windlass.batch.job_options import JobOptions
from windlass.batch.progress import LineProgress, Meter, Snapshot, TerminalProgress, open_progress
from windlass.engine.outputs import (
    NOT_FINITE,
    NOTHING_ALLOWED,
    CompletionOutput,
    RequestOutput,
)
from windlass.engine.request import Request, StepResult
from windlass.errors import BudgetError, JobError, UsageError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Log:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.notes: list[str] = []
        self.snapshots: list[Snapshot] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    is_due = True

    def update(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        return None


def request(name: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    if url == CHAT:
        body.setdefault("messages", [{"role": "user", "content": f"I am {name}"}])
    else:
        body.setdefault("prompt", f"I am {name}")
    body.setdefault("max_tokens", 12)
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def options(folder: Path, *lines: Any, **changes: Any) -> JobOptions:
    """A job over `lines`; the input file is left alone without any."""
    if lines:
        texts = [each if isinstance(each, str) else json.dumps(each) for each in lines]
        (folder / "in").write_text("\n".join(texts) + "\n")
    plain = JobOptions(
        input_file=folder / "in",
        output_file=folder / "out",
        error_file=None,
        served_names=("m",),
        identity={"seed": 0},
        recorded={},
        max_model_len=None,
        created=1790000000,
    )
    return replace(plain, **changes)


class StopAfter:
    """Asks to stop once so many rows are done."""

    def __init__(self, num_rows: int | None, log: Log) -> None:
        self._num_rows = num_rows
        self._log = log

    def is_stopping(self) -> bool:
        done = self._log.snapshots[-1].rows_done if self._log.snapshots else 0
        return self._num_rows is not None and done >= self._num_rows


class Source:
    """Gives the engine that it has."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def open(self, max_model_len: int | None, left: LeftRows) -> FakeEngine:
        return self._engine


def run(
    job: JobOptions,
    engine: FakeEngine | None = None,
    *,
    stop_after: int | None = None,
    log: Log | None = None,
) -> Summary:
    """Runs the job; stops once `stop_after` rows are done."""
    log = log or Log()
    source = Source(engine or FakeEngine())
    return run_job(job, source, progress=log, stopping=StopAfter(stop_after, log))


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_results_in_input_order_in_openais_format(tmp_path: Path) -> None:
    lines = [request(f"r{i}", (CHAT, COMPLETIONS)[i % 2], max_tokens=5 + i % 9) for i in range(30)]
    engine = FakeEngine()
    summary = run(options(tmp_path, *lines), engine)
    assert (summary.ok, summary.refused, summary.failed, summary.is_complete) == (30, 0, 0, True)
    got = results(tmp_path / "out")
    assert [each["custom_id"] for each in got] == [each["custom_id"] for each in lines]
    first = got[0]
    assert list(first) == ["id", "custom_id", "response", "error"]
    assert list(first["response"]) == ["status_code", "request_id", "body"]
    assert (first["error"], first["response"]["status_code"]) == (None, 200)
    assert first["id"].startswith("batch_req_")
    assert first["response"]["request_id"].startswith("req_")
    assert list(first["response"]["body"]) == [
        "id", "object", "created", "model", "choices", "usage",
    ]  # fmt: skip
    assert first["response"]["body"]["created"] == 1790000000
    assert len({each["id"] for each in got}) == 30
    assert engine.is_closed
    assert [each.seed_key for each in engine.added] == [f"r{i}" for i in range(30)]
    # rows end early and late: the journal is in another order, so order was restored
    order = [each["custom_id"] for each in results(tmp_path / "out.journal")]
    assert order != [each["custom_id"] for each in got]


def test_only_a_window_of_rows_flies(tmp_path: Path) -> None:
    engine = FakeEngine(capacity=5)
    run(options(tmp_path, *[request(f"r{i}") for i in range(60)]), engine)
    assert engine.peak_flying == 10
    wide = FakeEngine(capacity=2)
    run(options(tmp_path, request("w", n=30), request("x"), overwrite=True), wide)
    assert wide.peak_flying == 30


BAD_LINES = [
    ("{oops", None, "invalid_json_line"),
    ({"custom_id": "u", "method": "POST", "url": "/v1/x", "body": {}}, None, "invalid_url"),
    (request("long", COMPLETIONS, prompt="x" * 300), 400, "context_length_exceeded"),
    (request("field", bogus=1), 400, "unsupported_parameter"),
    (request("stream", stream=True), 400, "unsupported_parameter"),
    (request("model", model="other"), 404, "model_not_found"),
    (request("hot", temperature=-1), 400, None),
    (request("vocabulary", COMPLETIONS, prompt=[5, 999]), 400, None),
    (request("second", COMPLETIONS, prompt=[[5], [999]]), 400, None),
]


def test_every_bad_row_gets_its_error_and_the_others_go_on(tmp_path: Path) -> None:
    lines = [bad for bad, _, _ in BAD_LINES]
    engine = FakeEngine()
    job = options(tmp_path, request("a"), *lines, request("b"), error_file=tmp_path / "err")
    summary = run(job, engine)
    assert (summary.ok, summary.refused, summary.failed) == (2, len(BAD_LINES), 0)
    assert [each["custom_id"] for each in results(tmp_path / "out")] == ["a", "b"]
    for got, (_, status, code) in zip(results(tmp_path / "err"), BAD_LINES, strict=True):
        if status is None:
            assert got["response"] is None
            assert got["error"]["code"] == code
        else:
            assert got["error"] is None
            assert got["response"]["status_code"] == status
            assert got["response"]["body"]["error"]["code"] == code
            assert got["response"]["body"]["error"]["type"] == "invalid_request_error"
    # nor was the good half of the row whose other prompt is bad
    assert [each.seed_key for each in engine.added] == ["a", "b"] and not engine.aborted
    rerun = run(replace(job, overwrite=False))
    assert rerun.rows_before == 2 + len(BAD_LINES)  # what is refused stays refused


def test_a_bug_in_one_row_does_not_end_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()

    def encode(
        text: str, *, add_special_tokens: bool = True, at_most: int | None = None
    ) -> list[int]:
        if "b" in text:
            raise ZeroDivisionError("surprise")
        return [1, 2]

    monkeypatch.setattr(engine.tokenizer, "encode", encode)
    rows = [request(name, COMPLETIONS, prompt=name) for name in "abc"]
    summary = run(options(tmp_path, *rows), engine)
    assert (summary.ok, summary.failed) == (2, 1)
    error = results(tmp_path / "out")[1]["error"]
    assert error == {"code": "internal_error", "message": "ZeroDivisionError: surprise"}


def test_completion_rows_with_several_prompts_draw_different_numbers(tmp_path: Path) -> None:
    engine = FakeEngine()
    run(options(tmp_path, request("p", COMPLETIONS, prompt=["same", "same"], n=2)), engine)
    choices = results(tmp_path / "out")[0]["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in choices}) == 4
    assert [each.seed_key for each in engine.added] == ["p", "p#1"]


def test_stopping_and_resuming_recomputes_nothing_and_changes_no_byte(tmp_path: Path) -> None:
    lines = [request(f"r{i}", max_tokens=3 + 4 * (i % 5)) for i in range(40)]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run(options(one, *lines))
    added = 0
    done = 0
    for stop in (1, 7, 8, 25):
        engine = FakeEngine()
        summary = run(options(two, *lines), engine, stop_after=stop)
        assert not summary.is_complete
        assert not (two / "out").exists()
        assert summary.rows_before == done
        done = summary.ok
        assert stop <= done < 40
        added += len(engine.added)
    engine = FakeEngine()
    log = Log()
    # a later `created` is not used: the job's own is
    assert run(options(two, *lines, created=5), engine, log=log).is_complete
    assert log.said[0] == f"resuming {two / 'out'}: {done} of 40 rows done"
    assert (one / "out").read_bytes() == (two / "out").read_bytes()
    # at most what was in flight at each stop was computed twice
    assert added + len(engine.added) <= 40 + 4 * 2 * engine.capacity


def test_results_of_another_input_are_not_left_out_silently(tmp_path: Path) -> None:
    run(options(tmp_path, *(request(f"r{i}", max_tokens=3) for i in range(5))))
    log = Log()
    run(options(tmp_path, request("other", max_tokens=3)), FakeEngine(), log=log)
    assert any(line.startswith("5 results in ") and "will be without" in line for line in log.said)
    assert len((tmp_path / "out").read_bytes().splitlines()) == 1


def test_a_resume_on_another_day_renders_the_same_prompts(tmp_path: Path) -> None:
    prompts = []
    for created in (1790000000, 1790000000 + 86400):
        engine = FakeEngine()
        engine.tokenizer.tells_time = True
        job = options(tmp_path, *[request(f"r{i}") for i in range(30)], created=created)
        run(job, engine, stop_after=3)
        prompts += [bytes(each.prompt_token_ids) for each in engine.added]
    assert len(prompts) > 6
    assert all(b"<1790000000>" in prompt for prompt in prompts)


def test_a_finished_job_loads_no_model_and_writes_the_output_again(tmp_path: Path) -> None:
    job = options(tmp_path, request("a"), request("b"))
    run(job)
    before = (tmp_path / "out").read_bytes()
    (tmp_path / "out").unlink()
    engine = FakeEngine()
    summary = run(job, engine)
    assert summary.stats is None and summary.rows_before == 2
    assert engine.added == [] and not engine.is_closed
    assert (tmp_path / "out").read_bytes() == before


def test_edited_added_and_removed_rows(tmp_path: Path) -> None:
    run(options(tmp_path, request("keep"), request("edit"), request("drop")))
    engine = FakeEngine()
    run(options(tmp_path, request("edit", max_tokens=3), request("new"), request("keep")), engine)
    assert [each.seed_key for each in engine.added] == ["edit", "new"]
    got = results(tmp_path / "out")
    assert [each["custom_id"] for each in got] == ["edit", "new", "keep"]
    assert got[0]["response"]["body"]["usage"]["completion_tokens"] <= 3


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    job = options(tmp_path, request("a"), request("b"))
    run(job)
    with pytest.raises(UsageError, match=r"seed: the job has 0, now 3"):
        run(replace(job, identity={"seed": 3}))
    with pytest.raises(UsageError, match=r"max_model_len: the job has 256, now 99"):
        run(replace(job, max_model_len=99))
    more = options(tmp_path, request("a"), request("b"), request("c"))
    with pytest.raises(UsageError, match="checkpoint: the job has 'fake', now 'other'"):
        run(more, FakeEngine(fingerprint="other"))
    with pytest.raises(UsageError, match="max_model_len: the job has 256, now 200"):
        run(more, FakeEngine(max_model_len=200))
    assert results(tmp_path / "out")[1]["custom_id"] == "b"  # refusals changed nothing
    assert run(replace(more, recorded={"threads": 2})).rows_before == 2
    assert run(replace(more, identity={"seed": 3}, overwrite=True)).rows_before == 0


def test_a_resume_keeps_the_context_length_of_the_job(tmp_path: Path) -> None:
    asked: list[int | None] = []

    class Opens:
        def open(self, max_model_len: int | None, left: LeftRows) -> FakeEngine:
            asked.append(max_model_len)
            return FakeEngine(max_model_len=max_model_len or 180)

    job, log = options(tmp_path, request("a")), Log()
    run_job(job, Opens(), progress=log, stopping=StopAfter(None, log))
    more = options(tmp_path, request("a"), request("b"))
    assert run_job(more, Opens(), progress=log, stopping=StopAfter(None, log)).is_complete
    assert asked == [None, 180]


def test_outputs_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    job = options(tmp_path, request("a"))
    (tmp_path / "out").write_text("precious\n")
    with pytest.raises(UsageError, match="--overwrite replaces it"):
        run(job)
    assert (tmp_path / "out").read_text() == "precious\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    run(replace(job, overwrite=True))
    (tmp_path / "out.manifest.json").unlink()
    with pytest.raises(JobError, match="without out.manifest.json"):
        run(job)


@pytest.mark.parametrize(
    "changes",
    [
        {"output_file": Path("in")},
        {"error_file": Path("out")},
        {"error_file": Path("out.journal")},
        {"output_file": Path("nowhere/out")},
        {"output_file": Path(".")},
        {"trace_file": Path("in")},
        {"trace_file": Path("out")},
        {"trace_file": Path("out.tmp")},
        {"routing_trace_file": Path("in")},
        {"trace_file": Path("t"), "routing_trace_file": Path("t")},
        {"error_file": Path("out.tmp")},
        {"error_file": Path("out.manifest.json.tmp")},
    ],
)
def test_impossible_files(tmp_path: Path, changes: dict[str, Path]) -> None:
    placed = {name: tmp_path / path for name, path in changes.items()}
    with pytest.raises(UsageError, match="file|journal|trace|manifest"):
        run(options(tmp_path, request("a"), **placed))
    assert json.loads((tmp_path / "in").read_text()) == request("a")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def fail(job: JobOptions, error: Exception) -> None:
    """Runs a job whose engine does not open."""

    class Fails:
        def open(self, max_model_len: int | None, left: LeftRows) -> FakeEngine:
            raise error

    log = Log()
    run_job(job, Fails(), progress=log, stopping=StopAfter(None, log))


def test_a_model_that_does_not_load_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such model"):
        fail(options(tmp_path, request("a")), UsageError("no such model"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_overwriting_ends_the_old_job_only_once_the_model_is_loaded(tmp_path: Path) -> None:
    lines = [request(f"r{i}") for i in range(20)]
    job = options(tmp_path, *lines)
    done = run(job, stop_after=5).ok
    before = (tmp_path / "out.journal").read_bytes()

    other = replace(job, identity={"seed": 3}, overwrite=True)
    with pytest.raises(BudgetError):
        fail(other, BudgetError("too little memory"))
    assert (tmp_path / "out.journal").read_bytes() == before
    assert run(job, stop_after=0).rows_before == done > 0
    summary = run(other)
    assert (summary.rows_before, summary.ok) == (0, 20)
    assert len(results(tmp_path / "out.journal")) == 20


def test_an_empty_file_is_a_finished_job(tmp_path: Path) -> None:
    summary = run(options(tmp_path, "", ""))
    assert summary.is_complete and summary.rows == 0
    assert (tmp_path / "out").read_bytes() == b""
    assert not (tmp_path / "out.journal").exists()


def test_an_input_that_became_empty_keeps_the_results_for_when_it_comes_back(
    tmp_path: Path,
) -> None:
    run(options(tmp_path, request("a"), request("b")))
    engine = FakeEngine()
    summary = run(options(tmp_path, "", ""), engine)
    assert summary.is_complete and summary.rows == 0
    assert (tmp_path / "out").read_bytes() == b""
    assert run(options(tmp_path, request("a"), request("b")), engine).rows_before == 2
    assert engine.added == [] and len(results(tmp_path / "out")) == 2


def test_failures_are_retried_then_reported_then_run_again_on_a_resume(tmp_path: Path) -> None:
    rows = [request(name, COMPLETIONS, prompt=f"{name}") for name in ("good", "once", "never")]
    engine = FakeEngine(fail_prompts={"once": 1, "never": 99})
    job = options(tmp_path, *rows)
    summary = run(job, engine)
    assert (summary.ok, summary.failed) == (2, 1)
    got = results(tmp_path / "out")
    assert got[1]["response"]["status_code"] == 200
    assert got[2]["response"] is None
    assert got[2]["error"]["code"] == "request_failed"
    assert "after 3 attempts: a fault on purpose" in got[2]["error"]["message"]
    assert sum(each.seed_key == "never" for each in engine.added) == 3
    kept = FakeEngine()
    assert run(replace(job, retry_failed=False), kept).failed == 1
    assert kept.added == []
    retried = FakeEngine()
    assert run(job, retried).ok == 3
    assert [each.seed_key for each in retried.added] == ["never"]


def test_what_would_fail_again_is_not_tried_again(tmp_path: Path) -> None:
    rows = [request("good"), request("bad", COMPLETIONS, prompt=["bad", "also"], max_tokens=3)]
    for code, state in ((NOTHING_ALLOWED, "refused"), (NOT_FINITE, "failed")):
        engine = FakeEngine(fail_prompts={"bad": 9}, error_code=code)
        summary = run(options(tmp_path, *rows, overwrite=True), engine)
        assert (summary.ok, getattr(summary, state)) == (1, 1)
        assert [each.seed_key for each in engine.added] == ["good", "bad", "bad#1"]
        got = results(tmp_path / "out")[1]
        error = got["error"] or got["response"]["body"]["error"]
        assert (error["code"], error["message"]) == (code, "a fault on purpose")
        if state == "refused":
            assert got["response"]["status_code"] == 400


def test_a_failing_prompt_takes_its_row_along(tmp_path: Path) -> None:
    row = request("p", COMPLETIONS, prompt=["bad", "a much longer one"], max_tokens=1)
    engine = FakeEngine(fail_prompts={"bad": 9}, capacity=1)
    assert run(options(tmp_path, row, request("q"), max_retries=0), engine).ok == 1
    assert len(results(tmp_path / "out")) == 2
    assert not engine.has_work


class BrokenEngine(FakeEngine):
    def step(self) -> StepResult:
        if self.stats().passes == 3:
            raise OSError(5, "weights vanished")
        return super().step()


def test_a_broken_engine_ends_the_job_and_loses_nothing(tmp_path: Path) -> None:
    job = options(tmp_path, *[request(f"r{i}", max_tokens=3 + i) for i in range(20)])
    engine = BrokenEngine()
    with pytest.raises(OSError, match="vanished"):
        run(job, engine)
    assert engine.is_closed
    assert run(job).rows_before > 0


def test_no_reader_splits_a_result_line() -> None:
    text = "a\u2028b\u2029c\x85d\ne\x1cf"
    line = result_line({"text": text})
    assert len(line.decode().splitlines()) == 1
    assert json.loads(line) == {"text": text}


class InstantEngine(FakeEngine):
    """Finishes everything at once and remembers nothing."""

    waiting: tuple[Request, ...] = ()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting)

    def add(self, request: Request) -> None:
        self.waiting += (request,)

    def step(self) -> StepResult:
        waiting, self.waiting = self.waiting, ()
        choice = CompletionOutput(index=0, text="y" * 1000, token_ids=(1,), finish_reason="stop")
        return StepResult(
            tuple(
                RequestOutput(
                    request_id=request.request_id,
                    prompt=None,
                    prompt_token_ids=request.prompt_token_ids,
                    outputs=(choice,),
                )
                for request in waiting
            ),
            (),
        )


def test_memory_does_not_grow_with_the_bodies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows = 2500
    with (tmp_path / "in").open("w") as file:
        for i in range(num_rows):
            row = request(f"r{i}", COMPLETIONS, prompt=f"{i} " + "x" * 1500)
            file.write(json.dumps(row) + "\n")
    engine = InstantEngine()
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text, **_: [1, 2])
    progress = LineProgress(io.StringIO())
    tracemalloc.start()
    with progress:
        summary = run_job(
            options(tmp_path), Source(engine), progress=progress, stopping=StopAfter(None, Log())
        )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert summary.ok == num_rows
    assert (tmp_path / "in").stat().st_size > 3.5e6
    assert peak < 1.5e6


# --- progress ---


def snapshot(done: int, **stats: Any) -> Snapshot:
    plain = FakeEngine().stats()
    return Snapshot(
        rows=10, rows_done=done, rows_before=2, rows_failed=1, stats=replace(plain, **stats)
    )


def test_meter_says_rates_shares_and_what_is_left() -> None:
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    meter.note = "no pass has ended yet"
    assert meter.text() == "no pass has ended yet"
    now[0] = 1000.0  # what came before the first row does not count
    meter.add(snapshot(2))
    assert "ETA unknown" in meter.text() and "hits -" in meter.text()
    now[0] = 1010.0
    meter.add(
        snapshot(6, generated_tokens=50, weights=replace(fake_store_stats(1), bytes_read=20 << 20))
    )
    assert meter.text() == (
        "rows 6/10 (1 with errors), 5.0 tokens/s, disk 2.00 MiB/s, hits 75 %, ETA 10 s"
    )
    now[0] = 1100.0
    meter.add(snapshot(6, generated_tokens=50))
    now[0] = 1101.0
    meter.add(snapshot(6, generated_tokens=50))
    assert " 0.0 tokens/s" in meter.text()  # old rates are forgotten


def test_the_scan_of_a_large_input_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("windlass.batch.jobfile._TELL_EVERY_S", 0.0)
    log = Log()
    run(options(tmp_path, request("a"), request("b")), log=log)
    size = (tmp_path / "in").stat().st_size
    assert log.notes == [
        f"scanning {tmp_path / 'in'}: 0 lines, 0 B of {size} B",
        f"scanning {tmp_path / 'in'}: 1 lines, {size // 2} B of {size} B",
        "getting ready",
        "no pass has ended yet",
    ]
    for kind in (LineProgress, TerminalProgress):
        stream = io.StringIO()
        progress = kind(stream)
        progress.note("scanning [it]: 7 lines")
        assert progress._meter.text() == "scanning [it]: 7 lines"
    stream = io.StringIO()
    with LineProgress(stream, every_s=0.02) as progress:
        progress.note("scanning in: 7 lines")
        deadline = time.monotonic() + 120
        while not stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert stream.getvalue().startswith("scanning in: 7 lines\n")


def test_plain_lines_come_while_the_job_is_busy() -> None:
    stream = io.StringIO()
    with LineProgress(stream, every_s=0.02) as progress:
        progress.update(snapshot(6))
        deadline = time.monotonic() + 120
        while stream.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("rows 6/10") for line in lines)
    assert isinstance(open_progress(io.StringIO()), LineProgress)


def test_a_terminal_gets_one_live_line() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = open_progress(stream)
    assert isinstance(progress, TerminalProgress)
    with progress:
        progress.say("hello [x]")
        progress.update(snapshot(6))
    assert "hello [x]" in stream.getvalue()
    assert "rows 6/10" in stream.getvalue()


def test_rows_of_responses_are_whole_and_the_same_in_every_run(tmp_path: Path) -> None:
    body = {"input": "hello", "max_output_tokens": 9, "instructions": "be brief"}
    wrong = {**body, "stream": True}
    rows = [
        {"custom_id": name, "method": "POST", "url": "/v1/responses", "body": own}
        for name, own in (("a", body), ("b", wrong), ("c", {**body, "previous_response_id": "x"}))
    ]
    summary = run(options(tmp_path, *rows))
    assert (summary.ok, summary.refused) == (1, 2)
    good, streamed, follows = results(tmp_path / "out")
    answer = good["response"]["body"]
    assert answer["object"] == "response" and answer["created_at"] == 1790000000
    assert answer["status"] in ("completed", "incomplete") and answer["store"] is False
    assert answer["output"][0]["content"][0]["text"]
    assert streamed["response"]["body"]["error"]["param"] == "stream"
    assert follows["response"]["body"]["error"]["param"] == "previous_response_id"
    before = (tmp_path / "out").read_bytes()
    run(options(tmp_path, overwrite=True))
    assert (tmp_path / "out").read_bytes() == before

"""`/v1/batches`: without a network on an engine without a model, and killed as a process."""

import errno
import json
import os
import random
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from data_server import BOUNDARY, IDENTITY, DataServer, data_server, form, jobs, rows, serve_fake
from fake_engine import FakeEngine
from processes import PATIENCE_S, forked
from windlass.batch.job import run_job
from windlass.batch.journal import Journal
from windlass.batch.progress import LineProgress

TIMES = (
    "in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at",
    "cancelled_at",
)  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DataServer]:
    with data_server(tmp_path / "data") as found:
        yield found


def of_run_batch(folder: Path, content: bytes, created: int) -> tuple[bytes, bytes]:
    """What `run-batch` makes of the same file: results, errors."""

    class Opens:
        def open(self, max_model_len: object, left: object) -> FakeEngine:
            return FakeEngine()

        def is_stopping(self) -> bool:
            return False

    (folder / "in").write_bytes(content)
    out, bad = folder / "out", folder / "bad"
    job = replace(
        jobs(IDENTITY), input_file=folder / "in", output_file=out, error_file=bad, created=created
    )
    with open(os.devnull, "w") as nowhere:
        run_job(job, Opens(), progress=LineProgress(nowhere), stopping=Opens())
    return out.read_bytes(), bad.read_bytes()


def content_of(server: DataServer, file_id: str) -> bytes:
    return b"".join(server.ask("GET", f"/v1/files/{file_id}/content").pieces)


def test_a_batch_from_its_creation_to_its_files(server: DataServer, tmp_path: Path) -> None:
    bad = b'{"custom_id":"no","method":"POST","url":"/v1/completions","body":{"prompt":[]}}\n'
    content = rows(30) + bad
    made = server.create(content, metadata={"for": "a test"})
    assert made["status"] == "validating" and made["object"] == "batch"
    assert made["errors"] is None and made["output_file_id"] is None
    assert [made[name] for name in TIMES] == [None] * len(TIMES)
    assert made["expires_at"] == made["created_at"] + 86400
    assert made["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    checked = server.wait(made["id"], "in_progress")  # with no model yet
    assert checked["request_counts"]["total"] == 31
    server.load(FakeEngine())
    done = server.wait(made["id"], "completed")
    assert done["request_counts"] == {"total": 31, "completed": 30, "failed": 1}
    assert done["metadata"] == {"for": "a test"} and done["model"] == "fake"
    for name in ("in_progress_at", "finalizing_at", "completed_at"):
        assert done["created_at"] <= done[name] <= time.time()
    out, errors = of_run_batch(tmp_path, content, made["created_at"])
    assert content_of(server, done["output_file_id"]) == out
    assert content_of(server, done["error_file_id"]) == errors
    file = server.ask("GET", f"/v1/files/{done['output_file_id']}").json
    assert (file["purpose"], file["bytes"]) == ("batch_output", len(out))
    assert not (tmp_path / "data/batches" / made["id"]).exists()
    stats = server.ask("GET", "/v1/stats").json["batches"]
    assert stats["by_status"]["completed"] == 1 and stats["rows"]["left"] == 0


def test_a_batch_without_errors_has_no_file_of_them(server: DataServer) -> None:
    server.load(FakeEngine())
    done = server.wait(server.create(rows(3))["id"], "completed")
    assert done["error_file_id"] is None and len(server.lines(done["output_file_id"])) == 3
    refused = b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{}}\n'
    none = server.wait(server.create(refused)["id"], "completed")
    assert none["output_file_id"] is None
    (line,) = server.lines(none["error_file_id"])
    assert line["custom_id"] == "a" and line["response"]["status_code"] == 400


@pytest.mark.parametrize(
    ("content", "line", "code"),
    [
        (rows(2) + b"{torn\n", 3, "invalid_json_line"),
        (rows(2) + rows(1), 3, "duplicate_custom_id"),
        (b"\n" + rows(1).replace(b"POST", b"GET"), 2, "invalid_method"),
        (rows(1).replace(b"completions", b"chat/completions"), 1, "invalid_url"),
        (b"\n\n", 1, "empty_file"),
    ],
)
def test_a_file_that_is_no_batch_fails_it_and_says_where(
    server: DataServer, content: bytes, line: int, code: str
) -> None:
    failed = server.wait(server.create(content)["id"], "failed")
    assert failed["failed_at"] is not None and failed["output_file_id"] is None
    assert failed["errors"]["object"] == "list"
    (error,) = failed["errors"]["data"]
    assert (error["line"], error["code"], error["param"]) == (line, code, None)
    assert error["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"input_file_id": 3}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": None}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "\ud800"}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}},
         "output_expires_after.seconds"),
        ({"priority": 1}, "priority"),
    ],
)  # fmt: skip
def test_wishes_that_are_refused(server: DataServer, changes: dict[str, Any], param: str) -> None:
    file = server.upload(rows(1)).json["id"]
    wish = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    answered = server.ask("POST", "/v1/batches", {**wish, **changes})
    assert answered.status == 400 and answered.json["error"]["param"] == param
    other = server.send_form([form(rows(1), purpose="user_data")]).json["id"]
    answered = server.ask("POST", "/v1/batches", {**wish, "input_file_id": other})
    assert "allowed a file with purpose 'batch'" in answered.json["error"]["message"]
    assert server.ask("GET", "/v1/batches").json["data"] == []
    for path in ("/v1/batches/nobody", "/v1/batches/../lock"):
        assert server.ask("GET", path).status == 404


def test_batches_run_one_after_the_other_and_are_listed_newest_first(server: DataServer) -> None:
    ids = [server.create(rows(4))["id"] for _ in range(3)]
    engine = FakeEngine()
    server.load(engine)
    for batch_id in ids:
        server.wait(batch_id, "completed")
    order = [each.request_id.split(".")[0] for each in engine.added]
    assert order == [batch_id for batch_id in ids for _ in range(4)]
    assert all(each.is_batch for each in engine.added)
    page = server.ask("GET", "/v1/batches?limit=2").json
    assert [one["id"] for one in page["data"]] == ids[:0:-1] and page["has_more"] is True
    rest = server.ask("GET", f"/v1/batches?after={page['last_id']}").json
    assert [one["id"] for one in rest["data"]] == ids[:1] and rest["has_more"] is False
    assert server.ask("GET", "/v1/batches?limit=101").status == 400


def test_the_file_of_a_batch_stays_while_it_runs(server: DataServer) -> None:
    batch = server.create(rows(2))
    where = f"/v1/files/{batch['input_file_id']}"
    refused = server.ask("DELETE", where)
    assert refused.status == 400 and batch["id"] in refused.json["error"]["message"]
    server.load(FakeEngine())
    server.wait(batch["id"], "completed")
    assert server.ask("DELETE", where).json["deleted"] is True


def wait_for_rows(server: DataServer, batch_id: str, number: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while server.batch(batch_id)["request_counts"]["completed"] < number:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_batch_that_is_cancelled_keeps_what_has_ended(server: DataServer) -> None:
    engine = FakeEngine(step_s=0.01)
    server.load(engine)
    first, second = server.create(rows(300)), server.create(rows(2))
    wait_for_rows(server, first["id"], 10)
    answered = server.ask("POST", f"/v1/batches/{first['id']}/cancel").json
    assert answered["status"] == "cancelling" and answered["cancelling_at"] is not None
    gone = server.wait(first["id"], "cancelled")
    counts, kept = gone["request_counts"], server.lines(gone["output_file_id"])
    assert counts["total"] == 300 == counts["completed"] + counts["failed"]
    assert 10 <= len(kept) == counts["completed"] < 300
    left = server.lines(gone["error_file_id"])
    assert {one["error"]["code"] for one in left} == {"batch_cancelled"}
    assert sorted(one["custom_id"] for one in kept + left) == sorted(f"r{i}" for i in range(300))
    server.wait(second["id"], "completed")
    deadline = time.monotonic() + PATIENCE_S
    while engine.has_work and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.has_work  # what was given up is no longer computed
    again = server.ask("POST", f"/v1/batches/{first['id']}/cancel")
    assert again.status == 400 and "status 'cancelled'" in again.json["error"]["message"]
    assert server.ask("POST", "/v1/batches/nobody/cancel").status == 404


def test_a_batch_that_waits_is_cancelled_at_once(server: DataServer) -> None:
    batch = server.create(rows(3))
    server.wait(batch["id"], "in_progress")
    server.ask("POST", f"/v1/batches/{batch['id']}/cancel")
    gone = server.wait(batch["id"], "cancelled")
    assert gone["output_file_id"] is None and len(server.lines(gone["error_file_id"])) == 3


def test_a_batch_whose_time_is_over_keeps_what_has_ended(server: DataServer) -> None:
    server.load(FakeEngine(step_s=0.01))
    batch = server.create(rows(300), output_expires_after={"anchor": "created_at", "seconds": 3600})
    wait_for_rows(server, batch["id"], 5)
    book = server.data.book
    with book.changed:
        book._batches[batch["id"]] = replace(book._batches[batch["id"]], expires_at=0)
    over = server.wait(batch["id"], "expired")
    assert over["expired_at"] is not None and over["completed_at"] is None
    left = server.lines(over["error_file_id"])
    assert {one["error"]["code"] for one in left} == {"batch_expired"}
    assert len(server.lines(over["output_file_id"])) + len(left) == 300
    file = server.ask("GET", f"/v1/files/{over['output_file_id']}").json
    assert file["expires_at"] == file["created_at"] + 3600


def test_stopping_a_server_stops_at_a_row_and_the_next_goes_on(tmp_path: Path) -> None:
    content = rows(400)
    computed = 0
    with data_server(tmp_path / "data") as server:
        engine = FakeEngine(step_s=0.005)
        server.load(engine)
        batch = server.create(content)
        wait_for_rows(server, batch["id"], 12)
        server.data.worker.stop()
        assert server.batch(batch["id"])["status"] == "in_progress"
        computed += len(engine.added)
    with data_server(tmp_path / "data") as server:
        engine = FakeEngine()
        server.load(engine)
        done = server.wait(batch["id"], "completed")
        computed += len(engine.added)
        assert any("of 400 rows done" in line for line in server.said)
        out, _ = of_run_batch(tmp_path, content, batch["created_at"])
        assert content_of(server, done["output_file_id"]) == out
    assert computed <= 400 + 2 * 4  # the window that was under way


def test_other_settings_hold_a_batch_up_until_the_old_ones_are_back(tmp_path: Path) -> None:
    with data_server(tmp_path / "data") as server:
        server.load(FakeEngine(step_s=0.01))
        batches = [server.create(rows(100)), server.create(rows(100))]
        wait_for_rows(server, batches[0]["id"], 5)
    first, second = (batch["id"] for batch in batches)
    with data_server(tmp_path / "data") as server:
        server.load(FakeEngine(), {"seed": 3})
        server.wait(second, "completed")  # has no row of other settings
        held = server.wait(first, "in_progress")
        assert held["errors"]["data"][0]["code"] == "held"
        assert "seed: the job has 0, now 3" in held["errors"]["data"][0]["message"]
        assert any("held up" in line for line in server.said)
    with data_server(tmp_path / "data") as server:
        server.load(FakeEngine())
        done = server.wait(first, "completed")
        assert done["errors"] is None and done["request_counts"]["completed"] == 100


def test_what_other_settings_hold_up_can_still_be_cancelled(tmp_path: Path) -> None:
    with data_server(tmp_path / "data") as server:
        server.load(FakeEngine(step_s=0.01))
        batch = server.create(rows(100))
        wait_for_rows(server, batch["id"], 5)
    with data_server(tmp_path / "data") as server:
        server.load(FakeEngine(), {"seed": 3})
        deadline = time.monotonic() + PATIENCE_S
        while not server.batch(batch["id"])["errors"] and time.monotonic() < deadline:
            time.sleep(0.01)
        server.ask("POST", f"/v1/batches/{batch['id']}/cancel")
        gone = server.wait(batch["id"], "cancelled")
        assert gone["request_counts"]["completed"] >= 5 and gone["errors"] is None


def test_a_full_disk_holds_a_batch_up_and_loses_nothing(
    server: DataServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Journal._write

    def full(self: Journal, data: bytes) -> None:
        if self.size_bytes > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr("windlass.server.batch_worker._AGAIN_S", 0.3)
    monkeypatch.setattr("windlass.server.batch_worker._LOOK_S", 0.05)
    monkeypatch.setattr(Journal, "_write", full)
    server.load(FakeEngine())
    content = rows(40)
    batch = server.create(content)
    deadline = time.monotonic() + PATIENCE_S
    while not (held := server.batch(batch["id"]))["errors"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "no room left" in held["errors"]["data"][0]["message"]
    assert held["status"] == "in_progress"
    assert sum("no room left" in line for line in server.said) == 1
    monkeypatch.setattr(Journal, "_write", write)
    done = server.wait(batch["id"], "completed")
    out, _ = of_run_batch(tmp_path, content, batch["created_at"])
    assert content_of(server, done["output_file_id"]) == out


class BrokenEngine(FakeEngine):
    def step(self) -> Any:
        if self.stats().passes == 5:
            raise OSError(5, "weights vanished")
        return super().step()


def test_an_engine_that_fails_loses_no_row(tmp_path: Path) -> None:
    with data_server(tmp_path / "data") as server:
        server.load(BrokenEngine())
        batch = server.create(rows(40))
        deadline = time.monotonic() + PATIENCE_S
        while not server.batch(batch["id"])["errors"] and time.monotonic() < deadline:
            time.sleep(0.01)
        held = server.batch(batch["id"])
        assert held["status"] == "in_progress"
        assert "weights vanished" in held["errors"]["data"][0]["message"]
    with data_server(tmp_path / "data") as server:
        server.load(FakeEngine())
        assert server.wait(batch["id"], "completed")["request_counts"]["completed"] == 40


def test_others_do_not_wait_for_a_batch(server: DataServer) -> None:
    server.load(FakeEngine(step_s=0.01))
    batch = server.create(rows(400))
    wait_for_rows(server, batch["id"], 4)
    stats = server.ask("GET", "/v1/stats").json
    assert 0 < stats["running_batch"] == stats["running"]
    metrics = b"".join(server.ask("GET", "/metrics").pieces).decode()
    assert 'windlass:batches{model_name="fake",status="in_progress"} 1.0' in metrics
    found = re.search(r'num_batch_requests_running\{model_name="fake"\} (\d+)', metrics)
    assert found is not None and int(found[1]) > 0
    answered = server.ask("POST", "/v1/completions", {"prompt": "now", "max_tokens": 3})
    assert answered.status == 200
    assert server.batch(batch["id"])["status"] == "in_progress"


# --- as a process ---------------------------------------------------------------------------------


class Process:
    """`windlass serve` with the fake engine, spoken to over a socket."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self.process = process
        deadline = time.monotonic() + PATIENCE_S
        while not log.exists() or "\nready" not in log.read_text():
            assert process.is_alive() and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        found = re.search(r"listening at http://127.0.0.1:(\d+)", log.read_text())
        assert found is not None
        self.port = int(found[1])

    def ask(self, path: str, data: bytes | None = None, kind: str = "application/json") -> bytes:
        url = f"http://127.0.0.1:{self.port}{path}"
        asked = urllib.request.Request(url, data, {"content-type": kind})
        with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answered:
            found: bytes = answered.read()
            return found


@contextmanager
def serving(folder: Path, log: str) -> Iterator[Process]:
    with forked(serve_fake, str(folder), log) as process:
        yield Process(process, folder / log)


def test_kill_9_at_any_moment_loses_doubles_and_changes_no_row(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    content, chance = rows(100, n=2), random.Random(3)
    journal = Path()
    for kill in range(3):
        with serving(tmp_path, f"log{kill}") as server:
            if kill == 0:
                kind = f"multipart/form-data; boundary={BOUNDARY}"
                file = json.loads(server.ask("/v1/files", form(content, purpose="batch"), kind))
                wish = {
                    "input_file_id": file["id"],
                    "endpoint": "/v1/completions",
                    "completion_window": "24h",
                }
                batch = json.loads(server.ask("/v1/batches", json.dumps(wish).encode()))
                journal = tmp_path / "data/batches" / batch["id"] / "output.jsonl.journal"
            deadline = time.monotonic() + PATIENCE_S
            while not journal.exists() or journal.read_bytes().count(b"\n") < 8 + 16 * kill:
                assert time.monotonic() < deadline, "the batch did not get there"
                time.sleep(0.005)
            time.sleep(chance.random() * 0.05)
            server.process.kill()
            server.process.join()
        assert 0 < journal.read_bytes().count(b"\n") < 100
    with serving(tmp_path, "log") as server:
        with forked(serve_fake, str(tmp_path), "second") as second:
            second.join(PATIENCE_S)
            assert second.exitcode == 2
        assert (tmp_path / "second").read_text().splitlines()[-1] == (
            "windlass: data folder: got 'data', which another server is using; --data-dir gives "
            "this one its own"
        )
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = json.loads(server.ask(f"/v1/batches/{batch['id']}"))
            if found["status"] == "completed":
                break
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        assert found["request_counts"] == {"total": 100, "completed": 100, "failed": 0}
        got = server.ask(f"/v1/files/{found['output_file_id']}/content")
        assert server.process.pid is not None
        os.kill(server.process.pid, signal.SIGTERM)
        server.process.join(PATIENCE_S)
        assert server.process.exitcode == 0
    out, _ = of_run_batch(tmp_path, content, batch["created_at"])
    assert got == out

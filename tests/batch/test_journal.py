"""The journal survives torn writes, damage, full disks and rivals; the ledger finds its rows."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from windlass.batch.jobfile import JobFile
from windlass.batch.journal import Journal, JournalState
from windlass.batch.ledger import Ledger
from windlass.batch.manifest import Manifest, refuse_difference
from windlass.errors import JobError, UsageError
from windlass.options import checkpoint_stamp

DIGESTS = [bytes([i]) * 16 for i in range(9)]
LINE = b'{"id":"x","error":null}\n'


def fill(path: Path, num_records: int = 3) -> list[int]:
    """Ends of the records in bytes."""
    ends = []
    with Journal(path) as journal:
        for i in range(num_records):
            record = journal.append(DIGESTS[i], JournalState.OK, b'{"row":%d}\n' % i)
            ends.append(record.offset + record.length)
    return ends


def test_records_come_back_and_are_result_lines(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        written = [
            journal.append(DIGESTS[0], JournalState.OK, LINE),
            journal.append(
                DIGESTS[1], JournalState.FAILED, b'{"text":",\\"journal\\":{\\"row\\":"}\n'
            ),
        ]
        assert list(journal.records()) == written
        assert journal.result(written[0].offset, written[0].length) == LINE
    with Journal(path) as journal:
        assert list(journal.records()) == written
        last = journal.result(written[1].offset, written[1].length)
        assert json.loads(last) == {"text": ',"journal":{"row":'}
    documents = [json.loads(text) for text in path.read_text().splitlines()]
    assert documents[0]["error"] is None
    assert documents[1]["journal"]["state"] == "failed"


def test_a_journal_cut_at_any_byte_keeps_every_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "j"
    ends = fill(path)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with Journal(path) as journal:
            num_whole = sum(end <= size for end in ends)
            assert len(list(journal.records())) == num_whole
            assert path.stat().st_size == journal.size_bytes == ([0, *ends])[num_whole]
            journal.append(DIGESTS[8], JournalState.OK, LINE)
            assert [r.digest for r in journal.records()] == [*DIGESTS[:num_whole], DIGESTS[8]]


def test_a_damaged_record_is_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "j"
    ends = fill(path)
    data = bytearray(path.read_bytes())
    for place in (ends[0] + 2, ends[0] + 20, ends[1] - 8):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with Journal(path) as journal:
            assert [record.digest for record in journal.records()] == [DIGESTS[0], DIGESTS[2]]
            assert journal.num_damaged == 1


def test_a_torn_tail_longer_than_a_block_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "j"
    ends = fill(path)
    with path.open("ab") as file:
        file.write(b"x" * 200_000)
    with Journal(path) as journal:
        assert journal.size_bytes == ends[-1]
    path.write_bytes(b"x" * 200_000)
    with Journal(path) as journal:
        assert journal.size_bytes == 0


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    code = (
        "import sys; from pathlib import Path; from windlass.batch.journal import Journal\n"
        "Journal(Path(sys.argv[1]))"
    )
    with Journal(path):
        result = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
        )
        assert "another windlass process" in result.stderr
        with pytest.raises(JobError, match="another windlass process"):
            Journal(path)
    Journal(path).__exit__(None, None, None)


def test_syncs_are_bounded_and_happen_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    now = [100.0]
    monkeypatch.setattr(os, "fsync", calls.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Journal(tmp_path / "j") as journal:
        for _ in range(10):
            journal.append(DIGESTS[0], JournalState.OK, LINE)
            journal.sync_if_due()
        assert calls == []
        now[0] += 1.0
        journal.sync_if_due()
        journal.sync_if_due()
        assert len(calls) == 1
        journal.append(DIGESTS[0], JournalState.OK, LINE)
    assert len(calls) == 2


def test_a_full_disk_leaves_a_valid_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with Journal(path) as journal:
            num_written = 0
            with pytest.raises(JobError, match="no room left.*run the same command again"):
                while True:
                    journal.append(DIGESTS[num_written % 9], JournalState.OK, LINE)
                    num_written += 1
            # the torn tail is gone, and what came before is whole
            assert path.stat().st_size == journal.size_bytes
            assert len(list(journal.records())) == num_written > 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    with Journal(path) as journal:
        journal.append(DIGESTS[0], JournalState.OK, LINE)
        assert len(list(journal.records())) == num_written + 1


def test_a_failing_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with Journal(tmp_path / "j") as journal:
        monkeypatch.setattr(os, "write", fail)
        with pytest.raises(JobError, match="write failed"):
            journal.append(DIGESTS[0], JournalState.OK, LINE)


def test_an_empty_journal_can_be_removed_a_full_one_not(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.remove_if_empty()
        assert not path.exists()
    fill(path)
    with Journal(path) as journal:
        journal.remove_if_empty()
        assert path.exists()


# --- ledger ---


def make_job(path: Path, *ids: str) -> JobFile:
    with path.open("w") as file:
        for name in ids:
            request = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {}}
            file.write(json.dumps(request) + "\n")
    return JobFile(path)


def digests(job: JobFile) -> list[bytes]:
    return [row.digest for row in job.rows(np.ones(len(job), bool))]


def test_ledger_finds_rows_wherever_they_moved(tmp_path: Path) -> None:
    job = make_job(tmp_path / "in", *(f"r{i}" for i in range(50)))
    with Journal(tmp_path / "j") as journal:
        ledger = Ledger(job, journal, retry_failed=True)
        for index, digest in reversed(list(enumerate(digests(job)))):
            ledger.add(index, digest, JournalState.OK, b'{"r":%d}\n' % index)
        assert [one[1] for one in ledger.results() if one] == [b'{"r":%d}\n' % i for i in range(50)]
        changed = make_job(tmp_path / "in2", "new", *(f"r{i}" for i in range(49, 9, -1)))
        again = Ledger(changed, journal, retry_failed=True)
        assert again.open_rows.tolist() == [True] + [False] * 40
        assert again.num_before == again.num_done == again.count(JournalState.OK) == 40
        again.add(0, digests(changed)[0], JournalState.REFUSED, b'{"new":1}\n')
        results = list(again.results())
        assert results[0] == (JournalState.REFUSED, b'{"new":1}\n')
        assert results[1] == (JournalState.OK, b'{"r":49}\n')


def test_the_newest_record_counts_and_failed_rows_open_again(tmp_path: Path) -> None:
    job = make_job(tmp_path / "in", "a", "b", "c")
    a, b, c = digests(job)
    with Journal(tmp_path / "j") as journal:
        journal.append(a, JournalState.FAILED, b'{"try":1}\n')
        journal.append(b, JournalState.FAILED, b'{"try":1}\n')
        journal.append(c, JournalState.REFUSED, b'{"try":1}\n')
        journal.append(a, JournalState.OK, b'{"try":2}\n')
        retrying = Ledger(job, journal, retry_failed=True)
        assert retrying.open_rows.tolist() == [False, True, False]
        keeping = Ledger(job, journal, retry_failed=False)
        assert [one[1] for one in keeping.results() if one][0] == b'{"try":2}\n'
        assert keeping.count(JournalState.FAILED) == 1


# --- manifest ---


def test_manifest_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    assert Manifest.read(path) is None
    manifest = Manifest(7, {"seed": 1}, {"model": "x"}, {"threads": 2})
    manifest.write(path)
    assert Manifest.read(path) == manifest
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("{")
    with pytest.raises(JobError, match="not readable as a manifest"):
        Manifest.read(path)
    path.write_text("{}")
    with pytest.raises(JobError, match="not a manifest"):
        Manifest.read(path)
    path.write_text(path.read_text())
    Manifest(7, {}, {}, {}, format=99).write(path)
    with pytest.raises(JobError, match="format 99"):
        Manifest.read(path)


def test_every_difference_is_named() -> None:
    same = {"a": 1, "path": Path("x")}
    refuse_difference({"a": 1, "path": "x"}, same, output=Path("o"))
    with pytest.raises(UsageError) as caught:
        refuse_difference({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4, "d": 5}, output=Path("o"))
    text = str(caught.value)
    assert "b: the job has 2, now 4" in text
    assert "c: the job has 3, now None" in text
    assert "d: the job has None, now 5" in text
    assert "\n  a:" not in text


def test_stamp_sees_weights_and_configuration_but_not_the_folder(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(100_000))
    stamp = checkpoint_stamp(one)
    assert stamp == checkpoint_stamp(two)
    (two / "model.safetensors").write_bytes(bytes(99_999) + b"\1")
    assert stamp != checkpoint_stamp(two)
    (one / "config.json").write_text('{"a": 1}')
    assert stamp != checkpoint_stamp(one)


def test_stamp_sees_all_of_a_long_header(tmp_path: Path) -> None:
    header, weights = bytearray(b" " * 400_000), bytes(3_000_000)
    file = tmp_path / "model.safetensors"
    stamps = set()
    for place in range(0, 400_000, 100_001):
        header[place] = ord("x")
        file.write_bytes(len(header).to_bytes(8, "little") + header + weights)
        stamps.add(checkpoint_stamp(tmp_path))
    assert len(stamps) == 4
    file.write_bytes(b"\xff" * 8 + b"torn")  # no header at all
    assert checkpoint_stamp(tmp_path) not in stamps

"""Finished rows on disk, in completion order, safe against kill -9 and a full disk. A record is a
result line with one more field that identifies the row. Knows no requests and no engine."""

import errno
import fcntl
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType

from windlass.batch.jobfile import DIGEST_BYTES
from windlass.errors import JobError

SYNC_EVERY_S = 1.0
_MARK = b',"journal":{"row":"'
_CRC = b'","crc":"'
_END = b'"}}\n'
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class JournalState(StrEnum):
    """What became of a row. Only `failed` rows run again."""

    OK = "ok"  # 200
    REFUSED = "refused"  # malformed or 4xx: the same every time
    FAILED = "failed"  # something went wrong on our side


@dataclass(frozen=True, slots=True)
class Record:
    """Where the result of one row lies in the journal."""

    digest: bytes
    state: JournalState
    offset: int
    length: int  # with the journal's own field and the newline


class Journal:
    """Append-only, locked while open. A context manager: leaving it syncs and unlocks.

    A torn last record is cut off on opening. Raises JobError if another process holds it or the
    disk refuses a write; what was appended before stays valid.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise JobError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a process that failed early may have deleted the file before it was locked here
            if os.fstat(self._fd).st_nlink == 0:
                raise BlockingIOError(errno.EAGAIN, "deleted meanwhile")
        except OSError as error:
            os.close(self._fd)
            if not isinstance(error, BlockingIOError):
                raise JobError(f"{path}: cannot be locked: {error.strerror}") from error
            raise JobError(
                f"{path}: another windlass process is working on this output; wait for it or stop "
                "it, or choose another output file"
            ) from error
        self._size = os.fstat(self._fd).st_size
        self._synced_size = self._size
        self._synced_at = time.monotonic()
        self.num_damaged = 0  # complete records that were not readable, counted by `records`
        self._cut_torn_tail()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            self.sync()
        finally:
            os.close(self._fd)

    @property
    def size_bytes(self) -> int:
        return self._size

    def append(self, digest: bytes, state: JournalState, line: bytes) -> Record:
        """Adds the result `line`, a JSON object ending in `}` and a newline."""
        assert line.endswith(b"}\n"), "a result is one JSON object"
        head = line[:-2] + _MARK + digest.hex().encode() + b'","state":"' + state.encode()
        record = head + _CRC + b"%08x" % zlib.crc32(head) + _END
        offset = self._size
        try:
            self._write(record)
        except OSError as error:
            self._undo(offset)
            raise self._error(error) from error
        self._size += len(record)
        return Record(digest, state, offset, len(record))

    def sync_if_due(self) -> None:
        """fsync, at most once in `SYNC_EVERY_S`."""
        if time.monotonic() - self._synced_at >= SYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """fsync, if anything was appended since the last one."""
        self._synced_at = time.monotonic()
        if self._synced_size == self._size:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._error(error) from error
        self._synced_size = self._size

    def clear(self) -> None:
        """Forgets every record."""
        os.ftruncate(self._fd, 0)
        os.fsync(self._fd)
        self._size = self._synced_size = 0

    def remove_if_empty(self) -> None:
        """Deletes a file without records, while it is still locked."""
        if self._size == 0:
            self.path.unlink(missing_ok=True)

    def records(self) -> Iterator[Record]:
        """All readable records, oldest first. Of several for one row the last one counts."""
        self.num_damaged = 0
        with self.path.open("rb") as file:
            offset = 0
            for record in file:
                parsed = _parse(record)
                if parsed is None:
                    self.num_damaged += 1
                else:
                    yield Record(parsed[0], parsed[1], offset, len(record))
                offset += len(record)

    def result(self, offset: int, length: int) -> bytes:
        """The result line of a record, without the journal's own field."""
        data = os.pread(self._fd, length, offset)
        end = data.rfind(_MARK)
        if len(data) != length or end < 0:
            raise JobError(f"{self.path}: the record at byte {offset} vanished or was changed")
        return data[:end] + b"}\n"

    def _cut_torn_tail(self) -> None:
        """Whatever follows the last newline is the start of a record that never ended."""
        position = self._size
        step = 1 << 16
        while position > 0:
            start = max(0, position - step)
            newline = os.pread(self._fd, position - start, start).rfind(b"\n")
            position = start if newline < 0 else start + newline + 1
            if newline >= 0:
                break
        if position < self._size:
            os.ftruncate(self._fd, position)
            self._size = position

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def _undo(self, size: int) -> None:
        """Best effort: a torn tail that stays is cut off by the next opening."""
        try:
            os.ftruncate(self._fd, size)
        except OSError:
            return

    def _error(self, error: OSError) -> JobError:
        return write_error(self.path, error)


def write_error(path: Path, error: OSError) -> JobError:
    """What to tell when `path` could not be written."""
    if error.errno in _FULL:
        return JobError(
            f"{path}: no room left ({error.strerror}). Finished rows are safe; make room and run "
            "the same command again"
        )
    return JobError(f"{path}: write failed ({error.strerror}). Finished rows are safe")


def _parse(record: bytes) -> tuple[bytes, JournalState] | None:
    start = record.rfind(_MARK)
    crc_at = record.rfind(_CRC)
    if start < 0 or crc_at < start or not record.endswith(_END):
        return None
    if record[crc_at + len(_CRC) : -len(_END)] != b"%08x" % zlib.crc32(record[:crc_at]):
        return None
    row, _, state = record[start + len(_MARK) : crc_at].partition(b'","state":"')
    if len(row) != 2 * DIGEST_BYTES:
        return None
    return bytes.fromhex(row.decode()), JournalState(state.decode())

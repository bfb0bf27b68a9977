"""The folder that is written: whose it is, what of it is finished. A kill at any moment leaves a
folder that the same command completes to the same bytes. Knows no model and no torch."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from windlass.errors import JobError, UsageError
from windlass.files import replace_file, replacing, temporary_file
from windlass.quantize.shards import TensorPlaces
from windlass.units import MIB, format_bytes

STATE_FILE = "quantize.json"
REPORT_FILE = "quantize-report.jsonl"
_CONFIG_FILE = "config.json"  # written last: without it a folder is no checkpoint
_SPARE_DISK = 64 * MIB  # left free beside the checkpoint
_SYNC_EVERY_S = 1.0  # at most so much work is done again

Record = dict[str, Any]  # of a finished target, as the report has it


class Folder:
    """The folder, locked. `records`: of the targets that are finished, in their order."""

    def __init__(self, path: Path, places: TensorPlaces, names: Sequence[str]) -> None:
        """Of a folder that `prepare` has made. Raises JobError."""
        self._path = path
        self._places = places
        self._names = names
        self._pending: list[Record] = []
        self._shard: tuple[str, int] | None = None  # the file that is open
        self._synced_at = time.monotonic()
        self._lock = _lock(path)
        try:
            with _reporting(path):
                self._report = os.open(path / REPORT_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            self.records = self._read_records()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> "Folder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        """Keeps what is finished, also where something failed; but an error here hides no other."""
        try:
            if self._pending or kind is None:
                self.sync()
        except JobError:
            if kind is None:
                raise
        finally:
            if self._shard is not None:
                os.close(self._shard[1])
            os.close(self._report)
            os.close(self._lock)

    @property
    def is_finished(self) -> bool:
        return (self._path / _CONFIG_FILE).exists()

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Bytes of a weight file. Raises JobError."""
        fd = self._open(file)
        with _reporting(self._path / file):
            _write_all(fd, data, offset)

    def finish(self, record: Record) -> None:
        """The next target is written whole; made durable about once a second."""
        assert record["tensor"] == self._names[len(self.records)], "targets finish in their order"
        self.records.append(record)
        self._pending.append(record)
        if time.monotonic() - self._synced_at >= _SYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """Tensors first, then the lines that say that they are there."""
        with _reporting(self._path):
            if self._shard is not None:
                os.fsync(self._shard[1])
                os.posix_fadvise(self._shard[1], 0, 0, os.POSIX_FADV_DONTNEED)
            if self._pending:
                lines = "".join(json.dumps(record) + "\n" for record in self._pending)
                _write_all(self._report, memoryview(lines.encode()), None)
                os.fsync(self._report)
                self._pending.clear()
        self._synced_at = time.monotonic()

    def complete(self, documents: Mapping[str, Any], others: Sequence[Path]) -> None:
        """Copies `others` and writes JSON `documents`, config.json last: the folder becomes a
        checkpoint."""
        assert len(self.records) == len(self._names), "not all targets are written"
        self.sync()
        with _reporting(self._path):
            for source in others:
                with replacing(self._path / source.name) as temporary:
                    shutil.copyfile(source, temporary)
            for name, document in documents.items():
                if name != _CONFIG_FILE:
                    write_json(self._path / name, document)
            write_json(self._path / _CONFIG_FILE, documents[_CONFIG_FILE])

    def _open(self, file: str) -> int:
        """The file, with its header."""
        if self._shard is not None and self._shard[0] == file:
            return self._shard[1]
        if self._shard is not None:
            self.sync()
            os.close(self._shard[1])
            self._shard = None
        path = self._path / file
        header = next(shard.header for shard in self._places.shards if shard.file == file)
        with _reporting(path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            self._shard = (file, fd)
            _write_all(fd, memoryview(header), 0)
        return fd

    def _read_records(self) -> list[Record]:
        """Those that are whole; what a kill left of a line is cut off."""
        path = self._path / REPORT_FILE
        with _reporting(path):
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            os.ftruncate(self._report, len(whole))
            os.lseek(self._report, 0, os.SEEK_END)
        try:
            records = [json.loads(line) for line in whole.splitlines()]
            names = [record["tensor"] for record in records]
        except (ValueError, KeyError, TypeError) as error:
            raise JobError(f"{path}: not readable: {error}; start in another folder") from error
        if names != list(self._names[: len(names)]):
            raise JobError(f"{path}: does not belong to this model; start in another folder")
        self._check_files(len(names))
        return records

    def _check_files(self, num_done: int) -> None:
        """Everything that is said to be finished is still there."""
        ends: dict[str, int] = {}
        for infos in self._places.tensors[:num_done]:
            for info in infos:
                ends[info.file] = max(ends.get(info.file, 0), info.end)
        for file, end in ends.items():
            path = self._path / file
            found = path.stat().st_size if path.exists() else 0
            if found < end:
                raise JobError(
                    f"{path}: expected {end} bytes or more of an earlier run, found {found}; "
                    "start in another folder"
                )


def prepare(path: Path, identity: Mapping[str, Any], places: TensorPlaces) -> None:
    """Makes the folder, or finds it to be one of the same command. Raises UsageError where it holds
    anything else, belongs to another command, or does not fit on the disk."""
    state = path / STATE_FILE
    if state.exists():
        _refuse_difference(path, identity)
    elif path.exists() and (not path.is_dir() or _foreign(path)):
        raise UsageError(
            f"{path}: got a file or a folder with files, allowed an empty or new folder, or one "
            "that the same command began"
        )
    if not (path / _CONFIG_FILE).exists():
        _check_disk(path, places)
    with _reporting(path):
        path.mkdir(parents=True, exist_ok=True)
        if not state.exists():
            write_json(state, dict(identity))


def _foreign(path: Path) -> bool:
    """Whether the folder has more than what a kill at the very beginning leaves."""
    return any(entry != temporary_file(path / STATE_FILE) for entry in path.iterdir())


def _refuse_difference(path: Path, identity: Mapping[str, Any]) -> None:
    try:
        stored = json.loads((path / STATE_FILE).read_bytes())
        differing = [
            f"{name}: the folder has {stored.get(name)!r}, now {identity.get(name)!r}"
            for name in sorted({*stored, *identity})
            if stored.get(name) != identity.get(name)
        ]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"{path / STATE_FILE}: not readable: {error}") from error
    if differing:
        raise UsageError(
            f"{path} belongs to another command:\n  "
            + "\n  ".join(differing)
            + "\nGive that command again, or another --out"
        )


def _check_disk(path: Path, places: TensorPlaces) -> None:
    written = sum(
        min(shard.num_bytes, (path / shard.file).stat().st_blocks * 512)
        for shard in places.shards
        if (path / shard.file).exists()
    )
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    needed = places.num_bytes - written + _SPARE_DISK
    if needed > free:
        raise UsageError(
            f"{path}: needs {format_bytes(needed)} more on the disk, which has"
            f" {format_bytes(free)} free ({format_bytes(places.num_bytes)} of weights,"
            f" {format_bytes(_SPARE_DISK)} to spare)"
        )


def write_json(path: Path, document: Any) -> None:
    """The file appears whole or not at all."""
    replace_file(path, (json.dumps(document, indent=2) + "\n").encode())


def _lock(path: Path) -> int:
    """Two processes must not write into one folder. Freed with the process."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise JobError(f"{path}: another process is writing into it") from error
    return fd


def _write_all(fd: int, data: memoryview, offset: int | None) -> None:
    done = 0
    while done < len(data):
        rest = data[done:]
        done += os.write(fd, rest) if offset is None else os.pwrite(fd, rest, offset + done)


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """What the disk refuses, as an error for people."""
    try:
        yield
    except OSError as error:
        raise JobError(
            f"{path}: cannot be written: {error.strerror}; what is finished is kept, the same "
            "command goes on from there"
        ) from error

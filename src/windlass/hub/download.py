"""Weight files on their way into huggingface_hub's cache. It keeps no half files, so that of 60 GB
at once much would come twice; here what was interrupted goes on."""

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO

from windlass.errors import CheckpointError, UsageError
from windlass.hub.repository import Hub, Snapshot
from windlass.units import MIB, format_bytes

_AT_ONCE = 4
_SPARE_DISK = 64 * MIB  # left free beside what comes
_PAUSES_S = (0.0, 1.0, 4.0, 10.0)  # before each new try of a connection that brought nothing
_TELL_EVERY_S = 0.25

OnStep = Callable[[int, int], None]  # bytes that have come, of how many


def download(
    snapshot: Snapshot,
    missing: Sequence[str],
    *,
    say: Callable[[str], None],
    on_step: OnStep | None,
) -> None:
    """Brings the files into the cache; `on_step` hears of it instead of a bar. UsageError where
    the disk has no room for them, CheckpointError where they do not come."""
    hub = Hub(snapshot.repo)
    left = sum(_bytes_left(snapshot, file) for file in missing)
    _check_disk(snapshot, left)
    say(
        f"downloading {format_bytes(left)} of {snapshot.repo}, commit {snapshot.commit},"
        f" into {snapshot.folder}"
    )
    with hub.reporting():
        if on_step is not None:
            _Downloads(hub, snapshot, on_step, left).run(missing)
            return
        with hub.library.utils.tqdm(
            total=left, unit="B", unit_scale=True, desc=snapshot.repo, disable=None
        ) as bar:
            _Downloads(hub, snapshot, lambda done, _: bar.update(done - bar.n), left).run(missing)


def _part(blob: Path) -> Path:
    """Where a content grows until it is whole."""
    return blob.with_name(f"{blob.name}.windlass.incomplete")


def _bytes_left(snapshot: Snapshot, file: str) -> int:
    size, sha256 = snapshot.remote(file)
    if sha256 is None:
        return size
    blob = snapshot.blob(sha256)
    if blob.exists():
        return 0
    part = _part(blob)
    return max(0, size - part.stat().st_size) if part.exists() else size


def _check_disk(snapshot: Snapshot, left: int) -> None:
    needed, free = left + _SPARE_DISK, shutil.disk_usage(snapshot.folder).free
    if needed > free:
        raise UsageError(
            f"{snapshot.repo}: needs {format_bytes(needed)} more on the disk of"
            f" {snapshot.folder.parents[2]}, which has {format_bytes(free)} free (HF_HOME names"
            " another place)"
        )


_logger = logging.getLogger(__name__)


class _Stopped(Exception):
    """Another file failed, or the user left."""


class _Downloads:
    """Some files at once. Nothing is taken whose SHA-256 is not the one that the hub says."""

    def __init__(self, hub: Hub, snapshot: Snapshot, on_step: OnStep, total: int) -> None:
        self._hub = hub
        self._snapshot = snapshot
        self._on_step = on_step
        self._total = total
        self._done = 0
        self._lock = Lock()
        self._stopped = Event()

    def run(self, files: Sequence[str]) -> None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            open_ones: set[Future[None]] = {pool.submit(self._fetch, file) for file in files}
            try:
                while open_ones:
                    ended, open_ones = wait(
                        open_ones, timeout=_TELL_EVERY_S, return_when=FIRST_EXCEPTION
                    )
                    for future in ended:
                        future.result()
                    self._on_step(self._done, self._total)
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _fetch(self, file: str) -> None:
        size, sha256 = self._snapshot.remote(file)
        if sha256 is not None:
            blob = self._snapshot.blob(sha256)
            blob.parent.mkdir(parents=True, exist_ok=True)
            if not blob.exists():
                self._complete(blob, file, size)
        self._hub.link(self._snapshot.commit, file)

    def _complete(self, blob: Path, file: str, size: int) -> None:
        with _part(blob).open("ab") as part:
            self._lock_alone(part, file)
            if blob.exists():
                return  # another process had the lock, and finished it
            if part.seek(0, os.SEEK_END) > size:
                _empty(part)
            self._fill(part, file, size)
            part.flush()
            os.fsync(part.fileno())
            self._check(part, file, blob.name)
            _part(blob).replace(blob)

    def _lock_alone(self, part: BinaryIO, file: str) -> None:
        """Waits until no other process brings this file."""
        is_told = False
        while True:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not is_told:
                    _logger.warning("%s: waiting for another process that downloads it", file)
                is_told = True
                if self._stopped.wait(_TELL_EVERY_S):
                    raise _Stopped from None
            else:
                return

    def _fill(self, part: BinaryIO, file: str, size: int) -> None:
        tries = 0
        while (begin := part.tell()) < size:
            failure: Exception = CheckpointError(
                f"{self._snapshot.repo}: {file}: got nothing behind byte {begin}, expected {size}"
            )
            try:
                self._append(part, file, size)
                if part.tell() > begin:
                    continue
            except Exception as error:  # noqa: BLE001  # judged below
                failure = error
            tries = tries + 1 if part.tell() <= begin else 1
            if tries > len(_PAUSES_S) or not self._is_passing(failure):
                raise failure
            if self._stopped.wait(_PAUSES_S[tries - 1]):
                raise failure

    def _is_passing(self, failure: Exception) -> bool:
        return isinstance(failure, CheckpointError) or self._hub.is_passing(failure)

    def _append(self, part: BinaryIO, file: str, size: int) -> None:
        begin = part.tell()
        with self._hub.stream(self._snapshot.commit, file, begin, size) as response:
            if begin and response.status_code != 206:
                _empty(part)
                self._count(-begin)
            for chunk in response.iter_bytes():  # as they come: what is gathered would be lost
                if self._stopped.is_set():
                    raise _Stopped
                part.write(chunk)
                self._count(len(chunk))

    def _check(self, part: BinaryIO, file: str, sha256: str) -> None:
        with Path(part.name).open("rb") as whole:
            found = hashlib.file_digest(whole, "sha256").hexdigest()
        if found != sha256:
            _empty(part)
            raise CheckpointError(
                f"{self._snapshot.repo}: {file}: expected SHA-256 {sha256}, found {found}; it is"
                " thrown away, the same command downloads it again"
            )

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes


def _empty(part: BinaryIO) -> None:
    part.truncate(0)
    part.seek(0)

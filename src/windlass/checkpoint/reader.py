"""Byte ranges of the checkpoint's files, as they lie on disk. Leaves no second copy in the page
cache. Knows files and ranges, not parts; holds no threads, and is called from many."""

import errno
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from windlass.checkpoint.safetensors import read_headers
from windlass.device.base import ALIGN_BYTES
from windlass.errors import CheckpointError
from windlass.models.names import TensorInfo

Mode = Literal["dio", "buffered"]


class WeightSource(Protocol):
    """What the weight store reads from."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors of the checkpoint by name."""
        ...

    def read(self, file: str, offset: int, into: memoryview) -> None:
        """Fills `into`; `offset` and its length are multiples of ALIGN_BYTES. The rest of `into`
        beyond the end of the file is undefined. Raises CheckpointError. Thread-safe."""
        ...

    def close(self) -> None:
        """Closes the files; nothing may be read afterwards. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class _OpenFile:
    path: Path
    fd: int
    num_bytes: int
    modified_ns: int


class Checkpoint:
    """`WeightSource` over the safetensors files of a folder.

    `mode` is "dio" (past the page cache) or "buffered" (the cache is dropped behind each read);
    "auto" takes direct I/O where the file system has it. Afterwards `.mode` says which it is.
    """

    def __init__(self, folder: Path, *, mode: Literal["auto", "dio", "buffered"] = "auto") -> None:
        self._tensors = read_headers(folder)
        self._files: dict[str, _OpenFile] = {}
        names = sorted({info.file for info in self._tensors.values()})
        self.mode: Mode = "buffered"
        if mode != "buffered":
            refused = next(
                (reason for n in names if (reason := _refusal(folder / n)) is not None), None
            )
            if refused is not None and mode == "dio":
                raise CheckpointError(f"direct I/O: expected on every file, refused: {refused}")
            self.mode = "dio" if refused is None else "buffered"
        try:
            for name in names:
                self._files[name] = _open(folder / name, self.mode)
        except BaseException:
            self.close()
            raise

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, file: str, offset: int, into: memoryview) -> None:
        assert offset % ALIGN_BYTES == 0 and len(into) % ALIGN_BYTES == 0, (file, offset, len(into))
        opened = self._files[file]
        wanted = min(len(into), opened.num_bytes - offset)
        assert wanted > 0, f"{opened.path}: read at {offset} of {opened.num_bytes} bytes"
        _check_unchanged(opened)
        done = 0
        while done < wanted:
            try:
                # The interpreter repeats calls that a signal interrupts (PEP 475).
                got = os.preadv(opened.fd, [into[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{opened.path}: expected {wanted} bytes at offset {offset}, found"
                    f" {error.strerror} at {offset + done}"
                ) from error
            if done + got < wanted:
                # The next read must begin on a boundary again, so a ragged end is read twice.
                got -= (done + got) % ALIGN_BYTES
                if got <= 0:
                    _check_unchanged(opened)
                    raise CheckpointError(
                        f"{opened.path}: expected {wanted} bytes at offset {offset}, found only"
                        f" {done}"
                    )
            done += got
        if self.mode == "buffered":
            os.posix_fadvise(opened.fd, offset, len(into), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1].fd)


def _open(path: Path, mode: Mode) -> _OpenFile:
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if mode == "dio" else 0)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    if mode == "buffered":
        # No read-ahead: it would fill the cache with bytes that no read drops again.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    status = os.fstat(fd)
    return _OpenFile(path, fd, status.st_size, status.st_mtime_ns)


def _refusal(path: Path) -> str | None:
    """Why direct I/O does not work on the file; None where it does. Some file systems refuse the
    open, others only the first read."""
    page = mmap.mmap(-1, ALIGN_BYTES)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        try:
            os.preadv(fd, [page], 0)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return f"{path}: {error.strerror}"
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        page.close()
    return None


def _check_unchanged(opened: _OpenFile) -> None:
    """The file is still the one whose header was read."""
    status = os.fstat(opened.fd)
    if status.st_nlink == 0:
        raise CheckpointError(f"{opened.path}: expected to stay, found deleted during the run")
    if status.st_size != opened.num_bytes:
        raise CheckpointError(
            f"{opened.path}: expected {opened.num_bytes} bytes, found {status.st_size}"
            " (changed during the run)"
        )
    if status.st_mtime_ns != opened.modified_ns:
        raise CheckpointError(
            f"{opened.path}: expected to stay as it was at the start, found written to during the"
            " run"
        )

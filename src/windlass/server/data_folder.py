"""What a server keeps from run to run: files and batches, in a folder that is its own."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from windlass.errors import UsageError
from windlass.server.batch_book import BatchBook
from windlass.server.batch_worker import BatchWorker
from windlass.server.file_store import FileStore


@dataclass(frozen=True, slots=True)
class DataFolder:
    """`most_bytes`: of an uploaded file."""

    files: FileStore
    book: BatchBook
    worker: BatchWorker
    most_bytes: int


@contextmanager
def data_folder(
    folder: Path, *, most_bytes: int, stored_bytes: int, say: Callable[[str], None]
) -> Iterator[DataFolder]:
    """Locked until the end. `stored_bytes`: that all files together may have. Raises UsageError
    where it cannot be had."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UsageError(f"data folder: got {str(folder)!r}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"data folder: got {str(folder)!r}, which another server is using; --data-dir "
                "gives this one its own"
            ) from error
        try:
            files = FileStore(folder / "files", most_bytes=stored_bytes)
            book = BatchBook(folder / "batches", files)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"data folder: got {str(folder)!r}, not readable: {error}") from error
        with BatchWorker(book, files, say) as worker:
            yield DataFolder(files, book, worker, most_bytes)
    finally:
        os.close(lock)

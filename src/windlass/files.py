"""Files that appear whole or not at all, and stay once they are there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what then becomes `path`, durably: that is the old or the new file at any
    moment. Raises OSError; nothing is left then, but by a kill."""
    temporary = temporary_file(path)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def replace_file(path: Path, data: bytes) -> None:
    """The same with all of its content."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def temporary_file(path: Path) -> Path:
    """Where the new content of `path` grows until it is whole."""
    return path.with_name(path.name + ".tmp")


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    _sync(folder)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

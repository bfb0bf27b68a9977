"""Processes that tests start: none outlives its test, and those that need torch are forked from one
that has imported it, because the import is most of what they would cost."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PATIENCE_S = 120  # of what only a hanging process reaches, however busy the machine

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["windlass.build.open", "windlass.quantize.convert", "windlass.server.run"]
)


def library_bytes() -> int:
    """Memory of this process that is of mapped files. One that was forked maps those of libraries
    as it comes to them, in pieces whose size is the kernel's choice; they can be dropped."""
    found = (line for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(line.split()[1]) << 10 for line in found if line.startswith("RssFile:"))


@contextmanager
def running(arguments: Sequence[str], **more: Any) -> "Iterator[subprocess.Popen[str]]":
    """A command under way; at the end it is killed, if it has not ended."""
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def forked(function: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """`function(*arguments)` under way in a process of its own; at the end it is killed, if it has
    not ended."""
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        process.close()


def printing_to(folder: Path, function: Callable[..., None], *arguments: Any) -> None:
    """In a forked process: what it prints, also when it fails, goes to files of `folder`."""
    sys.stdout = (folder / "stdout").open("w", buffering=1)
    sys.stderr = (folder / "stderr").open("w", buffering=1)
    function(*arguments)

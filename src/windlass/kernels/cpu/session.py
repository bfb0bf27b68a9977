"""The library in use: its calls, what captures them, and the memory of their results."""

import ctypes as c
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from windlass.device.recycle import Recycler
from windlass.kernels.cpu import library as lib
from windlass.kernels.cpu.capture_calls import CapturedCalls, Scratch
from windlass.kernels.cpu.tiles import Tiles


class Session:
    """Used by one thread; the library's own pool of `threads` takes part. `precision`, 0 or 1, is
    that of products, as `wl_precision` has it."""

    def __init__(self, library: c.CDLL, *, threads: int, precision: int) -> None:
        self.library = library
        self.precision = precision
        self.scratch = Scratch()  # results of all captures: one layer runs at a time
        self.tiles = Tiles()
        self._memory: Recycler | Scratch = Recycler()
        self._captured: CapturedCalls | None = None
        lib.check(library.wl_set_threads(threads), "threads")

    def empty(self, *shape: int) -> torch.Tensor:
        """Memory of a result, fp32."""
        return self._memory.empty(*shape)

    def call(self, name: str, *arguments: Any, keep: object = None) -> None:
        """Calls function `name`. `keep`: what structures among the arguments point to, where
        nothing else keeps it. Raises MemoryError."""
        if self._captured is not None:
            self._captured.add(name, arguments, keep)
        lib.check(getattr(self.library, name)(*arguments), name)

    @contextmanager
    def capturing(self, captured: CapturedCalls, tiles: Tiles) -> Iterator[None]:
        """Calls go to `captured` too; results lie in the scratch, tiles of rows in `tiles`."""
        usual = self._memory, self.tiles
        self._captured, self._memory, self.tiles = captured, self.scratch, tiles
        try:
            yield
        finally:
            self._captured, (self._memory, self.tiles) = None, usual

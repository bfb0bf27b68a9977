"""Captured calls of the library, and the memory of their results."""

import ctypes as c
import math
from collections.abc import Callable
from typing import Any

import torch

from windlass.kernels.cpu import library as lib
from windlass.kernels.cpu.prepared import Linears, NativeExperts, Network
from windlass.units import round_up

_LINE_FLOATS = 16  # that results begin at multiples of
_BLOCK_FLOATS = 1 << 16


class CapturedCalls:
    """Calls in their order, and what they point to."""

    def __init__(self, label: Callable[[], int]) -> None:
        self.is_complete = True  # nothing has been computed but by these calls
        self._label = label
        self._calls: list[lib.Call] = []
        self._kept: list[object] = []

    def add(self, name: str, arguments: tuple[Any, ...], keep: object) -> None:
        """A call of function `name`; `keep` lives as long as this object."""
        if name not in lib.CAPTURABLE or _has_copies(keep):
            self.is_complete = False  # copies of weights are planned for while a call lasts
            return
        call = lib.Call(function=lib.CAPTURABLE[name], label=self._label())
        structures = []
        for i, (kind, value) in enumerate(zip(lib.SIGNATURES[name], arguments, strict=True)):
            if kind is c.c_float:
                call.arguments[i].f = value
            elif isinstance(value, c.Array | c.Structure):
                structures.append(value)
                call.arguments[i].p = c.addressof(value)
            else:
                call.arguments[i].i = value or 0
        self._calls.append(call)
        self._kept.append((structures, keep))

    def calls(self) -> "c.Array[lib.Call]":
        """All of them, for `wl_run`; valid as long as this object."""
        return (lib.Call * len(self._calls))(*self._calls)


class Scratch:
    """Memory of results: all layers of all passes use the same, one after the other."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []  # never freed or moved: calls point into them
        self._block = self._used = 0  # the one in use, and its floats that are taken

    @property
    def place(self) -> tuple[int, int]:
        """The first that is not taken."""
        return self._block, self._used

    def rewind(self, place: tuple[int, int]) -> None:
        """What lies from `place` on is over."""
        self._block, self._used = place

    def empty(self, *shape: int) -> torch.Tensor:
        """(shape) fp32, until the next layer."""
        count = round_up(math.prod(shape), _LINE_FLOATS)
        while self._block < len(self._blocks):
            first, self._used = self._used, self._used + count
            block = self._blocks[self._block]
            if self._used <= block.numel():
                return block[first : first + math.prod(shape)].view(shape)
            self._block, self._used = self._block + 1, 0
        self._blocks.append(torch.empty(max(count, _BLOCK_FLOATS)))
        return self.empty(*shape)


def _has_copies(keep: object) -> bool:
    if isinstance(keep, list):
        return any(_has_copies(one) for one in keep)
    if isinstance(keep, lib.Matrix):
        return keep.copy is not None
    return isinstance(keep, Linears | Network | NativeExperts) and keep.has_copies

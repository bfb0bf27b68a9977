"""Calls of the library, noted and repeated (as a CUDA graph does it for a device): at a few rows it
takes longer to say what is to be computed than to compute it."""

import ctypes as c
import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode

from windlass.kernels.cpu import library as lib
from windlass.kernels.cpu.prepared import Linears, Network
from windlass.kernels.cpu.tiles import Tiles
from windlass.kernels.interface import AttentionWork
from windlass.units import round_up

_Result = TypeVar("_Result")
_TRIES = 3  # of a layer: what is derived from its weights is made at the first
_MOST_LABELS = 16
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
        """A call of function `name`; `keep` lives as long as the captured."""
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
        """All of them, for `wl_run`; valid as long as the captured."""
        return (lib.Call * len(self._calls))(*self._calls)


class Scratch:
    """Memory of results: all layers of all passes use the same, one after the other."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []  # never freed or moved: calls point into them
        self._block = self._used = 0  # the one in use, and its floats that are taken

    def rewind(self) -> None:
        """The next layer begins."""
        self._block = self._used = 0

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


class Recording(Protocol):
    """Where the kernels note their calls, and take memory from, while a body runs."""

    def __call__(self, captured: CapturedCalls, tiles: Tiles) -> AbstractContextManager[None]: ...


class _Note(NamedTuple):
    """What a layer did."""

    captured: CapturedCalls
    calls: "c.Array[lib.Call]"
    result: object


class NativeCapture:
    """Implements `Recorder`."""

    def __init__(
        self, library: c.CDLL, recording: Recording, scratch: Scratch, label: Callable[[], str]
    ) -> None:
        self._run = library.wl_run
        self._recording = recording
        self._label = label
        self._labels: list[str] = []
        self._seconds = (c.c_double * _MOST_LABELS)()
        self._scratch = scratch
        self._tiles = Tiles()
        self._notes: dict[int, _Note] = {}
        self._tries: Counter[int] = Counter()
        self.num_replayed = 0  # layers

    def begin(self, work: AttentionWork) -> None:
        self._tiles.replace(work)

    def run(self, layer: int, body: Callable[[], _Result]) -> _Result | None:
        note = self._notes.get(layer)
        if note is not None:
            self.num_replayed += 1
            lib.check(self._run(note.calls, len(note.calls), self._seconds), "a repeated layer")
            return cast("_Result", note.result)
        if self._tries[layer] == _TRIES:
            return None
        self._tries[layer] += 1
        captured = CapturedCalls(self._index)
        self._scratch.rewind()
        with self._recording(captured, self._tiles), _Watch() as watch:
            result = body()
        if captured.is_complete and not watch.has_computed:
            self._notes[layer] = _Note(captured, captured.calls(), result)
        return result

    def empty(self, *shape: int) -> torch.Tensor:
        return self._scratch.empty(*shape)

    def seconds(self) -> dict[str, float]:
        found = dict(zip(self._labels, self._seconds, strict=False))
        c.memset(self._seconds, 0, c.sizeof(self._seconds))
        return found

    def _index(self) -> int:
        label = self._label()
        if label not in self._labels:
            assert len(self._labels) < _MOST_LABELS, f"{label}: more labels than there is room for"
            self._labels.append(label)
        return self._labels.index(label)


# What torch may do while a layer is noted: say how tensors lie, hand out memory, look at it another
# way. (A dispatch mode would see operations instead of names; the first one imports 800 modules.)
_WORDS = frozenset(
    "__get__ __len__ data_ptr dim element_size is_contiguous is_floating_point numel size stride"
    " storage_offset empty new_empty".split()
)
_VIEWS = frozenset(
    "__getitem__ chunk contiguous expand flatten float permute reshape split squeeze t transpose"
    " unbind unsqueeze view".split()
)


class _Watch(TorchFunctionMode):
    """Whether torch computes anything, or is asked for what tensors contain."""

    has_computed = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = func.__name__ in _VIEWS and _memory(result) <= _memory(args)  # and no copy
        if not is_view and func.__name__ not in _WORDS:
            self.has_computed = True
        return result


def _has_copies(keep: object) -> bool:
    if isinstance(keep, list):
        return any(_has_copies(one) for one in keep)
    if isinstance(keep, lib.Matrix):
        return keep.copy is not None
    return isinstance(keep, Linears | Network) and keep.has_copies


def _memory(values: Any) -> set[int]:
    """Where the tensors among `values` have their memory."""
    if isinstance(values, torch.Tensor):
        return {values.untyped_storage().data_ptr()}
    if isinstance(values, list | tuple):
        return set().union(*(_memory(value) for value in values))
    return set()

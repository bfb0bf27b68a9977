"""Calls of the library, noted and repeated (as a CUDA graph does it for a device): at a few rows it
takes longer to say what is to be computed than to compute it."""

import ctypes as c
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from windlass.kernels.base import AttentionWork, Tensors
from windlass.kernels.cpu import library as lib
from windlass.kernels.cpu.prepared import Linears, Network
from windlass.kernels.cpu.tiles import Tiles

_Result = TypeVar("_Result")
_TRIES = 2  # what is derived from weights may still be made at the first


class Tape:
    """Calls in their order, and what they point to."""

    def __init__(self) -> None:
        self.is_complete = True  # nothing has been computed but by these calls
        self._calls: list[lib.Call] = []
        self._kept: list[object] = []

    def add(self, name: str, arguments: tuple[Any, ...], keep: object) -> None:
        """A call of function `name`; `keep` lives as long as the tape."""
        if name not in lib.REPEATABLE or _has_copies(keep):
            self.is_complete = False  # copies of weights are planned for while a call lasts
            return
        call = lib.Call(function=lib.REPEATABLE[name])
        for i, (kind, value) in enumerate(zip(lib.SIGNATURES[name], arguments, strict=True)):
            if kind is c.c_float:
                call.arguments[i].f = value
            elif isinstance(value, c.Array | c.Structure):
                call.arguments[i].p = c.addressof(value)
            else:
                call.arguments[i].i = value or 0
        self._calls.append(call)
        self._kept.append((arguments, keep))

    def calls(self) -> "c.Array[lib.Call]":
        """All of them, for `wl_run`; valid as long as the tape."""
        return (lib.Call * len(self._calls))(*self._calls)


class Scratch:
    """Memory of results, the same whenever a body of this name asks for them in the same order."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, int, tuple[int, ...]], torch.Tensor] = {}
        self._name, self._count = "", 0

    def rewind(self, name: str) -> None:
        self._name, self._count = name, 0

    def empty(self, *shape: int) -> torch.Tensor:
        key = (self._name, self._count, shape)
        self._count += 1
        if key not in self._tensors:
            self._tensors[key] = torch.empty(shape)
        return self._tensors[key]


class Recording(Protocol):
    """Where the kernels note their calls, and take memory from, while a body runs."""

    def __call__(
        self, tape: Tape, scratch: Scratch, tiles: Tiles
    ) -> AbstractContextManager[None]: ...


class _Note:
    """What is known of one body: for the weights `w`, its calls and its result."""

    __slots__ = ("w", "tries", "tape", "calls", "result")

    def __init__(self, w: Tensors) -> None:
        self.w = w
        self.tries = _TRIES
        self.tape: Tape | None = None
        self.calls: c.Array[lib.Call] | None = None
        self.result: object = None


class NativeRecorder:
    """Implements `Recorder`. A body is noted when it comes with the same weights for the second
    time: those that are read anew in every pass are not worth it."""

    def __init__(self, library: c.CDLL, recording: Recording) -> None:
        self._run = library.wl_run
        self._recording = recording
        self._scratch = Scratch()
        self._tiles = Tiles()
        self._notes: dict[tuple[str, int], _Note] = {}
        self.num_repeated = 0

    def begin(self, work: AttentionWork) -> None:
        self._tiles.replace(work)

    def run(self, name: str, layer: int, w: Tensors, body: Callable[[], _Result]) -> _Result:
        note = self._notes.get((name, layer))
        if note is None or note.w is not w:
            self._notes[name, layer] = _Note(w)
            return body()
        if note.calls is not None:
            self.num_repeated += 1
            lib.check(self._run(note.calls, len(note.calls)), name)
            return cast("_Result", note.result)
        if not note.tries:
            return body()
        note.tries -= 1
        return self._note(note, name, body)

    def _note(self, note: _Note, name: str, body: Callable[[], _Result]) -> _Result:
        tape = Tape()
        self._scratch.rewind(name)
        with self._recording(tape, self._scratch, self._tiles), _Watch() as watch:  # type: ignore[no-untyped-call]
            result = body()
        if tape.is_complete and not watch.has_computed:
            note.tape, note.calls, note.result = tape, tape.calls(), result
        return result


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whether torch computes anything: all but views and uninitialised memory."""

    has_computed = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = not func._schema.is_mutable and _memory(result) <= _memory(args)
        if not is_view and func is not torch.ops.aten.empty.memory_format:
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

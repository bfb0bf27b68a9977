"""Graphs of a device on a machine without: what torch (and Triton's interpreter) is asked for while
one is captured is noted and undone, and asked for again, on the same memory, by each replay.

Stricter than CUDA: what would wait for the device, numbers that come from the host, memory that was
made outside and is gone and host code that keeps what was made inside are errors or poison. Memory
that the result does not hold is poison after each replay, as if another graph had used it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fake_streams import tensors_in
from fakes import POISON
from windlass.device.graphs import Graph

_Result = TypeVar("_Result")
_LOOKS = {
    *("tolist", "numpy", "item", "cpu", "__array__", "__contains__"),
    *("__bool__", "__int__", "__float__", "__index__"),
}
# Wait for the device, or have a shape that only it knows
_WAIT = {
    *("aten::item", "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"),
    *("aten::nonzero", "aten::bincount", "aten::masked_select", "aten::_unique2"),
}


class GraphError(AssertionError):
    """What no graph of a device can hold."""


class _Place(NamedTuple):
    """A tensor whose memory lives as long as others have it."""

    storage: StorageWeakRef
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_Place":
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        offset = int(tensor.storage_offset())
        return cls(storage, tensor.dtype, tensor.shape, tensor.stride(), offset)

    def tensor(self, what: object = "the end of a capture") -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise GraphError(f"{what} touches memory that is gone, {self.shape} {self.dtype}")
        made = torch.empty(0, dtype=self.dtype)
        return made.set_(storage, self.offset, self.shape, self.strides)


class _Call(NamedTuple):
    """`made`: where its results go."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    made: list[torch.Tensor]


class FakeGraphs:
    """Implements `Graphs`."""

    def __init__(self, in_kernel: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """`in_kernel`: what is asked for inside is the device's own."""
        self.in_kernel = in_kernel
        self._recording: _Recording | None = None
        self.num_captured = self.num_replayed = 0

    def capture(self, body: Callable[[], _Result]) -> tuple[Graph, _Result]:
        graph = FakeGraph(self)
        self._recording = graph.recording
        try:
            with _Looks(graph.recording), graph.recording:
                result = body()
        finally:
            self._recording = None
        graph.end(result)
        self.num_captured += 1
        return graph, result

    def launch(self, kernel: Callable[..., None], *args: Any, **kwargs: Any) -> Any:
        """Calls a kernel that is no operator of torch, and may write all that it is given."""
        if self._recording is None:
            return kernel(*args, **kwargs)
        return self._recording.launch(kernel, args, kwargs)


class FakeGraph:
    def __init__(self, graphs: FakeGraphs) -> None:
        self._graphs = graphs
        self.recording = _Recording()
        self._poisoned: list[torch.Tensor] = []

    def end(self, result: object) -> None:
        """All that was done is undone."""
        recording = self.recording
        for place, before in recording.undo.values():
            place.tensor().copy_(before)
        recording.undo.clear()
        held = {_key(one) for one in _within(result)}
        self._poisoned = [one for key, one in recording.own.items() if key not in held]
        for one in recording.own.values():
            one.fill_(POISON)

    def replay(self) -> None:
        self._graphs.num_replayed += 1
        with self._graphs.in_kernel():
            for function, args, kwargs, made in self.recording.calls:
                got = function(*_back(args, function), **_back(kwargs, function))
                for to, new in zip(made, tensors_in((got,)) if made else (), strict=True):
                    to.copy_(new)
            for one in self._poisoned:
                one.fill_(POISON)


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`own`: bytes of all memory that was made; `handed`: numbers that are part of calls; `undo`:
    of what was there, before it was written."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.own: dict[int, torch.Tensor] = {}
        self.handed: dict[int, torch.Tensor] = {}
        self.undo: dict[int, tuple[_Place, torch.Tensor]] = {}
        self.is_quiet = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiles: else it is imported, for seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_quiet:
            return func(*args, **kwargs)
        schema = func._schema
        if schema.name in _WAIT:
            raise GraphError(f"{schema.name} waits for the device while a graph is captured")
        if schema.name == "aten::lift_fresh":
            if args[0].dim():  # single ones are handed over
                raise GraphError("numbers of the host while a graph is captured")
            self.handed[_key(args[0])] = args[0]
        writes = [
            (kwargs.get(one.name) if one.kwarg_only else args[place])
            for place, one in enumerate(schema.arguments)
            if one.alias_info is not None and one.alias_info.is_write
        ]
        self._keep(tensors_in(writes))
        got = func(*args, **kwargs)
        given = {_key(one) for one in tensors_in((*args, *kwargs.values()))}
        made = [] if writes else [one for one in tensors_in((got,)) if _key(one) not in given]
        self._note(made)
        if (writes or made) and "empty" not in schema.name:  # else a view
            self.calls.append(_Call(func, self._places(args), self._places(kwargs), made))
        return got

    def launch(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.is_quiet = True
        try:
            self._keep(list(_within((args, kwargs))))
            self.calls.append(_Call(function, self._places(args), self._places(kwargs), []))
            return function(*args, **kwargs)
        finally:
            self.is_quiet = False

    def _keep(self, written: list[torch.Tensor]) -> None:
        for one in written:
            key = _key(one)
            if key not in self.own and key not in self.undo:
                whole = _bytes_of(one)
                self.undo[key] = _Place.of(whole), whole.clone()

    def _note(self, made: list[torch.Tensor]) -> None:
        for one in made:
            self.own.setdefault(_key(one), _bytes_of(one))

    def _places(self, values: Any) -> Any:
        """Tensors that were there before, held as a graph holds them: not at all."""
        if isinstance(values, torch.Tensor):
            is_kept = _key(values) in self.own or _key(values) in self.handed
            return values if is_kept else _Place.of(values)
        if isinstance(values, dict):
            return {name: self._places(value) for name, value in values.items()}
        if type(values) in (list, tuple):
            return type(values)(self._places(value) for value in values)
        return values


class _Looks(TorchFunctionMode):
    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _LOOKS and not self._recording.is_quiet:
            raise GraphError(f"{func.__name__}: the host looks while a graph is captured")
        return func(*args, **(kwargs or {}))


def _back(values: Any, what: object) -> Any:
    if isinstance(values, _Place):
        return values.tensor(what)
    if isinstance(values, dict):
        return {name: _back(value, what) for name, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(_back(value, what) for value in values)
    return values


def _within(values: object) -> list[torch.Tensor]:
    """Tensors in lists, tuples and mappings."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _within(value)]
    return []


def _key(tensor: torch.Tensor) -> int:
    return cast(int, tensor.untyped_storage()._cdata)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of its memory."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())

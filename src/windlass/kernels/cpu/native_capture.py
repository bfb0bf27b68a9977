"""Layers as captured calls, which are replayed (as a CUDA graph does it for a device): at a few
rows it takes longer to say what is to be computed than to compute it."""

import ctypes as c
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode

from windlass.kernels.cpu import library as lib
from windlass.kernels.cpu.capture_calls import CapturedCalls
from windlass.kernels.cpu.prepared import NativeExperts
from windlass.kernels.cpu.session import Session
from windlass.kernels.cpu.tiles import Tiles
from windlass.kernels.interface import AttentionWork

_Result = TypeVar("_Result")
_TRIES = 3  # of a layer: what is derived from its weights is made at the first
_MOST_LABELS = 16
_BEGIN = (0, 0)  # of the scratch


class _Layer(NamedTuple):
    """What a layer did."""

    captured: CapturedCalls
    calls: "c.Array[lib.Call]"
    result: object
    end: tuple[int, int]  # of its results, in the scratch


class NativeCapture:
    """Implements `Capture`."""

    def __init__(self, session: Session, label: Callable[[], str]) -> None:
        self._session = session
        self._label = label
        self._labels: list[str] = []
        self._seconds = (c.c_double * _MOST_LABELS)()
        self._tiles = Tiles()
        self._layers: dict[object, _Layer] = {}
        self._tries: Counter[object] = Counter()
        self._end: tuple[int, int] | None = None  # of the results of the last run, if it is kept
        self.num_replayed = 0  # layers, or pieces of them

    def begin(self, work: AttentionWork) -> None:
        self._tiles.replace(work)

    def run(
        self, key: object, body: Callable[[], _Result], *, continues: bool = False
    ) -> _Result | None:
        known = self._layers.get(key)
        if known is not None:
            self.num_replayed += 1
            self._end = known.end
            run = self._session.library.wl_run
            lib.check(run(known.calls, len(known.calls), self._seconds), "a replayed layer")
            return cast("_Result", known.result)
        if continues and self._end is None:
            return body()  # reads results of calls that are not kept: the next time, perhaps
        if self._tries[key] == _TRIES:
            return None
        self._tries[key] += 1
        captured = CapturedCalls(self._index)
        scratch = self._session.scratch
        scratch.rewind(self._end if continues and self._end is not None else _BEGIN)
        with self._session.capturing(captured, self._tiles), _Watch() as watch:
            result = body()
        self._end = None
        if captured.is_complete and not watch.has_computed:
            self._end = scratch.place
            self._layers[key] = _Layer(captured, captured.calls(), result, self._end)
        return result

    def experts(self, num_experts: int) -> NativeExperts:
        return NativeExperts(num_experts)

    def empty(self, *shape: int) -> torch.Tensor:
        return self._session.scratch.empty(*shape)

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


# What torch may do while a layer is captured: say how tensors lie, hand out memory, look at it
# another way. (A dispatch mode would see operations instead of names; the first one imports 800
# modules.)
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


def _memory(values: Any) -> set[int]:
    """Where the tensors among `values` have their memory."""
    if isinstance(values, torch.Tensor):
        return {values.untyped_storage().data_ptr()}
    if isinstance(values, list | tuple):
        return set().union(*(_memory(value) for value in values))
    return set()

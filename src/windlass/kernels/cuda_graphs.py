"""Layers as graphs of a device, which are replayed: at a few rows it takes longer to launch kernels
than to run them.

A piece of a layer (`Capture.run`) is computed when it first comes, which makes all that its kernels
keep (machine code, what is derived from weights, tables); captured when it comes again; replayed
from then on. What changes from pass to pass lies in memory that does not move: where rows are
(`RowTables`) and which experts are held (`SlotTable`), each refilled by one copy on the stream that
replays, so that it comes after the replay before. Knows neither Triton nor torch.cuda.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol, TypeVar, cast

import torch

from windlass.device.base import Allocator
from windlass.device.graphs import Graph, Graphs
from windlass.errors import WindlassError
from windlass.kernels.interface import AttentionWork, CapturedExperts
from windlass.kernels.limits import MOST_GRAPHED
from windlass.tensors import Tensors

_Result = TypeVar("_Result")
_LEAST_POSITIONS, _LEAST_PAGES = 1024, 16  # that tables have room for


class RowTables:
    """Where the rows of passes of equally many are, each of a sequence of its own: int32, in memory
    that does not move. There is room for longer sequences than there are: kernels see their
    lengths."""

    def __init__(self, memory: Allocator, work: AttentionWork) -> None:
        """With room for `work`, and as much again."""
        self._memory = memory
        self.num_rows = len(work.num_rows)
        self.positions = max(_LEAST_POSITIONS, 1 << _longest(work).bit_length())
        self._pages = max(_LEAST_PAGES, 1 << max(map(len, work.pages)).bit_length())
        self._all = memory.empty(self.num_rows * (5 + self._pages), dtype=torch.int32)
        # sequence, row, number of rows (1), position, row once more: as tiles of kernels have it
        self.tiles_5T = self._all[: 5 * self.num_rows].view(5, -1)
        self.pages_TP = self._all[5 * self.num_rows :].view(self.num_rows, -1)

    def has_room(self, work: AttentionWork) -> bool:
        pages = max(map(len, work.pages))
        return _longest(work) <= self.positions and pages <= self._pages

    def fill(self, work: AttentionWork) -> None:
        """With those of another pass."""
        assert set(work.num_rows) == {1}, "rows that share a sequence"
        rows = range(self.num_rows)
        pages = ((*own, *[0] * (self._pages - len(own))) for own in work.pages)
        tiles = rows, work.first_row, work.num_rows, work.first_position, rows
        values = [*chain(*tiles), *chain.from_iterable(pages)]
        self._all.copy_(self._memory.tensor(values, dtype=torch.int32))


def _longest(work: AttentionWork) -> int:
    return max(work.first_position) + 1


class Place(Protocol):
    """Where kernels find an expert: `slot` in a memory of many, laid out as `layout` says."""

    @property
    def layout(self) -> Hashable: ...

    @property
    def slot(self) -> int: ...


_SomePlace = TypeVar("_SomePlace", bound=Place)


class SlotTable(CapturedExperts):
    """The slots of those that are held, by expert, in memory that does not move; -1: not held."""

    def __init__(
        self, num_experts: int, memory: Allocator, held: Callable[["SlotTable"], None]
    ) -> None:
        """`held` is called whenever others are."""
        self._memory = memory
        self._held = held
        self._experts: Mapping[int, Tensors] = {}
        self._find: Callable[[Tensors], Place] | None = None
        self._first: Place | None = None
        self.slots_E = memory.empty(num_experts, dtype=torch.int32)
        self.is_alike = True  # all that are held lie as the first ever did

    def hold(self, experts: Mapping[int, Tensors]) -> None:
        self._experts = experts
        if self._find is not None:
            self._fill(self._find)
        self._held(self)

    def found(self, find: Callable[[Tensors], _SomePlace]) -> _SomePlace | None:
        """The place of the first that was ever held, by `find`, always the same: all others differ
        in their slots alone. None where those that are held now do not."""
        if self._find is None:
            self._find = find
            self._fill(find)
        return cast("_SomePlace", self._first) if self.is_alike else None

    def _fill(self, find: Callable[[Tensors], Place]) -> None:
        slots = [-1] * len(self.slots_E)
        self.is_alike = True
        for expert, w in self._experts.items():
            place = find(w)
            self._first = self._first or place
            slots[expert] = place.slot
            self.is_alike &= place.layout == self._first.layout
        self.slots_E.copy_(self._memory.tensor(slots, dtype=torch.int32))

    def __getitem__(self, expert: int) -> Tensors:
        return self._experts[expert]

    def __iter__(self) -> Iterator[int]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)


@dataclass(eq=False, slots=True)
class _Piece:
    """Of a layer. `constants`: what its kernels were handed by the host, the same each time."""

    constants: list[tuple[Sequence[int], torch.Tensor]] = field(default_factory=list)
    graph: Graph | None = None
    result: object = None


class GraphCaptures:
    """What all captures on a device have in common. At most `most` have graphs: the one that was
    not used for longest gives its own up."""

    def __init__(self, memory: Allocator, graphs: Graphs, *, most: int = MOST_GRAPHED) -> None:
        self.memory = memory
        self.graphs = graphs
        self._most = most
        self._used: dict[CudaCapture, None] = {}  # the last one last
        self._piece: _Piece | None = None  # whose kernels are called
        self._num_constants: int | None = None  # so far, where it is being captured
        self.rows: RowTables | None = None  # its, if any

    def new(self) -> "CudaCapture":
        return CudaCapture(self)

    def use(self, capture: "CudaCapture") -> None:
        """Between passes: nothing of a graph that is given up is under way."""
        self._used.pop(capture, None)
        self._used[capture] = None
        while len(self._used) > self._most:
            oldest = next(iter(self._used))
            del self._used[oldest]
            oldest.forget()

    @contextmanager
    def calling(self, piece: _Piece, rows: RowTables, *, is_kept: bool) -> Iterator[None]:
        """Kernels are called for `piece`, to be kept or to be done."""
        self._piece, self.rows = piece, rows
        self._num_constants = 0 if is_kept else None
        try:
            yield
        finally:
            self._piece = self.rows = self._num_constants = None

    def tensor(self, values: Sequence[int]) -> torch.Tensor:
        """int32. Within a piece, which is to say the same each time, memory that does not move."""
        if self._piece is not None and self._num_constants is not None:
            before, made = self._piece.constants[self._num_constants]
            assert before == values, "a captured call has other numbers than when it was computed"
            self._num_constants += 1
            return made
        made = self.memory.tensor(values, dtype=torch.int32)
        if self._piece is not None:
            self._piece.constants.append((values, made))
        return made


class CudaCapture:
    """Implements `Capture`, for passes of decoded rows alone."""

    def __init__(self, captures: GraphCaptures) -> None:
        self._captures = captures
        self._pieces: dict[object, _Piece] = {}
        self._rows: RowTables | None = None  # None where the pass cannot be captured
        self._room: RowTables | None = None  # kept for the next that can
        self._scratch: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
        self._num_made = 0  # of `empty`, by the layer
        self._is_kept = False  # the results of the last layer lie where they always will
        self._held: SlotTable | None = None  # since the last run
        self.num_replayed = 0  # layers, or pieces of them

    def begin(self, work: AttentionWork) -> None:
        self._rows = None
        self._is_kept = False
        if any(work.is_prompt):
            return  # attention of prompts has tiles of its own
        self._captures.use(self)
        if self._room is None or not self._room.has_room(work):
            self.forget()
            self._room = RowTables(self._captures.memory, work)
        self._rows = self._room
        self._rows.fill(work)

    def run(
        self, key: object, body: Callable[[], _Result], *, continues: bool = False
    ) -> _Result | None:
        held, self._held = self._held, None
        if self._rows is None or (held is not None and not held.is_alike):
            return None
        if continues and not self._is_kept:
            return body()  # reads results that will not lie there again: the next time, perhaps
        if not continues:
            self._num_made = 0
        piece = self._pieces.get(key)
        if piece is None:
            self._is_kept &= continues
            piece = self._pieces[key] = _Piece()
            with self._captures.calling(piece, self._rows, is_kept=False):
                return body()
        if piece.graph is None:
            piece.graph, piece.result = self._captured(key, piece, self._rows, body)
        piece.graph.replay()
        self.num_replayed += 1
        self._is_kept = True
        return cast("_Result", piece.result)

    def _captured(
        self, key: object, piece: _Piece, rows: RowTables, body: Callable[[], _Result]
    ) -> tuple[Graph, _Result]:
        with self._captures.calling(piece, rows, is_kept=True):
            try:
                return self._captures.graphs.capture(body)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise WindlassError(
                    f"a CUDA graph of {key} fails ({reason}): --enforce-eager goes without"
                ) from error

    def experts(self, num_experts: int) -> CapturedExperts:
        def hold(table: SlotTable) -> None:
            self._held = table

        return SlotTable(num_experts, self._captures.memory, hold)

    def empty(self, *shape: int) -> torch.Tensor:
        key = self._num_made, shape
        self._num_made += 1
        if key not in self._scratch:
            self._scratch[key] = self._captures.memory.empty(*shape)
        return self._scratch[key]

    def seconds(self) -> dict[str, float]:
        return {}  # the device does not say; spans have what it took to ask it

    def forget(self) -> None:
        """Gives all graphs up, and their memory with them."""
        self._pieces.clear()
        self._scratch.clear()
        self._room = self._rows = None

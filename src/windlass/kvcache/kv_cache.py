"""Keys, values and recurrent states of live sequences. Knows pages and state slots, not requests.

A page holds `page_tokens` positions of one sequence in all attention layers. Rows are as wide as
alignment asks (zeros beyond) and of a floating type, or int8: bytes and an fp32 scale for each row,
which come from that row alone. Recurrent states are fp32. A page is cleared when it is handed out,
so that nothing of an earlier sequence, not even a NaN under a mask, can reach a later one; where a
device works by itself all of a pass are cleared at once, when it begins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from windlass.device.base import Allocator
from windlass.kvcache.pages import PagePool
from windlass.tensors import INT8_ZERO, PagedRows
from windlass.units import round_up

_PLACE_BYTES = 256  # tensors begin at multiples of it
_ALIGN = 16  # elements: a vector of the widest unit
_SCALE = torch.float32
_STATE = torch.float32


@dataclass(frozen=True, slots=True)
class PagedShape:
    """Attention layer whose cache grows. `value_in_key`: values are the first `value_dim` columns
    of the keys (latent attention), nothing else is stored."""

    num_heads: int
    key_dim: int
    value_dim: int
    value_in_key: bool = False

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        widths = [self.key_dim] if self.value_in_key else [self.key_dim, self.value_dim]
        scale = _SCALE.itemsize if dtype is torch.int8 else 0
        row_bytes = [round_up(width, _ALIGN) * dtype.itemsize + scale for width in widths]
        return self.num_heads * sum(row_bytes)


@dataclass(frozen=True, slots=True)
class StateShape:
    """Recurrent layer: what it keeps of a sequence, tensor by tensor."""

    shapes: tuple[tuple[int, ...], ...]

    @property
    def bytes_per_sequence(self) -> int:
        return _STATE.itemsize * sum(prod(shape) for shape in self.shapes)


CacheShape = PagedShape | StateShape


def bytes_per_token(shapes: Sequence[CacheShape | None], dtype: torch.dtype) -> int:
    """Bytes of one position over all layers."""
    return sum(s.bytes_per_token(dtype) for s in shapes if isinstance(s, PagedShape))


def state_bytes(shapes: Sequence[CacheShape | None]) -> int:
    """Bytes of recurrent state of one sequence over all layers; 0 if no layer has any."""
    return sum(s.bytes_per_sequence for s in shapes if isinstance(s, StateShape))


class StateSlots(NamedTuple):
    """Recurrent states: of sequences that run, and behind those kept of blocks of prompts."""

    running: int = 0
    kept: int = 0


NO_STATES = StateSlots()


class KvCache:
    """Pages and state slots in the memory of one device. Owned by the runtime's thread. `dtype` is
    that of rows: a floating type, or int8. Layers whose shape is None keep nothing."""

    def __init__(
        self,
        shapes: Sequence[CacheShape | None],
        memory: Allocator,
        *,
        dtype: torch.dtype,
        num_pages: int,
        page_tokens: int,
        states: StateSlots = NO_STATES,
    ) -> None:
        self._memory = memory
        self.page_tokens = page_tokens
        self.dtype = dtype
        self.num_pages = num_pages
        self._keys: dict[int, PagedRows] = {}
        self._values: dict[int, PagedRows] = {}
        self._stored: dict[int, tuple[PagedRows, ...]] = {}
        self._states: dict[int, tuple[torch.Tensor, ...]] = {}
        num_bytes = num_pages * page_tokens * bytes_per_token(shapes, dtype)
        num_bytes += sum(states) * state_bytes(shapes)
        room = _Room(memory, num_bytes, sum(map(_num_tensors, shapes)))
        self.whole = room.whole
        for layer, shape in enumerate(shapes):
            if shape is None:
                continue
            if isinstance(shape, StateShape):
                self._states[layer] = tuple(
                    room.zeros(sum(states), *own, dtype=_STATE) for own in shape.shapes
                )
                continue
            rows = (num_pages, shape.num_heads, page_tokens)
            keys = self._keys[layer] = _zero_rows(room, rows, shape.key_dim, dtype)
            if shape.value_in_key:
                view = keys.rows_PKBd[..., : shape.value_dim]
                self._values[layer] = PagedRows(view, keys.scales_PKB)
                self._stored[layer] = (keys,)
            else:
                values = self._values[layer] = _zero_rows(room, rows, shape.value_dim, dtype)
                self._stored[layer] = (keys, values)
        self._uncleared: list[int] = []  # pages that were handed out since the last pass began
        self.pool = PagePool(num_pages, range(states.running, sum(states)))
        self._free_states = list(range(states.running - 1, -1, -1))
        self._state_slots = states.running

    @property
    def num_free_pages(self) -> int:
        return self.pool.num_free

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` positions of one sequence take."""
        return -(-num_tokens // self.page_tokens)

    def take_pages(self, count: int) -> list[int]:
        """Hands out pages; there must be enough. They are cleared, or will be by the next pass
        before it writes to any (`uncleared`)."""
        pages = self.pool.take(count)
        if self._memory.streams.runs_ahead:
            self._uncleared += pages
        else:
            self.clear_all(self._memory.tensor(pages, dtype=torch.int64))
        return pages

    def uncleared(self) -> list[int]:
        """Pages that whoever asks is to clear: asked once, by the pass that begins."""
        pages, self._uncleared = self._uncleared, []
        return pages

    def clear_all(self, places: torch.Tensor) -> None:
        """Those pages (int64), in all layers."""
        for layer in self._stored if len(places) else ():
            self.clear(layer, places)

    def clear(self, layer: int, places: torch.Tensor) -> None:
        """Of an attention layer, those pages: (N,) int64."""
        for store in self._stored[layer]:
            _clear(store, places)

    def places(self, layer: int) -> list[tuple[int, int]]:
        """Where in `whole` the pages of an attention layer are: for each of its tensors the byte
        at which the first begins, and the bytes of each."""
        found = []
        for store in self._stored[layer]:
            for one in (store.rows_PKBd, store.scales_PKB):
                if one is not None:
                    at = one.storage_offset() * one.itemsize - self.whole.storage_offset()
                    found.append((int(at), prod(one.shape[1:]) * one.itemsize))
        return found

    def give_pages(self, pages: Sequence[int]) -> None:
        """One holder of each has ended; of a sequence all at once, in its order."""
        self.pool.give(pages)

    def take_state(self) -> int:
        """A slot with zero state; -1 if the model has no recurrent layer."""
        if not self._states:
            return -1
        slot = self._free_states.pop()
        for states in self._states.values():
            for state in states:
                state[slot] = 0
        return slot

    def give_state(self, slot: int) -> None:
        if slot >= 0:
            self._free_states.append(slot)

    @property
    def has_states(self) -> bool:
        """Whether the model has recurrent layers."""
        return bool(self._states)

    @property
    def has_free_state(self) -> bool:
        return not self._states or bool(self._free_states)

    def paged(self, layer: int) -> tuple[PagedRows, PagedRows]:
        """Keys and values of an attention layer."""
        return self._keys[layer], self._values[layer]

    def stored(self, layer: int) -> tuple[PagedRows, ...]:
        """The same, without values that are a view of the keys: what rows are written to."""
        return self._stored[layer]

    def states(self, layer: int) -> tuple[torch.Tensor, ...]:
        """Of all sequences of a recurrent layer: (S, *shape) for each of its shapes."""
        return self._states[layer]

    def check(self, held: Mapping[int, int]) -> None:
        """Nothing is free twice, lost or out of range. `held`: holders of pages that have any."""
        self.pool.check(held)
        free = self._free_states
        assert len(set(free)) == len(free), "a state slot was given back twice"
        assert all(0 <= slot < self._state_slots for slot in free), "a free slot is out of range"


class _Room:
    """Memory for several tensors, side by side: an allocator of a device would round up each."""

    def __init__(self, memory: Allocator, num_bytes: int, num_tensors: int) -> None:
        self.whole = memory.zeros(num_bytes + num_tensors * _PLACE_BYTES, dtype=torch.uint8)
        self._at = 0

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Those that come next."""
        begin, size = self._at, dtype.itemsize * prod(shape)
        self._at += round_up(size, _PLACE_BYTES)
        return self.whole[begin : begin + size].view(dtype).view(shape)


def _num_tensors(shape: CacheShape | None) -> int:
    """That a layer has, at most."""
    if shape is None:
        return 0
    return len(shape.shapes) if isinstance(shape, StateShape) else 4


def _zero_rows(
    room: _Room, rows: tuple[int, int, int], width: int, dtype: torch.dtype
) -> PagedRows:
    shape = (*rows, round_up(width, _ALIGN))
    if dtype is not torch.int8:
        return PagedRows(room.zeros(*shape, dtype=dtype))
    codes = room.zeros(*shape, dtype=torch.uint8).fill_(INT8_ZERO)
    return PagedRows(codes, room.zeros(*rows, dtype=_SCALE))


def _clear(store: PagedRows, pages_P: torch.Tensor) -> None:
    zero = 0 if store.scales_PKB is None else INT8_ZERO
    store.rows_PKBd.index_fill_(0, pages_P, zero)
    if store.scales_PKB is not None:
        store.scales_PKB.index_fill_(0, pages_P, 0)

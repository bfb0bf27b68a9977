"""Keys, values and recurrent states of live sequences. Knows pages and state slots, not requests.

A page holds `page_tokens` positions of one sequence in all attention layers. Rows are stored in the
checkpoint's type, as transformers and vLLM do, and as wide as alignment asks (zeros beyond);
recurrent states are fp32. A page is cleared when it is handed out, so that
nothing of an earlier sequence, not even a NaN under a mask, can reach a later one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from windlass.units import round_up

_ALIGN = 16  # elements: rows start at multiples of 64 bytes


@dataclass(frozen=True, slots=True)
class PagedShape:
    """Attention layer whose cache grows. `value_in_key`: values are the first `value_dim` columns
    of the keys (latent attention), nothing else is stored."""

    num_heads: int
    key_dim: int
    value_dim: int
    value_in_key: bool = False

    @property
    def elements_per_token(self) -> int:
        width = round_up(self.key_dim, _ALIGN)
        if not self.value_in_key:
            width += round_up(self.value_dim, _ALIGN)
        return self.num_heads * width


@dataclass(frozen=True, slots=True)
class StateShape:
    """Recurrent layer: a convolution window (channels, kernel - 1) and a matrix per head."""

    conv: tuple[int, int]
    state: tuple[int, int, int]

    @property
    def bytes_per_sequence(self) -> int:
        heads, rows, columns = self.state
        return 4 * (self.conv[0] * self.conv[1] + heads * rows * columns)


CacheShape = PagedShape | StateShape


def bytes_per_token(shapes: Sequence[CacheShape], dtype: torch.dtype) -> int:
    """Bytes of one position over all layers."""
    elements = sum(s.elements_per_token for s in shapes if isinstance(s, PagedShape))
    return elements * dtype.itemsize


def state_bytes(shapes: Sequence[CacheShape]) -> int:
    """Bytes of recurrent state of one sequence over all layers; 0 if no layer has any."""
    return sum(s.bytes_per_sequence for s in shapes if isinstance(s, StateShape))


class KvStore:
    """Pages and state slots of one device. Owned by the runtime's thread."""

    def __init__(
        self,
        shapes: Sequence[CacheShape],
        *,
        dtype: torch.dtype,
        num_pages: int,
        page_tokens: int,
        state_slots: int,
    ) -> None:
        self.page_tokens = page_tokens
        self.num_pages = num_pages
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer, shape in enumerate(shapes):
            if isinstance(shape, StateShape):
                conv = torch.zeros(state_slots, *shape.conv)
                self._states[layer] = (conv, torch.zeros(state_slots, *shape.state))
                continue
            rows = (num_pages, shape.num_heads, page_tokens)
            key = torch.zeros(*rows, round_up(shape.key_dim, _ALIGN), dtype=dtype)
            self._keys[layer] = key
            self._values[layer] = (
                key[..., : shape.value_dim]
                if shape.value_in_key
                else torch.zeros(*rows, round_up(shape.value_dim, _ALIGN), dtype=dtype)
            )
        self._free_pages = list(range(num_pages - 1, -1, -1))
        self._free_states = list(range(state_slots - 1, -1, -1))
        self._state_slots = state_slots

    @property
    def num_free_pages(self) -> int:
        return len(self._free_pages)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` positions of one sequence take."""
        return -(-num_tokens // self.page_tokens)

    def take_pages(self, count: int) -> list[int]:
        """Hands out cleared pages; there must be enough."""
        assert count <= len(self._free_pages), "admission must not promise pages that are not free"
        pages = [self._free_pages.pop() for _ in range(count)]
        for layer, key in self._keys.items():
            key[pages] = 0
            if self._values[layer].data_ptr() != key.data_ptr():
                self._values[layer][pages] = 0
        return pages

    def give_pages(self, pages: Sequence[int]) -> None:
        self._free_pages.extend(pages)

    def take_state(self) -> int:
        """A slot with zero state; -1 if the model has no recurrent layer."""
        if not self._states:
            return -1
        slot = self._free_states.pop()
        for conv, state in self._states.values():
            conv[slot] = 0
            state[slot] = 0
        return slot

    def give_state(self, slot: int) -> None:
        if slot >= 0:
            self._free_states.append(slot)

    @property
    def has_free_state(self) -> bool:
        return not self._states or bool(self._free_states)

    def append(
        self,
        layer: int,
        place: tuple[torch.Tensor, torch.Tensor],
        key_TKd: torch.Tensor,
        value_TKv: torch.Tensor,
    ) -> None:
        """Writes rows at `place` = (page of each row, offset in the page)."""
        pages, offsets = place
        key, value = self._keys[layer], self._values[layer]
        key[pages, :, offsets, : key_TKd.shape[2]] = key_TKd.to(key.dtype)
        if value.data_ptr() != key.data_ptr():
            value[pages, :, offsets, : value_TKv.shape[2]] = value_TKv.to(value.dtype)

    def paged(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (P, K, B, d) and values (P, K, B, v) of an attention layer."""
        return self._keys[layer], self._values[layer]

    def states(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolution windows (S, channels, kernel - 1) and states (S, heads, dk, dv)."""
        return self._states[layer]

    def check(self) -> None:
        """Nothing is free twice, nothing out of range."""
        for free, total in (
            (self._free_pages, self.num_pages),
            (self._free_states, self._state_slots),
        ):
            assert len(set(free)) == len(free), "a page or state slot was given back twice"
            assert all(0 <= slot < total for slot in free), "a free slot is out of range"

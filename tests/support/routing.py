"""Passes and routing by hand, for what only counts them."""

from collections.abc import Callable, Mapping

import numpy as np

from windlass.schedule.batch import Batch, RowGroup, Segment, make_batch
from windlass.schedule.observer import RoutedTokens


def rows(count: int, *, is_prompt: bool = False) -> Batch:
    """A pass over `count` tokens, one of each sequence, or a prompt."""
    lengths = [count] if is_prompt else [1] * count
    segments = [
        Segment(
            sequence=i, token_ids=(0,) * length, first_position=0, pages=(), state_slot=-1,
            is_prompt=is_prompt, long_rope=False, wants_logits=True,
        )
        for i, length in enumerate(lengths)
    ]  # fmt: skip
    return make_batch(segments, micro_batch_tokens=1 << 20)


def segment(sequence: int, count: int, first: int, *, ends: bool = True) -> Segment:
    """Tokens of a sequence from position `first` on: of its prompt, where they are several or the
    first. `ends`: another token follows, not more of the prompt."""
    return Segment(
        sequence=sequence, token_ids=(0,) * count, first_position=first, pages=(), state_slot=-1,
        is_prompt=count > 1 or not first, long_rope=False, wants_logits=ends,
    )  # fmt: skip


def passing(*segments: Segment) -> Batch:
    """A pass over them."""
    return make_batch(list(segments), micro_batch_tokens=1 << 20)


def told(layer: int, counts: Mapping[int, int], num_experts: int) -> RoutedTokens:
    """So many tokens of each expert."""
    counts_E = np.zeros(num_experts, np.int64)
    for expert, count in counts.items():
        counts_E[expert] = count
    return RoutedTokens(layer, rows(1), counts_E)


class CountingRouter:
    """Implements the clock's `Router` by a function of layer and rows to rows by expert."""

    def __init__(self, counts: Callable[[int, int], Mapping[int, int]], num_experts: int) -> None:
        self._counts = counts
        self._num_experts = num_experts

    def begin(self, batch: Batch) -> None:
        return None

    def route(self, layer: int, batch: Batch, group: RowGroup) -> RoutedTokens:
        counts = self._counts(layer, group.num_tokens)
        return told(layer, counts, self._num_experts)._replace(batch=batch)

    def end(self) -> None:
        return None

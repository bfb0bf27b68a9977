"""What recurrent layers have in common: the rows of sequences that a call has, chunks, and the
short convolution. Pure math.

Shapes: T rows, C channels of a convolution, K taps, n rows of one sequence, H heads, L = CHUNK
positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from windlass.kernels.interface import Kernels
from windlass.tensors import Tensors, plain, plain_or_none

CHUNK = 64  # positions; where a prompt is cut between passes, the cut is at a multiple of this
_ALIGNMENT = 64  # bytes; a product's rounding may depend on where its operand lies


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSegment:
    """The rows of one sequence in a call: consecutive rows, consecutive positions, one kind."""

    first_row: int
    num_rows: int
    first_position: int  # 0: the state starts fresh
    slot: int  # of the sequence in the state tensors
    is_prompt: bool
    source: int = -1  # slot of the state that it goes on from, if that is another
    kept: tuple[tuple[int, int], ...] = ()  # after so many rows, whole chunks: to that slot too

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_rows)


class StateRows(NamedTuple):
    """The rows of all sequences of a call; of those that have a single one, a generated one, that
    row and their slot, int64, in memory of the device that computes."""

    segments: Sequence[StateSegment]
    single_rows: torch.Tensor
    single_slots: torch.Tensor


def begin(segment: StateSegment, state: torch.Tensor) -> None:
    """Makes the state of a sequence what its rows go on from. Segments of a call begin in their
    order, each after what those before it have kept."""
    assert not (segment.is_prompt and segment.first_position % CHUNK), "prompt cut inside a chunk"
    if segment.source >= 0:
        state[segment.slot] = state[segment.source]
    elif segment.first_position == 0:
        state[segment.slot].zero_()


def convolve(x_TC: torch.Tensor, w: Tensors, rows: StateRows, state: torch.Tensor) -> torch.Tensor:
    """Causal convolution per channel, over each sequence's rows and the last ones before them,
    which `state` (slots, C, K - 1) holds and is advanced. `w`: `conv.weight` (C, K), `conv.bias`
    where the part has it."""
    taps_CK, bias_C = plain(w, "conv.weight").float(), plain_or_none(w, "conv.bias")
    out_TC = x_TC.new_empty(x_TC.shape)
    # decoding sequences have one row each and go together: sums are elementwise, in tap order
    segments, single, slots = rows
    if len(single):
        window = torch.cat((state[slots], x_TC[single, :, None]), dim=2)
        out_TC[single] = _taps(window.unbind(2), taps_CK)
        state[slots] = window[:, :, 1:]
    for segment in segments:
        if segment.num_rows > 1 or segment.is_prompt:
            begin(segment, state)
            window_nC = torch.cat((state[segment.slot].T, x_TC[segment.rows]))
            shifted = [window_nC[i : i + segment.num_rows] for i in range(taps_CK.shape[1])]
            out_TC[segment.rows] = _taps(shifted, taps_CK)
            for count, slot in ((segment.num_rows, segment.slot), *segment.kept):
                state[slot] = window_nC[count : count + taps_CK.shape[1] - 1].T
    return out_TC if bias_C is None else out_TC.add_(bias_C.float())


def _taps(shifted: Sequence[torch.Tensor], taps_CK: torch.Tensor) -> torch.Tensor:
    total = shifted[0] * taps_CK[:, 0]
    for i in range(1, taps_CK.shape[1]):
        total += shifted[i] * taps_CK[:, i]
    return total


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """(n, H, ...) -> contiguous (H, CHUNK, ...), zeros beyond the rows."""
    padded = x.new_zeros(x.shape[1], CHUNK, *x.shape[2:])
    padded[:, : x.shape[0]] = x.transpose(0, 1)
    return padded


def scan(
    advance: Callable[[slice, torch.Tensor, bool], torch.Tensor],
    segments: Sequence[StateSegment],
    states: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """`out`, filled with what `advance` gives for rows of one sequence, its state, which it
    advances, and whether they are prompt: chunk by chunk then, else row by row."""
    for segment in segments:
        begin(segment, states)
        own, kept = states[segment.slot], dict(segment.kept)
        state = own if own.data_ptr() % _ALIGNMENT == 0 else own.clone()
        step = CHUNK if segment.is_prompt else 1
        for first in range(segment.first_row, segment.rows.stop, step):
            rows = slice(first, min(first + step, segment.rows.stop))
            out[rows] = advance(rows, state, segment.is_prompt)
            if (slot := kept.get(rows.stop - segment.first_row)) is not None:
                states[slot] = state
        if state is not own:
            own.copy_(state)
    return out


class Decays(NamedTuple):
    """By how much a state of each head decays: from a chunk's row to a later one, from before the
    chunk to each row, from each row to the chunk's end."""

    within_HLL: torch.Tensor
    from_start_HL1: torch.Tensor
    to_end_HL1: torch.Tensor

    @classmethod
    def of(cls, kernels: Kernels, log_decay_HL: torch.Tensor) -> "Decays":
        until_HL = log_decay_HL.cumsum(dim=-1)  # from before the chunk to each row
        within_HLL = until_HL[:, :, None] - until_HL[:, None]
        # the upper triangle is never used; 0 keeps exp finite there
        return cls(
            kernels.pointwise(torch.exp, within_HLL.tril()).tril(),
            kernels.pointwise(torch.exp, until_HL)[..., None],
            kernels.pointwise(torch.exp, until_HL[:, -1:] - until_HL)[..., None],
        )

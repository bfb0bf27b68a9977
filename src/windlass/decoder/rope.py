"""Rotary positions: frequencies, and tables of cos and sin. Pure math.

Shapes: T rows, f = rope.dim / 2 frequencies.
"""

import math

import torch

from windlass.device.base import Allocator
from windlass.models.spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NoScaling,
    ProportionalScaling,
    Rope,
    YarnScaling,
)

# Positions computed by one call. Vectorised cos and sin use other code for the tail of a tensor and
# where threads split it; a position always lies at the same place of a tensor of the same shape,
# too small (below 32768 elements) to be split.
_MAX_BLOCK_ELEMENTS = 16_384


def frequencies(rope: Rope, *, long: bool = False) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair (f,) in fp32, and the factor on cos and sin.

    `long` chooses LongRoPE's second set of factors; other kinds ignore it. Computed in fp32, as
    where the models were trained: at position 100 000 one unit in the last place is a hundredth of
    a radian.
    """
    steps_f = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    periods_f = rope.theta**steps_f
    match rope.scaling:
        case NoScaling():
            return 1.0 / periods_f, 1.0
        case LinearScaling(factor):
            return 1.0 / periods_f / factor, 1.0
        case Llama3Scaling() as scaling:
            return _llama3(1.0 / periods_f, scaling), 1.0
        case ProportionalScaling(pairs=pairs, factor=factor):
            turning_f = torch.arange(rope.dim // 2) < pairs
            return torch.where(turning_f, 1.0 / periods_f / factor, 0.0), 1.0
        case YarnScaling() as scaling:
            return _yarn(periods_f, rope, scaling), scaling.attention_factor
        case LongRopeScaling() as scaling:
            factors = torch.tensor(scaling.long if long else scaling.short, dtype=torch.float32)
            on_cos = scaling.long_attention_factor if long else scaling.short_attention_factor
            return 1.0 / (factors * periods_f), on_cos


def _llama3(plain_f: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    wavelength_f = 2 * math.pi / plain_f
    slow, fast = scaling.low_freq_factor, scaling.high_freq_factor
    keep_f = (scaling.original_max / wavelength_f - slow) / (fast - slow)
    mixed_f = (1 - keep_f) * plain_f / scaling.factor + keep_f * plain_f
    scaled_f = torch.where(
        wavelength_f > scaling.original_max / slow, plain_f / scaling.factor, mixed_f
    )
    return torch.where(wavelength_f < scaling.original_max / fast, plain_f, scaled_f)


def _yarn(periods_f: torch.Tensor, rope: Rope, scaling: YarnScaling) -> torch.Tensor:
    def dimension(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times within the original context."""
        turns = scaling.original_max / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high += 0.001 if low == high else 0  # keeps the ramp finite
    ramp_f = (torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)
    keep_f = 1 - ramp_f.clamp(0, 1)
    return 1.0 / (scaling.factor * periods_f) * (1 - keep_f) + 1.0 / periods_f * keep_f


def bytes_per_position(rope: Rope) -> int:
    """Memory of one position in one table; LongRoPE has two tables."""
    return rope.dim * 4


class RopeTable:
    """Cos and sin of one kind of rotary positions in the memory of one device, computed by the host
    block by block as positions are asked: their bits are the same on every device.

    Holds `bytes_per_position` for each position up to the largest seen.
    """

    def __init__(self, rope: Rope, memory: Allocator) -> None:
        self.rope = rope
        self._memory = memory
        self._block = max(1, _MAX_BLOCK_ELEMENTS // (rope.dim // 2))
        self._tables: dict[bool, torch.Tensor] = {}  # long? -> (positions, 2, f)

    def cos_sin(
        self,
        positions_T: torch.Tensor,
        *,
        long_T: torch.Tensor | bool = False,
        below: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (T, f) of each row's position (int64), times the attention factor.

        `long_T` says which rows belong to sequences that may outgrow the original context; only
        LongRoPE looks at it. `below`: positions are less than this; where that is not known they
        are looked at, and a device that has them is waited for.
        """
        if below is None:
            below = int(positions_T.max()) + 1 if positions_T.numel() else 0
        if not isinstance(self.rope.scaling, LongRopeScaling):
            rows = self._rows(positions_T, below, long=False)
        elif isinstance(long_T, bool):
            rows = self._rows(positions_T, below, long=long_T)
        else:
            # every row is looked up in both: a look-up is cheap, and rows stay in place
            both = [self._rows(positions_T, below, long=long) for long in (False, True)]
            rows = torch.where(long_T[:, None, None], both[1], both[0])
        return rows[:, 0], rows[:, 1]

    def _rows(self, positions_T: torch.Tensor, needed: int, *, long: bool) -> torch.Tensor:
        table = self._tables.get(long)
        if table is None or table.shape[0] < needed:
            table = self._tables[long] = self._grow(table, needed, long=long)
        return table[positions_T]

    def _grow(self, table: torch.Tensor | None, needed: int, *, long: bool) -> torch.Tensor:
        inv_freq_f, factor = frequencies(self.rope, long=long)
        blocks = [] if table is None else [table]
        start = 0 if table is None else table.shape[0]
        for first in range(start, max(needed, 1), self._block):
            # fp32 angles as in training; cos and sin of them exact to fp32
            positions = torch.arange(first, first + self._block, dtype=torch.float32)
            angles = (positions[:, None] * inv_freq_f).double()
            block = torch.stack((angles.cos(), angles.sin()), dim=1).float() * factor
            blocks.append(self._memory.tensor(block, dtype=torch.float32))
        return torch.cat(blocks)

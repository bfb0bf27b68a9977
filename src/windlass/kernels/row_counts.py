"""Row-independent matrix products from a library that does not promise them.

A BLAS may sum a row in another order when the number of rows changes (a vector kernel for one row,
edge kernels for a remainder). Which row counts agree bit for bit is a property of the library, the
processor and the shape, so it is measured once per shape: `RowLadder` admits a row count only if
every row of a random product equals the same row computed in the smallest block. Calls are padded
up to an admitted count. If none but the smallest agrees, everything runs in blocks of that size:
slower, never different. The padding is at most a third above 16 rows.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from windlass.kernels.limits import PROBE_BYTES
from windlass.units import round_up

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ALIGN = 64  # bytes; what torch's allocator gives, and a multiple of all vector lengths


class Steps(NamedTuple):
    """Row counts that are compared."""

    counts: tuple[int, ...]  # ascending
    bases: tuple[int, ...]  # rows of the smallest block, ascending: the first that will do
    least: int  # rows: what a base will do for if it is admitted with others
    probe_bytes: int  # of the rows and results that are compared


# sgemm is at its full rate at 512 rows; larger calls are cut
# and fewer than 16 take no less time than 16
HOST_STEPS = Steps((16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512), (8, 16, 32), 0, PROBE_BYTES)


class RowLadder:
    """Admitted row counts per (inner, outer) shape of one product function."""

    def __init__(
        self,
        product: Product,
        *,
        steps: Steps = HOST_STEPS,
        like: torch.Tensor | None = None,
    ) -> None:
        """`like`: of the type and on the device of what is multiplied; fp32 on the host if None."""
        self._product = product
        self._steps, self._like = steps, like
        self._admitted: dict[tuple[int, ...], tuple[int, ...]] = {}

    def counts(self, weight_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Ascending row counts that agree bit for bit for weights (..., out, in) of this shape."""
        found = self._admitted.get(weight_shape)
        if found is None:
            found = self._measure(weight_shape)
            self._admitted[weight_shape] = found
        return found

    def blocks(self, num_rows: int, weight_shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """Cuts `num_rows` into (first, last, padded count) blocks of admitted counts."""
        counts = self.counts(weight_shape)
        largest, cuts = counts[-1], []
        for first in range(0, num_rows, largest):
            last = min(first + largest, num_rows)
            cuts.append((first, last, next(c for c in counts if c >= last - first)))
        return cuts

    def _measure(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        steps = _within_probe(self._steps, shape)
        bases, least = self._steps.bases, self._steps.least
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(shape, generator=generator)
        x = torch.randn(*shape[:-2], steps[-1], shape[-1], generator=generator)
        if self._like is not None:
            weight, x = weight.to(self._like), x.to(self._like)
        for base in bases:
            reference = torch.cat(
                [
                    self._product(x[..., i : i + base, :].clone(), weight)
                    for i in range(0, steps[-1], base)
                ],
                dim=-2,
            )
            admitted = [
                count
                for count in steps
                if count % base == 0 and self._agrees(x, weight, reference, count)
            ]
            if (len(admitted) > 1 and admitted[-1] >= least) or base == bases[-1]:
                return tuple(admitted) or (base,)
        raise AssertionError("unreachable: the last base always returns")

    def _agrees(
        self, x: torch.Tensor, weight: torch.Tensor, reference: torch.Tensor, count: int
    ) -> bool:
        """Whether `count` rows together, and the same rows one place further, give the bits of the
        reference."""
        first = self._product(x[..., :count, :].clone(), weight)
        if not torch.equal(first, reference[..., :count, :]):
            return False
        moved = torch.cat((x[..., -1:, :], x[..., : count - 1, :]), dim=-2)
        found = self._product(moved, weight)
        return torch.equal(found[..., 1:, :], reference[..., : count - 1, :])


def _within_probe(steps: Steps, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row counts to compare."""
    per_row = 4 * math.prod(shape[:-2]) * max(shape[-2:])
    most = max(steps.bases[-1], steps.probe_bytes // per_row)
    return tuple(count for count in steps.counts if count <= most)


def padded_width(width: int) -> int:
    """Inner dimension of every product: rows then start at multiples of `ALIGN` bytes. MKL sums a
    row in another order when its address is not a multiple of 16."""
    return round_up(width, ALIGN // 4)


def pad_rows(x: torch.Tensor, count: int) -> torch.Tensor:
    """fp32 `x` (..., T, D) -> (..., count, padded width), zeros around; aligned and contiguous."""
    num_rows, width = x.shape[-2:]
    wide = padded_width(width)
    if (num_rows, width) == (count, wide) and x.is_contiguous() and x.data_ptr() % ALIGN == 0:
        return x
    padded = x.new_zeros(*x.shape[:-2], count, wide)
    padded[..., :num_rows, :width] = x
    return padded

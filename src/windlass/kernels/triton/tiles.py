"""Which tiles an architecture takes: a table, not a search at run time, because the order of sums,
and so the bits, follow from it. Chosen by what ptxas makes of them
(bench/gpu/kernel_table.json); docs/gpu.md says what was measured."""

from dataclasses import replace

import torch
import triton.language as tl

from windlass.kernels.triton.launch import ExpertSlots, Tile
from windlass.kernels.triton.matrix import Matrix

_FOUR_BITS = "int4", "e2m1"


def expert_tile(experts: ExpertSlots, compute: torch.dtype, *, rows: int) -> Tile:
    """For tiles of `rows` (16 or 32) rows in the type `compute`. 128 columns of 4 bits took 255
    registers, 64 take 168; in fp32 gate and up of 4 bits spill with 4 warps."""
    assert rows in (16, 32), "from 64 rows on Hopper has another instruction, with other sums"
    if compute is torch.float32:
        tile = _fp32_tile(experts.up, rows)
        return replace(tile, warps=8) if experts.up.code.value in _FOUR_BITS else tile
    return Tile(rows=rows, features=64, columns=64)


def linear_tile(w: Matrix, compute: torch.dtype, *, rows: int) -> Tile:
    """For so many rows in the type `compute`; only a tile's rows depend on their number."""
    most = 16 if rows <= 16 else 32
    if compute is torch.float32:
        return _fp32_tile(w, most)
    return Tile(rows=most, columns=64 if w.code.value == "plain" else 128)


def _fp32_tile(w: Matrix, rows: int) -> Tile:
    """Products of fp32 are no tensor core's: smaller tiles, and no copies ahead of weights that are
    widened, for want of registers (docs/gpu.md)."""
    features = 64 if w.code.value in _FOUR_BITS else 32  # loads of 8 bytes
    is_same = w.element.value == tl.float32
    return Tile(rows=rows, features=features, columns=32, stages=3 if is_same else 1)


def few_tile() -> Tile:
    """For few rows, without a dot. 512 columns of 4 bits took 168 registers, 256 take 80."""
    return Tile(rows=1, features=16, columns=256)

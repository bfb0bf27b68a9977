"""Which tiles an architecture takes: a table, not a search at run time, because the order of sums,
and so the bits, follow from it. Chosen by what ptxas makes of them
(bench/gpu/kernel_table.json); docs/gpu.md says what was measured."""

from windlass.kernels.triton.launch import ExpertSlots, Tile


def row_tile(capability: int, experts: ExpertSlots, *, rows: int) -> Tile:
    """For tiles of `rows` (16 or 32) rows. `capability`: 90 for sm_90. 128 columns of 4 bits took
    255 registers, 64 take 168."""
    assert rows in (16, 32), "from 64 rows on Hopper has another instruction, with other sums"
    return Tile(rows=rows, features=64, columns=64)


def few_tile(capability: int, experts: ExpertSlots) -> Tile:
    """For few rows, without a dot. 512 columns of 4 bits took 168 registers, 256 take 80."""
    return Tile(rows=1, features=16, columns=256)

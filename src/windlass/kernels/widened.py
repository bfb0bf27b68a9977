"""fp32 copies of stored weights, for products that need them wide. Shape legend:
kernels/interface.py."""

import math
from collections.abc import Iterator

import torch

from windlass.kernels.dequantise import dequantise
from windlass.kernels.limits import TILE_BYTES, UNPACK_BYTES
from windlass.kernels.row_counts import padded_width
from windlass.tensors import Packed, PackedStack, Weight


class WidenedWeights:
    """Widens weights tile by tile, always into the same memory: a tile of at most TILE_BYTES stays
    in the last-level cache."""

    def __init__(self) -> None:
        self._scratch = torch.empty(TILE_BYTES // 4)

    def tiles(self, w: Weight, width: int) -> Iterator[torch.Tensor]:
        """fp32 copies (n, padded width) of the weights in the scratch, tile by tile; each valid
        until the next."""
        if isinstance(w, PackedStack):
            for matrix in w.matrices:
                yield from self.tiles(matrix, width)
        elif isinstance(w, Packed):
            rows = max(1, TILE_BYTES // (4 * width))
            for first in range(0, w.shape[0], rows):
                yield self._unpack(w, first, min(first + rows, w.shape[0]))
        else:
            for tile in _tiles(w, width):
                view = self._wide(tile.shape[:-1], width)
                view[..., :width] = tile
                yield view.view(-1, view.shape[-1])

    def _unpack(self, w: Packed, first: int, last: int) -> torch.Tensor:
        width = w.shape[1]
        view = self._wide((last - first,), width)
        # in steps: what dequantising makes on the way is several times as large as its result
        step = max(1, UNPACK_BYTES // (4 * width))
        for row in range(first, last, step):
            end = min(row + step, last)
            view[row - first : end - first, :width] = dequantise(w, row, end)
        return view

    def _wide(self, outer: tuple[int, ...], width: int) -> torch.Tensor:
        """The scratch as (*outer, padded width), zeros beyond `width`."""
        wide = padded_width(width)
        size = math.prod(outer) * wide
        if size > self._scratch.numel():  # one output row wider than the tile
            self._scratch = torch.empty(size)
        view = self._scratch[:size].view(*outer, wide)
        if wide != width:
            view[..., width:] = 0
        return view


def widened_heads(w_Hba: Weight, heads: slice) -> torch.Tensor:
    """fp32 matrices of some heads of (H, b, a)."""
    if isinstance(w_Hba, torch.Tensor):
        return w_Hba[heads].float()
    assert isinstance(w_Hba, PackedStack), "heads of one packed matrix"
    matrices = w_Hba.matrices[heads]
    wide = torch.empty(len(matrices), *matrices[0].shape)
    for view, matrix in zip(wide, matrices, strict=True):
        view.copy_(dequantise(matrix, 0, matrix.shape[0]))
    return wide


def _tiles(w: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    """`w` (E, D) or (g, n, D) cut along its first dimension into tiles of at most TILE_BYTES."""
    if 4 * w.numel() <= TILE_BYTES:
        return (w,)
    per_index = 4 * w.numel() // w.shape[0]
    return torch.split(w, max(1, TILE_BYTES // per_index))

"""Causal softmax attention over paged keys and values, without padding to a longest sequence.

Rows become tiles: `TILE_ROWS` consecutive prompt tokens, or one generated token. All tiles of the
call walk over their key blocks together, with a running maximum, sum and output per row
(FlashAttention, arXiv 2205.14135). Blocks lie at fixed positions of the sequence; a block that is
masked for a row leaves its running values bit for bit as they were (factor exp(0) = 1, addend 0),
so a row's result does not depend on how rows were cut into chunks and tiles, nor on other
sequences. Shape legend: kernels/interface.py; Q rows of a tile, n tiles, G = H / K.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from windlass.kernels.interface import AttentionOptions, AttentionWork
from windlass.kernels.limits import (
    ATTENTION_ELEMENTS,
    BLOCK_PAGES,
    TILE_ROWS,
    attention_tile_elements,
)
from windlass.tensors import INT8_ZERO, PagedRows

Pointwise = Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]

_LOWEST = -1e30  # instead of -inf: differences of two masked rows stay finite


@dataclass(frozen=True, slots=True)
class _Tile:
    row: int  # first row in the call
    num_rows: int
    position: int  # of its first row
    pages: tuple[int, ...]


def paged_attention(
    pointwise: Pointwise,
    q_THd: torch.Tensor,
    keys: PagedRows,
    values: PagedRows,
    work: AttentionWork,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention of every row of the call -> (T, H, v); see `Kernels.attention`."""
    num_rows, num_heads, key_dim = q_THd.shape
    _, num_kv_heads, page_tokens, key_width = keys.rows_PKBd.shape
    widths = (key_width, values.rows_PKBd.shape[3])
    out = q_THd.new_empty(num_rows, num_heads, options.value_dim)
    q_THd = pad(q_THd * options.scale, (0, key_width - key_dim))
    walk = _Walk(pointwise, q_THd, keys, values, options)
    for rows_per_tile, tiles in ((TILE_ROWS, _tiles(work, True)), (1, _tiles(work, False))):
        per_tile = attention_tile_elements(
            num_heads, num_kv_heads, widths, rows=rows_per_tile, page_tokens=page_tokens
        )
        step = max(1, ATTENTION_ELEMENTS // per_tile)
        tiles.sort(key=lambda tile: tile.position)  # tiles of like length walk together
        for first in range(0, len(tiles), step):
            walk.run(tiles[first : first + step], rows_per_tile, out)
    return out


def _tiles(work: AttentionWork, is_prompt: bool) -> list[_Tile]:
    tiles = []
    size = TILE_ROWS if is_prompt else 1
    for i, kind in enumerate(work.is_prompt):
        if kind is not is_prompt:
            continue
        for offset in range(0, work.num_rows[i], size):
            rows = min(size, work.num_rows[i] - offset)
            position = work.first_position[i] + offset
            tiles.append(_Tile(work.first_row[i] + offset, rows, position, work.pages[i]))
    return tiles


class _Walk:
    """The walk of tiles over key blocks. Holds the call's tensors, changes only `out`."""

    def __init__(
        self,
        pointwise: Pointwise,
        q_THd: torch.Tensor,
        keys: PagedRows,
        values: PagedRows,
        options: AttentionOptions,
    ) -> None:
        self._pointwise = pointwise
        self._q_THd = q_THd
        self._keys = keys
        self._values = values
        self._options = options
        self._block_tokens = BLOCK_PAGES * keys.rows_PKBd.shape[2]

    def run(self, tiles: list[_Tile], size: int, out: torch.Tensor) -> None:
        """Attention of `tiles`, all of `size` rows (the last of a chunk padded), into `out`."""
        heads, groups = self._q_THd.shape[1], self._keys.rows_PKBd.shape[1]
        rows = torch.tensor([[t.row + min(i, t.num_rows - 1) for i in range(size)] for t in tiles])
        starts = torch.tensor([t.position for t in tiles])
        position_nQ = starts[:, None] + torch.arange(size)
        q = self._q_THd[rows]  # (n, Q, H, d)
        share = heads // groups
        q = q.view(len(tiles), size, groups, share, -1).permute(0, 2, 1, 3, 4)
        q = q.reshape(len(tiles), groups, size * share, -1)  # (n, K, Q G, d)
        first = [self._first_block(tile) for tile in tiles]
        count = [(t.position + t.num_rows - 1) // self._block_tokens + 1 - f
                 for t, f in zip(tiles, first, strict=True)]  # fmt: skip
        top = q.new_full(q.shape[:3], _LOWEST)
        total = q.new_zeros(q.shape[:3])
        acc = q.new_zeros(*q.shape[:3], self._values.rows_PKBd.shape[3])
        for step in range(max(count)):
            live = [i for i, blocks in enumerate(count) if step < blocks]
            pick = slice(None) if len(live) == len(tiles) else torch.tensor(live)
            block = torch.tensor([first[i] + step for i in live])
            pages = torch.tensor([self._pages(tiles[i], first[i] + step) for i in live])
            mask = self._mask(position_nQ[pick], block)
            new = self._step(q[pick], pages, mask, (top[pick], total[pick], acc[pick]))
            top[pick], total[pick], acc[pick] = new
        result = self._finish(top, total, acc, groups)
        result = result.view(len(tiles), groups, size, share, -1).permute(0, 2, 1, 3, 4)
        valid = torch.tensor([[i < t.num_rows for i in range(size)] for t in tiles])
        out[rows[valid]] = result.flatten(2, 3)[valid][..., : out.shape[2]]

    def _first_block(self, tile: _Tile) -> int:
        window = self._options.window
        oldest = 0 if window is None else max(0, tile.position - window + 1)
        return oldest // self._block_tokens

    def _pages(self, tile: _Tile, block: int) -> list[int]:
        """Pages of a block; positions past the last page are masked, so any page will do there."""
        pages = tile.pages[block * BLOCK_PAGES : (block + 1) * BLOCK_PAGES]
        return [*pages, *[pages[-1]] * (BLOCK_PAGES - len(pages))]

    def _mask(self, position_nQ: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """True where the query may not look: (n, Q, tokens of the block)."""
        key_position = block[:, None] * self._block_tokens + torch.arange(self._block_tokens)
        distance = position_nQ[:, :, None] - key_position[:, None, :]
        hidden = distance < 0
        if self._options.window is not None:
            hidden |= distance >= self._options.window
        return hidden

    def _step(
        self,
        q: torch.Tensor,
        pages: torch.Tensor,
        mask: torch.Tensor,
        state: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One key block for the live tiles: new running maximum, sum and output."""
        top, total, acc = state
        tiles, groups, rows = q.shape[:3]
        keys, values = _gather(self._keys, pages), _gather(self._values, pages)
        scores = torch.bmm(q.flatten(0, 1), keys.transpose(1, 2))
        scores = scores.view(tiles, groups, mask.shape[1], rows // mask.shape[1], -1)
        scores.masked_fill_(mask[:, None, :, None, :], float("-inf"))
        scores = scores.view(tiles, groups, rows, -1)
        new_top = torch.maximum(top, scores.amax(-1))
        weights = self._pointwise(torch.exp, scores.sub_(new_top[..., None]))
        fade = self._pointwise(torch.exp, top - new_top)
        update = torch.bmm(weights.flatten(0, 1), values).view(acc.shape)
        total = total * fade + weights.sum(-1)
        return new_top, total, (acc * fade[..., None]).add_(update)

    def _finish(
        self, top: torch.Tensor, total: torch.Tensor, acc: torch.Tensor, groups: int
    ) -> torch.Tensor:
        sinks = self._options.sinks_H
        if sinks is None:
            return acc / total[..., None]
        per_group = len(sinks) // groups
        sink = sinks.float().view(1, groups, 1, per_group)
        sink = sink.expand(len(top), -1, top.shape[2] // per_group, -1).flatten(2)
        final = torch.maximum(top, sink)
        fade = self._pointwise(torch.exp, top - final)
        total = total * fade + self._pointwise(torch.exp, sink - final)
        return acc * fade[..., None] / total[..., None]


def _gather(store: PagedRows, pages: torch.Tensor) -> torch.Tensor:
    """Blocks of (n, BLOCK_PAGES) pages -> fp32 (n K, tokens of the block, d)."""
    count, per_block = pages.shape
    picked = store.rows_PKBd[pages.flatten()].float()  # (n p, K, B, d)
    if store.scales_PKB is not None:
        picked.sub_(INT8_ZERO).mul_(store.scales_PKB[pages.flatten()][..., None])
    _, groups, page_tokens, width = picked.shape
    picked = picked.view(count, per_block, groups, page_tokens, width).transpose(1, 2)
    return picked.reshape(count * groups, per_block * page_tokens, width)

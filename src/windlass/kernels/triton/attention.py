"""Attention over paged keys and values: a program takes a tile of rows of one sequence, query heads
of one key head and one split of the positions, block by block; then the splits are joined.

Blocks and splits lie at fixed positions of the sequence and are summed in their order; a block that
is masked for a row leaves its sums as they are. So a row's bits depend neither on other rows nor on
how many there are. Blocks before a window are not read. Products are made in the type of the
queries, sums in fp32. Shape legend: kernels/interface.py; M tiles.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from windlass.kernels.cuda_graphs import RowTables
from windlass.kernels.interface import AttentionOptions, AttentionWork, RowTiles
from windlass.tensors import INT8_ZERO, PagedRows

_LOWEST = tl.constexpr(-1e30)  # instead of -inf: differences of two maxima stay finite
_ZERO = tl.constexpr(INT8_ZERO)
_KEPT = 256  # tables of tiles that are kept
_PART_BYTES = 64 << 20  # of what splits leave behind

Table = Callable[[Sequence[int]], torch.Tensor]  # int32, where kernels read them


class AttentionTiles(NamedTuple):
    """Rows of one kind, in tiles: int32, in the memory of the device."""

    pages_SP: torch.Tensor  # of each sequence, oldest first; what follows them is not read
    tiles_5M: torch.Tensor  # `AttentionTile`s; a row at position -1 attends to nothing
    ends: tuple[int, ...]  # of each tile: rows of it and those before
    longest: int  # positions, at least those of the last row of any sequence


class AttentionBlocks(NamedTuple):
    """How a layer's attention is cut: by its shapes and types and the kind of rows alone."""

    lanes: int  # query heads, times rows, of a program
    tokens: int  # positions of a block
    split: int  # positions of a program
    warps: int
    stages: int

    def rows(self, group: int) -> int:
        """Of a tile, where `group` query heads share a key head."""
        return max(1, self.lanes // group)


def attention_blocks(
    group: int, key_dim: int, products: torch.dtype, stored: torch.dtype, *, is_prompt: bool
) -> AttentionBlocks:
    """For `group` query heads of a key head. A split leaves behind a value of every head, so where
    values are wide splits are long. What keeps registers from spilling: docs/gpu.md."""
    split = 1024 if key_dim > 256 else 256
    if products.itemsize == 4:
        lanes = 8 if is_prompt else min(8, triton.next_power_of_2(group))  # no tensor core idles
        is_same = stored.itemsize == 4
        return AttentionBlocks(lanes, 16, split, 8 if key_dim > 128 else 4, 3 if is_same else 1)
    if key_dim <= 256:
        return AttentionBlocks(64 if is_prompt else 16, 32, split, 4, 3)
    if is_prompt or group >= 64:
        return AttentionBlocks(32, 32, split, 8, 2)
    return AttentionBlocks(16, 16, split, 4, 2)


def attention_tiles(work: AttentionWork, kind: RowTiles, table: Table) -> AttentionTiles:
    """Rows of the one kind, of which there are some. `table` is asked for what the pass has not
    sent along with all else (`AttentionWork.tables`)."""
    tiles = work.tiles(kind)
    sent = None if work.tables is None else work.tables.tiles.get(kind)
    if work.tables is not None and sent is not None:
        pages_SP, tiles_5M = work.tables.pages_SP.int(), sent.int()
    else:
        widest = max(map(len, work.pages))
        filled = chain.from_iterable((*own, *[0] * (widest - len(own))) for own in work.pages)
        pages_SP = table([*filled]).view(-1, widest)
        tiles_5M = table([*chain.from_iterable(zip(*tiles, strict=True))]).view(5, -1)
    return AttentionTiles(
        pages_SP,
        tiles_5M,
        tuple(one.place + one.num_rows for one in tiles),
        max(one.first_position + one.num_rows for one in tiles),
    )


@triton.jit
def _wide(x, CT: tl.constexpr):
    """Stored elements, or codes of int8, in the type of products."""
    if x.dtype == tl.uint8:
        return (x.to(tl.int16) - _ZERO).to(CT)
    return x.to(CT)


@triton.jit(do_not_specialize=["M", "tile0", "place0", "max_pages"])  # others for each pass
def attend_split(
    q, keys, key_scales, values, value_scales, pages, tiles, part, part_top, part_total,
    scale, max_pages, window, M, tile0, place0,
    H: tl.constexpr, K: tl.constexpr, B: tl.constexpr, d: tl.constexpr, dv: tl.constexpr,
    KW: tl.constexpr, VW: tl.constexpr, VALUE_IN_KEY: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and output (before division) of one split, for a tile's rows and heads. Rows of
    keys are KW elements apart, D1 of a key come in one product and D2 (0: none are left) in
    another."""
    program, j = tl.program_id(1), tl.program_id(2)
    tile = tiles + tile0 + tl.program_id(0)
    rows, position0 = tl.load(tile + 2 * M), tl.load(tile + 3 * M)
    first_oldest = 0
    if window is not None:
        first_oldest = tl.maximum(position0 + 1 - window, 0)
    if (j * SPLIT >= position0 + rows) | ((j + 1) * SPLIT <= first_oldest):
        return
    HG: tl.constexpr = H // K
    HB: tl.constexpr = (HG + BM - 1) // BM
    HS: tl.constexpr = HG if HG < BM else BM  # heads of a row that are the program's
    CT: tl.constexpr = q.dtype.element_ty
    kv = program // HB
    lane = tl.arange(0, BM)
    r, h = lane // HS, program % HB * BM + lane % HS
    ok_m = (r < rows) & (h < HG)
    length = tl.where(ok_m, position0 + r + 1, 0)
    oldest = length * 0
    if window is not None:
        oldest = tl.maximum(length - window, 0)
    at_m = (tl.load(tile + M) + r).to(tl.int64) * H + kv * HG + h
    d1, d2, dw = tl.arange(0, D1), D1 + tl.arange(0, max(D2, 1)), tl.arange(0, DV)
    x1 = tl.load(
        q + at_m[:, None] * d + d1[None, :], mask=ok_m[:, None] & (d1 < d)[None, :], other=0.0
    )
    if D2:
        x2 = tl.load(
            q + at_m[:, None] * d + d2[None, :], mask=ok_m[:, None] & (d2 < d)[None, :], other=0.0
        )
    top = tl.full((BM,), _LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DV), tl.float32)
    own_pages = pages + tl.load(tile).to(tl.int64) * max_pages
    for first in range(
        tl.maximum(j * SPLIT, first_oldest // BT * BT),
        tl.minimum((j + 1) * SPLIT, position0 + rows),
        BT,
    ):
        position = first + tl.arange(0, BT)
        ok = (position >= first_oldest) & (position < position0 + rows)
        page = tl.load(own_pages + position // B, mask=ok, other=0)
        at = (page.to(tl.int64) * K + kv) * B + position % B
        key = _wide(tl.load(keys + at[None, :] * KW + d1[:, None], mask=ok[None, :], other=0), CT)
        score = tl.dot(x1, key, input_precision="ieee")
        if D2:
            rest = tl.load(
                keys + at[None, :] * KW + d2[:, None],
                mask=ok[None, :] & (d2 < KW)[:, None],
                other=0,
            )
            score = tl.dot(x2, _wide(rest, CT), score, input_precision="ieee")
        score = score * scale
        if key_scales is not None:
            score = score * tl.load(key_scales + at, mask=ok, other=0.0)[None, :]
        is_seen = (position[None, :] >= oldest[:, None]) & (position[None, :] < length[:, None])
        score = tl.where(is_seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        fade = tl.exp(top - new)
        weight = tl.exp(score - new[:, None])
        total = total * fade + tl.sum(weight, 1)
        if value_scales is not None:
            weight = weight * tl.load(value_scales + at, mask=ok, other=0.0)[None, :]
        if VALUE_IN_KEY:
            value = tl.trans(key)
        else:
            value = tl.load(
                values + at[:, None] * VW + dw[None, :],
                mask=ok[:, None] & (dw < VW)[None, :],
                other=0,
            )
            value = _wide(value, CT)
        acc = tl.dot(weight.to(CT), value, acc * fade[:, None], input_precision="ieee")
        top = new
    row = (tl.load(tile + 4 * M) - place0 + r).to(tl.int64)
    place = (row * H + kv * HG + h) * tl.num_programs(2) + j
    tl.store(part_top + place, top, mask=ok_m)
    tl.store(part_total + place, total, mask=ok_m)
    is_stored = ok_m[:, None] & (dw < dv)[None, :]
    tl.store(part + place[:, None] * dv + dw[None, :], acc, mask=is_stored)


@triton.jit(do_not_specialize=["M", "tile0", "place0"])  # others for each pass
def join_splits(
    part, part_top, part_total, tiles, sinks, out, splits, window, M, tile0, place0,
    H: tl.constexpr, dv: tl.constexpr, SPLIT: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The output of one row and head, of its splits in their order."""
    head = tl.program_id(1)
    tile, r = tiles + tile0 + tl.program_id(0) // R, tl.program_id(0) % R
    if r >= tl.load(tile + 2 * M):
        return
    length = tl.load(tile + 3 * M) + r + 1
    oldest = 0
    if window is not None:
        oldest = tl.maximum(length - window, 0)
    dw = tl.arange(0, DV)
    first = ((tl.load(tile + 4 * M) - place0 + r).to(tl.int64) * H + head) * splits
    top = _LOWEST
    total = 0.0
    if sinks is not None:
        top = tl.load(sinks + head)
        total = 1.0
    acc = tl.zeros((DV,), tl.float32)
    for j in range(oldest // SPLIT, tl.cdiv(length, SPLIT)):
        own = tl.load(part_top + first + j)
        new = tl.maximum(top, own)
        fade, share = tl.exp(top - new), tl.exp(own - new)
        total = total * fade + tl.load(part_total + first + j) * share
        value = tl.load(part + (first + j) * dv + dw, mask=dw < dv, other=0.0)
        acc = acc * fade + value * share
        top = new
    acc = acc / tl.where(total > 0, total, 1.0)
    at = out + ((tl.load(tile + M) + r).to(tl.int64) * H + head) * dv + dw
    tl.store(at, acc.to(out.dtype.element_ty), mask=dw < dv)


def paged_attention(
    q_THd: torch.Tensor,
    keys: PagedRows,
    values: PagedRows,
    tiles: AttentionTiles,
    blocks: AttentionBlocks,
    options: AttentionOptions,
    out: torch.Tensor,
) -> None:
    """Attention of the rows of `tiles`, as `Kernels.attention` says, to their places of `out`
    (T, H, v), fp32. `q_THd` is contiguous; keys and values are as `KvCache` has them. What splits
    leave behind is at most _PART_BYTES, or that of one tile."""
    _, heads, key_dim = q_THd.shape
    _, kv_heads, page_tokens, _ = keys.rows_PKBd.shape
    value_dim = options.value_dim
    group = heads // kv_heads
    rows = blocks.rows(group)
    key = max(16, 1 << (key_dim.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(key_dim - key)) if key_dim > key else 0
    value = max(16, triton.next_power_of_2(value_dim))
    is_view = values.rows_PKBd.data_ptr() == keys.rows_PKBd.data_ptr()
    programs = kv_heads * triton.cdiv(group, blocks.lanes)
    splits = max(1, triton.cdiv(tiles.longest, blocks.split))
    num = len(tiles.ends)
    step = max(1, _PART_BYTES // (4 * rows * heads * splits * value_dim))
    for first in range(0, num, step):
        last = min(first + step, num)
        before = tiles.ends[first - 1] if first else 0
        shape = tiles.ends[last - 1] - before, heads, splits
        part = q_THd.new_empty(*shape, value_dim, dtype=torch.float32)
        tops, totals = q_THd.new_empty(2, *shape, dtype=torch.float32)
        attend_split[last - first, programs, splits](
            q_THd, keys.rows_PKBd, keys.scales_PKB, values.rows_PKBd, values.scales_PKB,
            tiles.pages_SP, tiles.tiles_5M, part, tops, totals,
            options.scale, tiles.pages_SP.shape[1], options.window, num, first, before,
            H=heads, K=kv_heads, B=page_tokens, d=key_dim, dv=value_dim,
            KW=keys.rows_PKBd.stride(2), VW=values.rows_PKBd.stride(2),
            VALUE_IN_KEY=is_view and key == value,
            BM=blocks.lanes, BT=blocks.tokens, SPLIT=blocks.split, D1=key, D2=rest, DV=value,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        join_splits[(last - first) * rows, heads](
            part, tops, totals, tiles.tiles_5M, options.sinks_H, out, splits, options.window,
            num, first, before,
            H=heads, dv=value_dim, SPLIT=blocks.split, DV=value, R=rows,
            num_warps=1 if value <= 128 else 4,
        )  # fmt: skip


class CudaAttention:
    """`Kernels.attention` of a device. Keeps where the rows of the last calls are: all layers of a
    pass ask with the same."""

    def __init__(self, *, is_narrow: bool) -> None:
        """`is_narrow`: products in 16 bits, unless keys are fp32."""
        self._is_narrow = is_narrow
        self._known: dict[tuple[int, RowTiles], tuple[AttentionWork, AttentionTiles]] = {}

    def row_tiles(self, num_heads: int, keys: PagedRows) -> list[RowTiles]:
        """See `Kernels.row_tiles`."""
        _, kv_heads, _, key_dim = keys.rows_PKBd.shape
        group = num_heads // kv_heads
        return [
            RowTiles(is_prompt, self._blocks(group, key_dim, keys, is_prompt).rows(group))
            for is_prompt in (False, True)
        ]

    def __call__(
        self,
        q_THd: torch.Tensor,
        cache: tuple[PagedRows, PagedRows],
        work: AttentionWork,
        options: AttentionOptions,
        table: Table,
        fixed: RowTables | None = None,
    ) -> torch.Tensor:
        """`cache`: keys and values. `table`: see `attention_tiles`. `fixed`: where the rows of
        `work` are, all decoded, in memory that does not move."""
        num_rows, heads, key_dim = q_THd.shape
        keys, values = cache
        group = heads // keys.rows_PKBd.shape[1]
        q_THd = q_THd.to(self._products(keys)).contiguous()
        out = q_THd.new_empty(num_rows, heads, options.value_dim, dtype=torch.float32)
        for is_prompt in set(work.is_prompt):
            blocks = self._blocks(group, key_dim, keys, is_prompt)
            if fixed is None:
                tiles = self._tiles(work, RowTiles(is_prompt, blocks.rows(group)), table)
            else:
                ends = tuple(range(1, num_rows + 1))
                tiles = AttentionTiles(fixed.pages_TP, fixed.tiles_5T, ends, fixed.positions)
            paged_attention(q_THd, keys, values, tiles, blocks, options, out)
        return out

    def _blocks(
        self, group: int, key_dim: int, keys: PagedRows, is_prompt: bool
    ) -> AttentionBlocks:
        stored = keys.rows_PKBd.dtype
        return attention_blocks(group, key_dim, self._products(keys), stored, is_prompt=is_prompt)

    def _products(self, keys: PagedRows) -> torch.dtype:
        stored = keys.rows_PKBd.dtype
        if not self._is_narrow or stored is torch.float32:
            return torch.float32
        return torch.bfloat16 if stored is torch.uint8 else stored

    def _tiles(self, work: AttentionWork, kind: RowTiles, table: Table) -> AttentionTiles:
        key = id(work), kind
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _KEPT:
                del self._known[next(iter(self._known))]
            tiles = attention_tiles(work, kind, table)
            found = self._known[key] = work, tiles  # which keeps its id its own
        return found[1]

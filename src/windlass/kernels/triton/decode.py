"""Attention of decoded tokens over paged keys and values: a program takes one row, query heads of
one key head and one split of the row's positions, block by block; then the splits are joined.

Blocks and splits lie at fixed positions of the sequence and are summed in their order, so a row's
bits depend neither on other rows nor on how many there are. Blocks before a window are not read.
Products are made in the type of the queries, sums in fp32. Shape legend: kernels/interface.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from windlass.kernels.interface import AttentionOptions
from windlass.tensors import INT8_ZERO, PagedRows

_LOWEST = tl.constexpr(-1e30)  # instead of -inf: differences of two maxima stay finite
_ZERO = tl.constexpr(INT8_ZERO)


class DecodeRows(NamedTuple):
    """What each row attends to: int32, in the memory of the device."""

    pages_TP: torch.Tensor  # pages of its sequence, oldest first; what follows them is not read
    lengths_T: torch.Tensor  # positions, its own the last; 0 for a row that attends to nothing
    longest: int  # at least the largest length


class DecodeBlocks(NamedTuple):
    """How a layer's attention is cut: by its shapes and types alone, never by the rows."""

    heads: int  # query heads of a program
    tokens: int  # positions of a block
    split: int  # positions of a program
    warps: int
    stages: int


def decode_blocks(
    group: int, key_dim: int, products: torch.dtype, stored: torch.dtype
) -> DecodeBlocks:
    """For `group` query heads of a key head. A split leaves behind a value of every head, so where
    values are wide splits are long. What keeps registers from spilling: docs/gpu.md."""
    split = 1024 if key_dim > 256 else 256
    if products.itemsize == 4:
        heads = min(8, triton.next_power_of_2(group))  # no tensor core, so none is idle
        is_same = stored.itemsize == 4
        return DecodeBlocks(heads, 16, split, 8 if key_dim > 128 else 4, 3 if is_same else 1)
    if key_dim <= 256:
        return DecodeBlocks(16, 32, split, 4, 3)
    return DecodeBlocks(32, 32, split, 8, 2) if group >= 64 else DecodeBlocks(16, 16, split, 4, 2)


@triton.jit
def _wide(x, CT: tl.constexpr):
    """Stored elements, or codes of int8, in the type of products."""
    if x.dtype == tl.uint8:
        return (x.to(tl.int16) - _ZERO).to(CT)
    return x.to(CT)


@triton.jit
def decode_split(
    q, keys, key_scales, values, value_scales, pages, lengths, part, part_top, part_total,
    scale, max_pages, window,
    H: tl.constexpr, K: tl.constexpr, B: tl.constexpr, d: tl.constexpr, dv: tl.constexpr,
    KW: tl.constexpr, VW: tl.constexpr, VALUE_IN_KEY: tl.constexpr,
    BH: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and output (before division) of one split. Rows of keys are KW elements apart,
    D1 of a key come in one product and D2 (0: none are left) in another."""
    t, program, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + t)
    oldest = 0
    if window is not None:
        oldest = tl.maximum(length - window, 0)
    if (j * SPLIT >= length) | ((j + 1) * SPLIT <= oldest):
        return
    HG: tl.constexpr = H // K
    HB: tl.constexpr = (HG + BH - 1) // BH
    CT: tl.constexpr = q.dtype.element_ty
    kv = program // HB
    h = program % HB * BH + tl.arange(0, BH)
    h_ok = h < HG
    row = t * H + kv * HG + h
    d1, d2, dw = tl.arange(0, D1), D1 + tl.arange(0, max(D2, 1)), tl.arange(0, DV)
    x1 = tl.load(
        q + row[:, None] * d + d1[None, :], mask=h_ok[:, None] & (d1 < d)[None, :], other=0.0
    )
    if D2:
        x2 = tl.load(
            q + row[:, None] * d + d2[None, :], mask=h_ok[:, None] & (d2 < d)[None, :], other=0.0
        )
    top = tl.full((BH,), _LOWEST, tl.float32)
    total = tl.zeros((BH,), tl.float32)
    acc = tl.zeros((BH, DV), tl.float32)
    for first in range(
        tl.maximum(j * SPLIT, oldest // BT * BT), tl.minimum((j + 1) * SPLIT, length), BT
    ):
        position = first + tl.arange(0, BT)
        ok = (position >= oldest) & (position < length)
        page = tl.load(pages + t * max_pages + position // B, mask=ok, other=0)
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
        score = tl.where(ok[None, :], score, float("-inf"))
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
    place = row * tl.num_programs(2) + j
    tl.store(part_top + place, top, mask=h_ok)
    tl.store(part_total + place, total, mask=h_ok)
    tl.store(part + place[:, None] * dv + dw[None, :], acc, mask=h_ok[:, None] & (dw < dv)[None, :])


@triton.jit
def join_splits(
    part, part_top, part_total, lengths, sinks, out, splits, window,
    H: tl.constexpr, dv: tl.constexpr, SPLIT: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """The output of one row and head, of its splits in their order."""
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + t)
    oldest = 0
    if window is not None:
        oldest = tl.maximum(length - window, 0)
    dw = tl.arange(0, DV)
    first = (t * H + head) * splits
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
    tl.store(out + (t * H + head) * dv + dw, acc.to(out.dtype.element_ty), mask=dw < dv)


def paged_decode(
    q_THd: torch.Tensor,
    keys: PagedRows,
    values: PagedRows,
    rows: DecodeRows,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention of each row, as `Kernels.attention` says -> (T, H, v) fp32. `q_THd` is contiguous;
    keys and values are as `KvCache` has them."""
    num_rows, heads, key_dim = q_THd.shape
    _, kv_heads, page_tokens, _ = keys.rows_PKBd.shape
    value_dim = options.value_dim
    stored = keys.rows_PKBd.dtype
    blocks = decode_blocks(heads // kv_heads, key_dim, q_THd.dtype, stored)
    key = max(16, 1 << (key_dim.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(key_dim - key)) if key_dim > key else 0
    value = max(16, triton.next_power_of_2(value_dim))
    is_view = values.rows_PKBd.data_ptr() == keys.rows_PKBd.data_ptr()
    programs = kv_heads * triton.cdiv(heads // kv_heads, blocks.heads)
    splits = max(1, triton.cdiv(rows.longest, blocks.split))
    new = q_THd.new_empty
    part = new(num_rows, heads, splits, value_dim, dtype=torch.float32)
    tops, totals = new(2, num_rows, heads, splits, dtype=torch.float32)
    out = new(num_rows, heads, value_dim, dtype=torch.float32)
    decode_split[num_rows, programs, splits](
        q_THd, keys.rows_PKBd, keys.scales_PKB, values.rows_PKBd, values.scales_PKB,
        rows.pages_TP, rows.lengths_T, part, tops, totals,
        options.scale, rows.pages_TP.shape[1], options.window,
        H=heads, K=kv_heads, B=page_tokens, d=key_dim, dv=value_dim,
        KW=keys.rows_PKBd.stride(2), VW=values.rows_PKBd.stride(2),
        VALUE_IN_KEY=is_view and key == value,
        BH=blocks.heads, BT=blocks.tokens, SPLIT=blocks.split, D1=key, D2=rest, DV=value,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    join_splits[num_rows, heads](
        part, tops, totals, rows.lengths_T, options.sinks_H, out, splits, options.window,
        H=heads, dv=value_dim, SPLIT=blocks.split, DV=value, num_warps=1 if value <= 128 else 4,
    )  # fmt: skip
    return out

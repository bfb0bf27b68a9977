"""What happens to single rows, each in one launch: norms, rotary positions, the way into the cache,
rows of the embedding.

A row is one program's, or few rows are, by widths alone: its bits do not depend on other rows.
Shape legend: kernels/interface.py; f = rope.dim / 2 frequencies, V tokens of the vocabulary.
"""

import torch
import triton
import triton.language as tl

from windlass.models.spec import LayerNorm, Norm, RmsNorm, Rope
from windlass.tensors import INT8_ZERO, PagedRows

_ZERO = tl.constexpr(INT8_ZERO)
_LARGEST = tl.constexpr(127)  # code of int8, either way
_HALF_UP = tl.constexpr(12582912.0)  # 1.5 * 2**23: fp32 that large has no fraction
_PROGRAM = 2048  # elements of a program that takes several rows


def _warps(elements: int) -> int:
    return min(8, max(1, elements // 512))


# --- norms ----------------------------------------------------------------------------------------


@triton.jit
def normalise_rows(
    x, added, weight, bias, out, rows, D, stride, eps, multiplier,
    PLUS_ONE: tl.constexpr, CENTRED: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rows of `x` lie `stride` apart. With `added` (contiguous), x += multiplier * added first."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BD)
    ok = (row < rows)[:, None] & (column < D)[None, :]
    at = x + row[:, None] * stride + column[None, :]
    value = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    if added is not None:
        more = tl.load(added + row[:, None] * D + column[None, :], mask=ok, other=0.0)
        value += more.to(tl.float32) * multiplier
        tl.store(at, value.to(x.dtype.element_ty), mask=ok)
    if CENTRED:
        value = tl.where(ok, value - (tl.sum(value, 1) / D)[:, None], 0.0)
    size = tl.sqrt_rn(tl.sum(value * value, 1) / D + eps)
    value = value * tl.div_rn(tl.full((BR,), 1.0, tl.float32), size)[:, None]
    if weight is not None:
        w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        value = value * ((w + 1.0) if PLUS_ONE else w)[None, :]
    if bias is not None:
        value += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    own = out + row[:, None] * D + column[None, :]
    tl.store(own, value.to(out.dtype.element_ty), mask=ok)


def normalise(
    norm: Norm,
    weight_D: torch.Tensor | None,
    bias_D: torch.Tensor | None,
    x: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    added: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """As `Kernels.normalise`, in `dtype`. `added`: a contiguous tensor and its multiplier; what
    they come to is added to `x` in place, before."""
    width = x.shape[-1]
    rows_D = x.view(-1, width)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    columns = triton.next_power_of_2(width)
    rows = max(1, _PROGRAM // columns)
    more, multiplier = added or (None, 1.0)
    normalise_rows[(triton.cdiv(len(rows_D), rows),)](
        rows_D, more, weight_D, bias_D, out,
        len(rows_D), width, rows_D.stride(0), norm.eps, multiplier,
        PLUS_ONE=isinstance(norm, RmsNorm) and norm.plus_one, CENTRED=isinstance(norm, LayerNorm),
        BR=rows, BD=columns, num_warps=_warps(rows * columns),
    )  # fmt: skip
    return out


# --- rotary positions -----------------------------------------------------------------------------


@triton.jit
def rotate_heads(
    x, cos, sin, H, f, stride_t, stride_h, stride_cos,
    INTERLEAVED: tl.constexpr, BH: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    pair = tl.arange(0, BF)
    c = tl.load(cos + t * stride_cos + pair, mask=pair < f, other=0.0)[None, :]
    s = tl.load(sin + t * stride_cos + pair, mask=pair < f, other=0.0)[None, :]
    base = x + t * stride_t + head[:, None] * stride_h
    if INTERLEAVED:
        both = tl.arange(0, 2 * BF)
        ok = (head < H)[:, None] & (both < 2 * f)[None, :]
        found = tl.load(base + both[None, :], mask=ok, other=0.0)
        a, b = tl.split(tl.reshape(found, (BH, BF, 2)))
        new = tl.join(a * c - b * s, b * c + a * s)
        tl.store(base + both[None, :], tl.reshape(new, (BH, 2 * BF)), mask=ok)
    else:
        ok = (head < H)[:, None] & (pair < f)[None, :]
        a = tl.load(base + pair[None, :], mask=ok, other=0.0)
        b = tl.load(base + f + pair[None, :], mask=ok, other=0.0)
        tl.store(base + pair[None, :], a * c - b * s, mask=ok)
        tl.store(base + f + pair[None, :], b * c + a * s, mask=ok)


def rotate(x_THd: torch.Tensor, cos_Tf: torch.Tensor, sin_Tf: torch.Tensor, rope: Rope) -> None:
    """As `Kernels.rotate`: `x_THd` is fp32 and may be a view whose heads lie apart."""
    rows, heads, _ = x_THd.shape
    pairs = triton.next_power_of_2(rope.dim // 2)
    block = min(triton.next_power_of_2(heads), max(1, _PROGRAM // (2 * pairs)))
    assert x_THd.stride(2) == 1 and cos_Tf.stride() == sin_Tf.stride(), "strides of a rotation"
    rotate_heads[rows, triton.cdiv(heads, block)](
        x_THd, cos_Tf, sin_Tf, heads, rope.dim // 2,
        x_THd.stride(0), x_THd.stride(1), cos_Tf.stride(0),
        INTERLEAVED=rope.interleaved, BH=block, BF=pairs, num_warps=_warps(2 * block * pairs),
    )  # fmt: skip


# --- cache ----------------------------------------------------------------------------------------


@triton.jit
def write_heads(
    x, pages, offsets, rows, scales, K, B, d, stride_t, stride_k, width,
    BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BK + tl.arange(0, BK)
    column = tl.arange(0, BD)
    ok = (head < K)[:, None] & (column < d)[None, :]
    at = x + t * stride_t + head[:, None] * stride_k + column[None, :]
    value = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    place = (tl.load(pages + t).to(tl.int64) * K + head) * B + tl.load(offsets + t)
    own = rows + place[:, None] * width + column[None, :]
    if scales is None:
        tl.store(own, value.to(rows.dtype.element_ty), mask=ok)
    else:
        is_nan = tl.max((value != value).to(tl.int32), 1) > 0
        scale = tl.div_rn(tl.max(tl.abs(value), 1), tl.full((BK,), _LARGEST, tl.float32))
        scale = tl.where(is_nan, float("nan"), scale)
        step = tl.where(scale == 0, 1.0, scale)
        code = tl.div_rn(value, tl.broadcast_to(step[:, None], (BK, BD)))
        code = tl.where(code == code, code, 0.0)
        code = (code + _HALF_UP) - _HALF_UP  # to the nearest, ties to even
        code = tl.minimum(tl.maximum(code, -_LARGEST), _LARGEST).to(tl.int32) + _ZERO
        tl.store(own, code.to(tl.uint8), mask=ok)
        tl.store(scales + place, scale, mask=head < K)


def write_rows(
    store: PagedRows, pages_T: torch.Tensor, offsets_T: torch.Tensor, x_TKd: torch.Tensor
) -> None:
    """As `Kernels.write_rows`; heads of `x_TKd` may lie apart."""
    rows, heads, dim = x_TKd.shape
    _, _, page_tokens, width = store.rows_PKBd.shape
    columns = triton.next_power_of_2(dim)
    block = min(triton.next_power_of_2(heads), max(1, _PROGRAM // columns))
    assert x_TKd.stride(2) == 1 and store.rows_PKBd.is_contiguous(), "strides of rows to be written"
    write_heads[rows, triton.cdiv(heads, block)](
        x_TKd, pages_T, offsets_T, store.rows_PKBd, store.scales_PKB, heads, page_tokens, dim,
        x_TKd.stride(0), x_TKd.stride(1), width,
        BK=block, BD=columns, num_warps=_warps(block * columns),
    )  # fmt: skip


# --- embedding ------------------------------------------------------------------------------------


@triton.jit
def embed_rows(table, ids, out, multiplier, D, BD: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    at = table + tl.load(ids + t).to(tl.int64) * D + column
    value = tl.load(at, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out + t * D + column, value * multiplier, mask=column < D)


def embed(table_VD: torch.Tensor, ids_T: torch.Tensor, multiplier: float) -> torch.Tensor:
    """Rows of a contiguous table, times `multiplier` -> (T, D) fp32."""
    width = table_VD.shape[1]
    out = torch.empty(len(ids_T), width, dtype=torch.float32, device=table_VD.device)
    block = min(_PROGRAM, triton.next_power_of_2(width))
    embed_rows[len(ids_T), triton.cdiv(width, block)](
        table_VD, ids_T, out, multiplier, width, BD=block, num_warps=_warps(block)
    )
    return out

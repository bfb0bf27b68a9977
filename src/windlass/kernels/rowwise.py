"""What happens to single rows, in torch: norms, rotary positions, the sum of expert outputs, the
way into the cache, elementwise functions.

Everything is elementwise or a sum over a row, so that a row's bits do not depend on other rows.
Shape legend: kernels/interface.py; f = rope.dim / 2 frequencies, A experts of a row.
"""

from collections.abc import Callable

import torch

from windlass.models.spec import LayerNorm, Norm, RmsNorm, Rope
from windlass.tensors import INT8_ZERO, PagedRows
from windlass.units import round_up

_LARGEST = 127  # code of int8, either way: rounding is symmetric
_LANES = 64  # elements; a multiple of every vector loop's step in torch's pointwise code
_GRAIN = 32768  # elements; torch runs a pointwise call of at most this size in one thread
_COMBINE_ROWS = 256  # rows combined at once: their expert outputs stay in the cache


def pointwise(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """See `Kernels.pointwise`; of a CPU.

    torch computes the tail of a vector loop, and of each thread's share, with scalar code of other
    rounding. Here every share is a multiple of the vector length, so all elements take the vector
    code (a test compares all offsets)."""
    flat = x.reshape(-1)
    size, threads = flat.numel(), torch.get_num_threads()
    if size >= _GRAIN * threads:  # torch then cuts into exactly `threads` shares
        return function(_fill_up(flat, _LANES * threads))[:size].view(x.shape)
    shares = [function(_fill_up(part, _LANES))[: len(part)] for part in torch.split(flat, _GRAIN)]
    return (torch.cat(shares) if len(shares) != 1 else shares[0]).view(x.shape)


def _fill_up(flat: torch.Tensor, step: int) -> torch.Tensor:
    size = round_up(flat.numel(), step)
    if size == flat.numel():
        return flat
    padded = flat.new_zeros(size)
    padded[: flat.numel()] = flat
    return padded


def normalise(
    norm: Norm, weight_D: torch.Tensor | None, bias_D: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    """See `Kernels.normalise`."""
    if isinstance(norm, LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    y = x * (1.0 / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.eps))
    if weight_D is not None:
        plus_one = isinstance(norm, RmsNorm) and norm.plus_one
        y = y * (1.0 + weight_D.float() if plus_one else weight_D.float())
    return y if bias_D is None else y + bias_D.float()


def rotate(x_THd: torch.Tensor, cos_Tf: torch.Tensor, sin_Tf: torch.Tensor, rope: Rope) -> None:
    """See `Kernels.rotate`."""
    cos, sin = cos_Tf[:, None], sin_Tf[:, None]
    turned = x_THd[..., : rope.dim]
    if rope.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned.chunk(2, dim=-1)
    new_a, new_b = a * cos - b * sin, b * cos + a * sin
    a.copy_(new_a)
    b.copy_(new_b)


def combine(
    weights_TA: torch.Tensor,
    outputs_TAD: torch.Tensor,
    shared_TD: torch.Tensor | None,
    hidden_TD: torch.Tensor,
    multiplier: float,
) -> None:
    """See `Kernels.combine`."""
    for first in range(0, len(hidden_TD), _COMBINE_ROWS):
        part = slice(first, first + _COMBINE_ROWS)
        weights, outputs = weights_TA[part], outputs_TAD[part]
        total = outputs[:, 0] * weights[:, :1]
        for slot in range(1, outputs.shape[1]):
            total = total + outputs[:, slot] * weights[:, slot : slot + 1]
        if shared_TD is not None:
            total = total + shared_TD[part]
        # in two steps: a fused multiply-add would round otherwise in a vector's tail
        hidden_TD[part] += total * multiplier


def write_rows(
    store: PagedRows, pages_T: torch.Tensor, offsets_T: torch.Tensor, x_TKd: torch.Tensor
) -> None:
    """See `Kernels.write_rows`."""
    width = x_TKd.shape[2]
    if store.scales_PKB is None:
        store.rows_PKBd[pages_T, :, offsets_T, :width] = x_TKd.to(store.rows_PKBd.dtype)
        return
    codes_TKd, scales_TK = rounded(x_TKd)
    store.rows_PKBd[pages_T, :, offsets_T, :width] = codes_TKd
    store.scales_PKB[pages_T, :, offsets_T] = scales_TK


def rounded(x_TKd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of fp32 rows. Maximum, division and rounding are exact or rounded once, so a
    row's codes depend on nothing but the row. A row of zeros gets scale 0; a NaN or an infinity
    makes its whole row NaN when it is widened."""
    scales_TK = x_TKd.abs().amax(-1).div_(_LARGEST)
    steps = torch.where(scales_TK == 0, 1.0, scales_TK)
    codes = (x_TKd / steps[..., None]).round_().clamp_(-_LARGEST, _LARGEST).add_(INT8_ZERO)
    return codes.nan_to_num_(INT8_ZERO).to(torch.uint8), scales_TK

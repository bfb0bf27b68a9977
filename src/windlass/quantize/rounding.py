"""Round to nearest, with the scale of each group chosen so that the squared error is least. Pure
functions of tensors; each row's result depends on that row alone.

N rows, K columns, G groups (all rows' together), g elements of a group.
"""

from typing import NamedTuple

import torch

from windlass.quantize.scheme import IntegerScheme

# Scales tried, as shares of the one that reaches the largest element. Four bits pay for clipping up
# to 60 % of the range, eight bits only for a little: docs/decisions/0007-quantize.md.
_SHARES = {
    4: [1.0 - 0.03 * i for i in range(21)],
    8: [1.0 - 0.005 * i for i in range(21)],
}


class Rounded(NamedTuple):
    """A matrix on disk. `codes_NK`: uint8, offset binary (value + 8 or + 128)."""

    codes_NK: torch.Tensor
    scales_NB: torch.Tensor  # in the type they are stored in
    squared_error: float
    squared_sum: float
    max_error: float


def round_to_nearest(
    w_NK: torch.Tensor, scheme: IntegerScheme, scale_dtype: torch.dtype
) -> Rounded:
    """Codes and scales of `w_NK`. Codes are those of the scale as it is stored, and errors are of
    what is stored. ValueError where an element is not finite."""
    rows, width = w_NK.shape
    w_Gg = w_NK.float().reshape(-1, scheme.group_of(width))
    scale_G1 = best_scales(w_Gg, scheme, scale_dtype)
    code_Gg = torch.div(w_Gg, scale_G1).round_().clamp_(scheme.lowest, scheme.highest)
    error_Gg = (code_Gg * scale_G1).sub_(w_Gg)
    codes = code_Gg.sub_(scheme.lowest).to(torch.uint8)
    return Rounded(
        codes.view(rows, width),
        scale_G1.to(scale_dtype).view(rows, -1),
        squared_error=_total(_squares(error_Gg)),
        squared_sum=_total(_squares(w_Gg)),
        max_error=float(error_Gg.abs_().amax()),
    )


def best_scales(
    w_Gg: torch.Tensor, scheme: IntegerScheme, scale_dtype: torch.dtype
) -> torch.Tensor:
    """(G, 1) fp32, each a value of `scale_dtype`: of all scales tried the one of least error. Never
    worse than a range that holds the largest element, on either side or on both."""
    largest_G1 = w_Gg.abs().amax(-1, keepdim=True)
    if not largest_G1.isfinite().all():
        raise ValueError("an element is not finite")
    full_G1 = largest_G1 / scheme.highest
    scratch = torch.empty_like(w_Gg), torch.empty_like(w_Gg)
    best_G1 = _storable(full_G1, scale_dtype)
    least_G1 = _errors(w_Gg, best_G1, scheme, scratch)

    def consider(candidate_G1: torch.Tensor) -> None:
        scale_G1 = _storable(candidate_G1, scale_dtype)
        error_G1 = _errors(w_Gg, scale_G1, scheme, scratch)
        is_less_G1 = error_G1 < least_G1
        torch.where(is_less_G1, error_G1, least_G1, out=least_G1)
        torch.where(is_less_G1, scale_G1, best_G1, out=best_G1)

    highest = scheme.highest
    # the largest element at the lowest code, and halfway, which is what other tools take
    for share in (highest / (highest + 1), highest / (highest + 0.5), *_SHARES[scheme.bits][1:]):
        consider(full_G1 * share)
    # with these codes fixed, the scale of least error
    code_Gg = torch.div(w_Gg, best_G1, out=scratch[0]).round_()
    code_Gg.clamp_(scheme.lowest, scheme.highest)
    product_G1 = torch.mul(code_Gg, w_Gg, out=scratch[1]).sum(-1, keepdim=True)
    consider(product_G1 / code_Gg.square_().sum(-1, keepdim=True).clamp_(min=1))
    return best_G1


def pack_rows(codes_NK: torch.Tensor, bits: int) -> torch.Tensor:
    """(N, bytes) uint8: the codes of a row one after the other, the lowest bits first. Read as
    little-endian int32 this is compressed-tensors' `weight_packed`."""
    if bits == 8:
        return codes_NK
    return codes_NK[:, 0::2] | (codes_NK[:, 1::2] << 4)


def _storable(scale_G1: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to `dtype`, but neither 0, which groups of zeros would have, nor infinite."""
    limits = torch.finfo(dtype)
    return scale_G1.to(dtype).float().clamp_(limits.tiny, limits.max)


def _errors(
    w_Gg: torch.Tensor,
    scale_G1: torch.Tensor,
    scheme: IntegerScheme,
    scratch: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """(G, 1) squared errors, in two buffers of the size of `w_Gg`."""
    exact_Gg, code_Gg = scratch
    torch.div(w_Gg, scale_G1, out=exact_Gg)
    torch.round(exact_Gg, out=code_Gg).clamp_(scheme.lowest, scheme.highest)
    return _squares(code_Gg.sub_(exact_Gg)).mul_(scale_G1.square())


def _squares(x_Gg: torch.Tensor) -> torch.Tensor:
    norm_G1: torch.Tensor = torch.linalg.vector_norm(x_Gg, dim=-1, keepdim=True)
    return norm_G1.square_()


def _total(x_G1: torch.Tensor) -> float:
    return float(x_G1.sum(dtype=torch.float64))

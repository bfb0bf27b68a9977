"""What happens to single rows, in torch: norms, rotary positions, the sum of expert outputs.

Everything is elementwise or a sum over a row, so that a row's bits do not depend on other rows.
Shape legend: kernels/base.py; f = rope.dim / 2 frequencies, A experts of a row.
"""

import torch

from windlass.spec.model import LayerNorm, Norm, Rope

_COMBINE_ROWS = 256  # rows combined at once: their expert outputs stay in the cache


def normalise(
    norm: Norm, weight_D: torch.Tensor, bias_D: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    """See `Kernels.normalise`."""
    weight = weight_D.float()
    if isinstance(norm, LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        y = centred * (1.0 / torch.sqrt(variance + norm.eps)) * weight
        return y if bias_D is None else y + bias_D.float()
    y = x * (1.0 / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.eps))
    return y * (1.0 + weight) if norm.plus_one else y * weight


def rotate(
    x_THd: torch.Tensor, cos_Tf: torch.Tensor, sin_Tf: torch.Tensor, rope: Rope
) -> torch.Tensor:
    """See `Kernels.rotate`."""
    cos, sin = cos_Tf[:, None], sin_Tf[:, None]
    turned = x_THd[..., : rope.dim]
    if rope.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    if rope.dim == x_THd.shape[-1]:
        return turned
    return torch.cat((turned, x_THd[..., rope.dim :]), dim=-1)


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

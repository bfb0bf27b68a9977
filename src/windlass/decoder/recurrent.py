"""Layers whose state of a sequence does not grow: what they keep, and what each kind computes."""

from collections.abc import Sequence

import torch

from windlass.decoder.delta import delta_attention
from windlass.decoder.mamba import mamba
from windlass.decoder.short_conv import short_convolution
from windlass.decoder.state_rows import StateRows
from windlass.kernels.interface import Kernels
from windlass.models.spec import GatedDelta, Mamba2, Recurrent, ShortConv
from windlass.tensors import Tensors


def state_shapes(attention: Recurrent, hidden: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of one sequence's states, all fp32: the convolution's last inputs (C, kernel - 1),
    and a matrix for each head where the layer has any."""
    match attention:
        case GatedDelta():
            heads = (attention.num_v_heads, attention.k_head_dim, attention.v_head_dim)
            return (attention.conv_dim, attention.conv_kernel - 1), heads
        case Mamba2():
            heads = (attention.num_heads, attention.state_dim, attention.head_dim)
            return (attention.conv_dim, attention.conv_kernel - 1), heads
        case ShortConv():
            return ((hidden, attention.conv_kernel - 1),)


def recurrent_attention(
    kernels: Kernels,
    attention: Recurrent,
    w: Tensors,
    h_TD: torch.Tensor,
    rows: StateRows,
    states: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Token mixing of one layer -> (T, D); advances `states` (slots, *shape), each as
    `state_shapes` has it, at the segments' slots in place."""
    match attention:
        case GatedDelta():
            return delta_attention(kernels, attention, w, h_TD, rows, states)
        case Mamba2():
            return mamba(kernels, attention, w, h_TD, rows, states)
        case ShortConv():
            return short_convolution(kernels, w, h_TD, rows, states)

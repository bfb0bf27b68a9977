"""Gated short convolution (LFM2): a causal convolution over a few positions between two gates. Pure
math.

Its state is the convolution's last inputs. Everything beside the projections is elementwise, so a
row's bits depend on its own sequence alone.
"""

from collections.abc import Sequence

import torch

from windlass.decoder.attention import linear
from windlass.decoder.state_rows import StateRows, convolve
from windlass.kernels.interface import Kernels
from windlass.tensors import Tensors


def short_convolution(
    kernels: Kernels,
    w: Tensors,
    h_TD: torch.Tensor,
    rows: StateRows,
    states: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Token mixing of one layer -> (T, D); advances the one state (slots, D, kernel - 1) of the
    segments' slots in place. The segments cover all rows."""
    gate_in, gate_out, x_TD = linear(kernels, w, "in_proj", h_TD).chunk(3, dim=-1)
    mixed_TD = convolve(gate_in * x_TD, w, rows, states[0])
    return linear(kernels, w, "o_proj", gate_out * mixed_TD)

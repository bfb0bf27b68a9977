"""Mamba-2 (arXiv 2405.21060): short convolution, steps, recurrent state, gated norm. Pure math.

A state per head maps keys ("B") to values. Each token decays it, adds the token's value, times its
step, at the token's key, and reads it with the token's query ("C").

Exactness: as in decoder/delta.py. Prompt rows go by chunks of CHUNK positions, generated rows one
by one, and every product works on one sequence and has one shape.

Shapes: T rows, D hidden, C channels of the convolution, G key groups, H heads, d state dim, v head
dim, L = CHUNK positions, n rows of one sequence.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from windlass.decoder.attention import linear
from windlass.decoder.state_rows import (
    Decays,
    StateRows,
    convolve,
    heads_first,
    scan,
)
from windlass.kernels.interface import Kernels
from windlass.models.spec import Mamba2
from windlass.tensors import Tensors, plain


class _Inputs(NamedTuple):
    """What the recurrence reads of consecutive rows; values are times the step."""

    q_nGd: torch.Tensor
    k_nGd: torch.Tensor
    v_nHv: torch.Tensor
    log_decay_nH: torch.Tensor

    def at(self, rows: slice) -> "_Inputs":
        return _Inputs(*(tensor[rows] for tensor in self))


def mamba(
    kernels: Kernels,
    spec: Mamba2,
    w: Tensors,
    h_TD: torch.Tensor,
    rows: StateRows,
    states: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Token mixing of one layer -> (T, D); advances the states of the segments' slots in place.

    `states`: of the convolution (slots, C, kernel - 1) and recurrent (slots, H, d, v), fp32. The
    segments cover all rows.
    """
    parts = linear(kernels, w, "state_proj", h_TD)
    widths = [spec.inner, spec.conv_dim, spec.num_heads]
    gate, mixed_TC, step_TH = torch.split(parts, widths, dim=-1)
    mixed_TC = convolve(mixed_TC, w, rows, states[0])
    mixed_TC = kernels.pointwise(F.silu, mixed_TC)
    shared = spec.num_groups * spec.state_dim
    x, k, q = torch.split(mixed_TC, [spec.inner, shared, shared], dim=-1)
    x_THv = x.reshape(-1, spec.num_heads, spec.head_dim)
    step_TH = kernels.pointwise(F.softplus, step_TH + plain(w, "dt_bias").float())
    rate_H = kernels.pointwise(torch.exp, plain(w, "a_log").float())
    inputs = _Inputs(
        q_nGd=q.reshape(-1, spec.num_groups, spec.state_dim),
        k_nGd=k.reshape(-1, spec.num_groups, spec.state_dim),
        v_nHv=x_THv * step_TH[..., None],
        log_decay_nH=-rate_H * step_TH,
    )

    def advance(rows: slice, state: torch.Tensor, is_prompt: bool) -> torch.Tensor:
        return (_chunk if is_prompt else _token)(kernels, inputs.at(rows), state)

    out_THv = scan(advance, rows.segments, states[1], torch.empty_like(x_THv))
    out_THv += x_THv * plain(w, "d").float()[:, None]
    gated = out_THv.flatten(1) * kernels.pointwise(F.silu, gate)
    return linear(kernels, w, "o_proj", _group_norm(spec, plain(w, "out_norm.weight"), gated))


def _token(kernels: Kernels, x: _Inputs, state_Hdv: torch.Tensor) -> torch.Tensor:
    """One row -> (1, H, v). Reads the old state, and adds what the row itself gives."""
    groups = state_Hdv.shape[0] // x.k_nGd.shape[1]
    k_Hd, q_Hd = (t[0].repeat_interleave(groups, dim=0) for t in (x.k_nGd, x.q_nGd))
    decay_H1 = kernels.pointwise(torch.exp, x.log_decay_nH[0])[:, None]
    seen_Hv = decay_H1 * kernels.batched_linear(q_Hd[None], state_Hdv.transpose(1, 2))[0]
    state_Hdv.mul_(decay_H1[..., None]).addcmul_(k_Hd[:, :, None], x.v_nHv[0][:, None])
    return (seen_Hv + (q_Hd * k_Hd).sum(dim=-1, keepdim=True) * x.v_nHv[0])[None]


def _chunk(kernels: Kernels, x: _Inputs, state_Hdv: torch.Tensor) -> torch.Tensor:
    """At most L rows -> (n, H, v), as matrix products over the chunk.

    Padded to L rows whose keys, values and log decays are 0: they leave the state as it is.
    """
    num_rows, groups = x.v_nHv.shape[0], state_Hdv.shape[0] // x.k_nGd.shape[1]
    q_GLd, k_GLd, v_HLv, log_decay_HL = (heads_first(t) for t in x)
    decays = Decays.of(kernels, log_decay_HL)
    scores_GLL = torch.bmm(q_GLd, k_GLd.transpose(1, 2))
    scores_HLL = scores_GLL.repeat_interleave(groups, dim=0) * decays.within_HLL
    q_HLd, k_HLd = (t.repeat_interleave(groups, dim=0) for t in (q_GLd, k_GLd))
    seen_HLv = torch.bmm(q_HLd * decays.from_start_HL1, state_Hdv) + torch.bmm(scores_HLL, v_HLv)
    state_Hdv.mul_(decays.from_start_HL1[:, -1:])
    state_Hdv += torch.bmm((k_HLd * decays.to_end_HL1).transpose(1, 2).contiguous(), v_HLv)
    return seen_HLv[:, :num_rows].transpose(0, 1)


def _group_norm(spec: Mamba2, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Each key group's share of a row by itself."""
    x_TGi = x.view(len(x), spec.num_groups, -1)
    mean_TG1 = (x_TGi * x_TGi).mean(dim=-1, keepdim=True)
    return (x_TGi / torch.sqrt(mean_TG1 + spec.norm_eps)).flatten(1) * weight.float()

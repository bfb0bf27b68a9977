"""Gated delta rule: short convolution, gates, recurrent state, gated norm. Pure math.

A state per value head maps keys to values. Each token decays it, replaces what it holds for the
token's key by the token's value (in part, by `beta`), and reads it with the token's query.

Exactness: prompt rows are computed in chunks of CHUNK positions counted from the sequence's start,
generated rows one by one. Every product works on one sequence and has one shape, so that a row's
bits depend on its own sequence alone, as long as a call's prompt rows begin at a multiple of CHUNK.

Shapes: T rows, D hidden, C channels of the convolution, G key heads, H value heads, d key dim,
v value dim, L = CHUNK positions, n rows of one sequence.
"""

import math
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
from windlass.models.spec import GatedDelta
from windlass.tensors import Tensors, plain

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj")
_L2_EPS = 1e-6  # fixed by the trained models


class _Inputs(NamedTuple):
    """What the recurrence reads of consecutive rows; queries and keys are normalised."""

    q_nGd: torch.Tensor
    k_nGd: torch.Tensor
    v_nHv: torch.Tensor
    log_decay_nH: torch.Tensor
    beta_nH: torch.Tensor

    def at(self, rows: slice) -> "_Inputs":
        return _Inputs(*(tensor[rows] for tensor in self))


def delta_attention(
    kernels: Kernels,
    spec: GatedDelta,
    w: Tensors,
    h_TD: torch.Tensor,
    rows: StateRows,
    states: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Token mixing of one layer -> (T, D); advances the states of the segments' slots in place.

    `states`: of the convolution (slots, C, kernel - 1) and recurrent (slots, H, d, v), fp32; a
    segment at position 0 overwrites what its slot held. The segments cover all rows.
    """
    inputs = _project(kernels, spec, w, h_TD, rows, states[0])

    def advance(rows: slice, state: torch.Tensor, is_prompt: bool) -> torch.Tensor:
        return (_chunk if is_prompt else _token)(kernels, inputs.at(rows), state)

    out_THv = scan(advance, rows.segments, states[1], torch.empty_like(inputs.v_nHv))
    return _output(kernels, spec, w, h_TD, out_THv)


def _project(
    kernels: Kernels,
    spec: GatedDelta,
    w: Tensors,
    h_TD: torch.Tensor,
    rows: StateRows,
    conv_state: torch.Tensor,
) -> _Inputs:
    *mixed, step_TH, beta_TH = kernels.linears(h_TD, w, _PROJECTIONS)
    mixed_TC = torch.cat(mixed, dim=-1)
    mixed_TC = convolve(mixed_TC, w, rows, conv_state)
    mixed_TC = kernels.pointwise(F.silu, mixed_TC)
    width = spec.num_k_heads * spec.k_head_dim
    q, k, v = mixed_TC[:, :width], mixed_TC[:, width : 2 * width], mixed_TC[:, 2 * width :]
    head = (-1, spec.num_k_heads, spec.k_head_dim)
    step_TH = step_TH + plain(w, "dt_bias").float()
    rate_H = kernels.pointwise(torch.exp, plain(w, "a_log").float())
    return _Inputs(
        q_nGd=_unit(q.reshape(head)) / math.sqrt(spec.k_head_dim),
        k_nGd=_unit(k.reshape(head)),
        v_nHv=v.reshape(-1, spec.num_v_heads, spec.v_head_dim),
        log_decay_nH=-rate_H * kernels.pointwise(F.softplus, step_TH),
        beta_nH=kernels.pointwise(torch.sigmoid, beta_TH),
    )


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) + _L2_EPS)


def _token(kernels: Kernels, x: _Inputs, state_Hdv: torch.Tensor) -> torch.Tensor:
    """One row -> (1, H, v). Reads the old state once, for key and query together."""
    groups = state_Hdv.shape[0] // x.k_nGd.shape[1]
    k_Hd, q_Hd = (t[0].repeat_interleave(groups, dim=0) for t in (x.k_nGd, x.q_nGd))
    decay_H1 = kernels.pointwise(torch.exp, x.log_decay_nH[0])[:, None]
    read = kernels.batched_linear(torch.stack((k_Hd, q_Hd)), state_Hdv.transpose(1, 2))
    held_Hv, seen_Hv = decay_H1 * read[0], decay_H1 * read[1]
    change_Hv = (x.v_nHv[0] - held_Hv) * x.beta_nH[0, :, None]
    state_Hdv.mul_(decay_H1[..., None]).addcmul_(k_Hd[:, :, None], change_Hv[:, None])
    return (seen_Hv + (q_Hd * k_Hd).sum(dim=-1, keepdim=True) * change_Hv)[None]


def _chunk(kernels: Kernels, x: _Inputs, state_Hdv: torch.Tensor) -> torch.Tensor:
    """At most L rows -> (n, H, v), as matrix products over the chunk (arXiv 2412.06464).

    Padded to L rows whose keys, gates and log decays are 0: they leave the state as it is.
    """
    num_rows, groups = x.v_nHv.shape[0], state_Hdv.shape[0] // x.k_nGd.shape[1]
    q_GLd, k_GLd, v_HLv = (heads_first(t) for t in x[:3])
    log_decay_HL, beta_HL1 = heads_first(x.log_decay_nH), heads_first(x.beta_nH)[..., None]
    within_HLL, from_start_HL1, to_end_HL1 = Decays.of(kernels, log_decay_HL)
    overlap_HLL, scores_HLL = (
        torch.bmm(t, k_GLd.transpose(1, 2)).repeat_interleave(groups, dim=0) * within_HLL
        for t in (k_GLd, q_GLd)
    )
    q_HLd, k_HLd = (t.repeat_interleave(groups, dim=0) for t in (q_GLd, k_GLd))
    # row i stores beta (v - what the chunk's earlier rows and the old state hold for its key)
    sides = torch.cat((v_HLv, k_HLd * from_start_HL1), dim=-1) * beta_HL1
    solved = torch.linalg.solve_triangular(
        overlap_HLL * beta_HL1, sides, upper=False, unitriangular=True
    )
    values, keys = solved[..., : v_HLv.shape[-1]], solved[..., v_HLv.shape[-1] :]
    change_HLv = values - torch.bmm(keys.contiguous(), state_Hdv)
    seen_HLv = torch.bmm(q_HLd * from_start_HL1, state_Hdv) + torch.bmm(scores_HLL, change_HLv)
    state_Hdv.mul_(from_start_HL1[:, -1:])
    state_Hdv += torch.bmm((k_HLd * to_end_HL1).transpose(1, 2).contiguous(), change_HLv)
    return seen_HLv[:, :num_rows].transpose(0, 1)


def _output(
    kernels: Kernels, spec: GatedDelta, w: Tensors, h_TD: torch.Tensor, out_THv: torch.Tensor
) -> torch.Tensor:
    gate_TC = kernels.pointwise(F.silu, linear(kernels, w, "z_proj", h_TD))
    mean_TH1 = (out_THv * out_THv).mean(dim=-1, keepdim=True)
    normed_THv = (
        out_THv / torch.sqrt(mean_TH1 + spec.norm_eps) * plain(w, "out_norm.weight").float()
    )
    return linear(kernels, w, "o_proj", normed_THv.flatten(1) * gate_TC)

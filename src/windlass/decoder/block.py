"""The small pieces of a block and of the model's ends, for a runtime to put together.

A block is: `attention_input`, attention (`decoder/attention.py` around the kernel over the cache,
or `decoder/recurrent.py`), `add_attention`; then `ffn_input`, a network and `add_network`, or
`routing_inputs`, experts (`decoder/moe.py`) and `add_experts`. Rows are fp32 and independent of
each other.

Shapes: T rows, D hidden, A experts per row, V tokens of a head's chunk.
"""

from typing import NamedTuple

import torch

from windlass.kernels.interface import Kernels
from windlass.models.spec import ModelSpec, Moe, Shared
from windlass.tensors import Tensors, Weight, floats_or_none, plain, plain_or_none

# What `add_network` and `add_experts` need of a part, where the block has it.
OUTPUT_TENSORS = tuple(
    f"{name}.{kind}" for name in ("ffn_out_norm", "expert_out_norm") for kind in ("weight", "bias")
) + ("output_scale",)
_CAPPED = 1 << 18  # logits at once


class ExpertOutputs(NamedTuple):
    """What the experts of a block gave: routed ones by place, and the shared one."""

    weights_TA: torch.Tensor
    outputs_TAD: torch.Tensor
    shared_TD: torch.Tensor | None


def embed(spec: ModelSpec, rows_TD: torch.Tensor) -> torch.Tensor:
    """Rows of the embedding table, in its stored type -> hidden states fp32."""
    if spec.embed_multiplier_as_stored:
        stored = torch.tensor(spec.embed_multiplier, dtype=rows_TD.dtype)
        return rows_TD.float() * stored.item()
    return rows_TD.float() * spec.embed_multiplier


def attention_input(k: Kernels, spec: ModelSpec, w: Tensors, x_TD: torch.Tensor) -> torch.Tensor:
    """What any kind of attention of a block reads: normalised hidden states."""
    return _norm(k, spec, w, "input_norm", x_TD)


def join(
    k: Kernels, spec: ModelSpec, w: Tensors, x_TD: torch.Tensor, states_TD: torch.Tensor
) -> torch.Tensor:
    """What enters a block that drafts: of embedded tokens, and of the model's last state of the
    token before each, after its last norm."""
    parts = _norm(k, spec, w, "embed_norm", x_TD), _norm(k, spec, w, "state_norm", states_TD)
    return k.linear(torch.cat(parts, 1), w["join.weight"])


def draft_norm(k: Kernels, spec: ModelSpec, w: Tensors, x_TD: torch.Tensor) -> torch.Tensor:
    """What the head reads of a block that drafts."""
    return _norm(k, spec, w, "draft_norm", x_TD)


def ffn_input(k: Kernels, spec: ModelSpec, w: Tensors, x_TD: torch.Tensor) -> torch.Tensor:
    """What the dense network or the shared expert of a block reads."""
    return _norm(k, spec, w, "post_norm", x_TD)


def routing_inputs(
    k: Kernels, spec: ModelSpec, moe: Moe, w: Tensors, x_TD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the experts of a block read, and what its router does: perhaps the same tensor."""
    h_TD = _norm(k, spec, w, _expert_norm(moe), x_TD)
    if moe.router_norm is None:
        return h_TD, h_TD
    name, multiplier = routing_norm(moe)
    weight_D = floats_or_none(w, f"{name}.weight", multiplier=multiplier)
    return h_TD, k.normalise(spec.norm, weight_D, None, x_TD)


def routing_norm(moe: Moe) -> tuple[str, float]:
    """The norm before the router, and what its weights are times."""
    if moe.router_norm is None:
        return _expert_norm(moe), 1.0
    return "router.norm", moe.router_norm


def _expert_norm(moe: Moe) -> str:
    return "expert_norm" if has_own_norms(moe.shared) else "post_norm"


def has_own_norms(shared: Shared | None) -> bool:
    """Whether there is a shared expert, and it and the routed ones have norms of their own."""
    return shared is not None and shared.own_norms


def shared_output(
    k: Kernels, spec: ModelSpec, shared: Shared, w: Tensors, y_TD: torch.Tensor
) -> torch.Tensor:
    """What of the shared expert's output joins that of the routed ones."""
    return _norm(k, spec, w, "shared_out_norm", y_TD) if shared.own_norms else y_TD


def add_attention(
    k: Kernels, spec: ModelSpec, layer: int, w: Tensors, x_TD: torch.Tensor, y_TD: torch.Tensor
) -> None:
    """Adds what attention gave to the hidden states, in place."""
    if spec.blocks[layer].output_norms:
        y_TD = _norm(k, spec, w, "attention_out_norm", y_TD)
    k.accumulate(x_TD, y_TD, spec.residual_multiplier)


def add_network(
    k: Kernels, spec: ModelSpec, layer: int, w: Tensors, x_TD: torch.Tensor, y_TD: torch.Tensor
) -> None:
    """Adds what the network gave to the hidden states, in place; the block ends."""
    if spec.blocks[layer].output_norms:
        y_TD = _norm(k, spec, w, "ffn_out_norm", y_TD)
    k.accumulate(x_TD, y_TD, spec.residual_multiplier)
    _end(k, spec, layer, w, x_TD)


def add_experts(
    k: Kernels, spec: ModelSpec, layer: int, w: Tensors, x_TD: torch.Tensor, got: ExpertOutputs
) -> None:
    """The same of what experts gave."""
    block = spec.blocks[layer]
    assert isinstance(block.ffn, Moe), "experts of a dense layer"
    if has_own_norms(block.ffn.shared):
        y_TD = k.weighted_sum(got.weights_TA, got.outputs_TAD, None)
        y_TD = _norm(k, spec, w, "expert_out_norm", y_TD)
        assert got.shared_TD is not None, "the shared expert's output"
        k.accumulate(y_TD, got.shared_TD, 1.0)
    elif block.output_norms:
        y_TD = k.weighted_sum(*got)
    else:
        k.combine(*got, x_TD, spec.residual_multiplier)
        _end(k, spec, layer, w, x_TD)
        return
    add_network(k, spec, layer, w, x_TD, y_TD)


def _end(k: Kernels, spec: ModelSpec, layer: int, w: Tensors, x_TD: torch.Tensor) -> None:
    if spec.blocks[layer].output_scale:
        k.scale(x_TD, plain(w, "output_scale"))


def final_norm(k: Kernels, spec: ModelSpec, w: Tensors, x_TD: torch.Tensor) -> torch.Tensor:
    """What the head reads."""
    return _norm(k, spec, w, "norm", x_TD)


def logits(
    k: Kernels,
    spec: ModelSpec,
    weight_VD: Weight,
    bias_V: torch.Tensor | None,
    h_TD: torch.Tensor,
    out_TV: torch.Tensor,
) -> None:
    """Logits of one chunk of the vocabulary into `out_TV`; `bias_V` is that chunk's range of
    `head_bias`."""
    k.linear(h_TD, weight_VD, None if bias_V is None else bias_V.float(), out=out_TV)
    if spec.logit_divisor != 1:
        out_TV /= spec.logit_divisor
    if spec.logit_cap is not None:
        for some in torch.split(out_TV, max(1, _CAPPED // out_TV.shape[1])):
            some.copy_(k.pointwise(torch.tanh, some / spec.logit_cap)).mul_(spec.logit_cap)


def _norm(k: Kernels, spec: ModelSpec, w: Tensors, name: str, x_TD: torch.Tensor) -> torch.Tensor:
    weight, bias = plain(w, f"{name}.weight"), plain_or_none(w, f"{name}.bias")
    return k.normalise(spec.norm, weight, bias, x_TD)

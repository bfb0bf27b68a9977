"""The small pieces of a block and of the model's ends, for a runtime to put together.

A block is: `attention_input`, attention (`decoder/attention.py` around the kernel over the cache,
or `decoder/recurrent.py`), `residual`, `ffn_input`, a feed-forward network (`decoder/moe.py`),
`residual`. Rows are fp32 and independent of each other.

Shapes: T rows, D hidden, V tokens of a head's chunk.
"""

import torch

from windlass.kernels.interface import Kernels
from windlass.models.spec import ModelSpec
from windlass.tensors import Tensors, Weight, plain, plain_or_none


def embed(spec: ModelSpec, rows_TD: torch.Tensor) -> torch.Tensor:
    """Rows of the embedding table, in its stored type -> hidden states fp32."""
    return rows_TD.float() * spec.embed_multiplier


def attention_input(k: Kernels, spec: ModelSpec, w: Tensors, x_TD: torch.Tensor) -> torch.Tensor:
    """What any kind of attention of a block reads: normalised hidden states."""
    return _norm(k, spec, w, "input_norm", x_TD)


def ffn_input(k: Kernels, spec: ModelSpec, w: Tensors, x_TD: torch.Tensor) -> torch.Tensor:
    """What router, experts, shared expert or dense network of a block read."""
    return _norm(k, spec, w, "post_norm", x_TD)


def residual(k: Kernels, spec: ModelSpec, x_TD: torch.Tensor, y_TD: torch.Tensor) -> None:
    """Adds a sublayer's output to the hidden states, in place."""
    k.accumulate(x_TD, y_TD, spec.residual_multiplier)


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


def _norm(k: Kernels, spec: ModelSpec, w: Tensors, name: str, x_TD: torch.Tensor) -> torch.Tensor:
    weight, bias = plain(w, f"{name}.weight"), plain_or_none(w, f"{name}.bias")
    return k.normalise(spec.norm, weight, bias, x_TD)

"""Routing and feed-forward networks of one block. Pure functions over (description, weights).

Which experts are in memory, and in which order they run, is not known here: `route` says who is
needed.

Shapes: T rows, D hidden, E experts, A experts per row.
"""

import torch

from windlass.decoder.attention import linear
from windlass.kernels.interface import Kernels, Routes
from windlass.models.spec import Ffn, Moe, Shared
from windlass.tensors import Tensors, floats_or_none


def route(
    k: Kernels, moe: Moe, w: Tensors, h_TD: torch.Tensor, *, wants_scores: bool = False
) -> Routes:
    """The experts of each row, and the router's scores of all experts where they are wanted."""
    vectors = (floats_or_none(w, f"router.{name}") for name in ("select_bias", "expert_scale"))
    logits_TE = linear(k, w, "router", h_TD)
    return k.route(moe.routing, moe.top_k, logits_TE, *vectors, wants_scores=wants_scores)


def shared_expert(k: Kernels, shared: Shared, w: Tensors, h_TD: torch.Tensor) -> torch.Tensor:
    """The expert that every row uses -> (T, D)."""
    names = shared.ffn.matrices
    own = {name: w[f"shared.{name}.weight"] for name in names}
    if shared.ffn.bias:
        own |= {f"{name}_bias": w[f"shared.{name}.bias"] for name in names}
    y_TD = k.expert_ffn(h_TD, own, shared.ffn.activation)
    if shared.gated:
        k.gate(y_TD, linear(k, w, "shared.mix", h_TD))
    return y_TD


def dense_ffn(k: Kernels, ffn: Ffn, w: Tensors, h_TD: torch.Tensor) -> torch.Tensor:
    """The feed-forward network of a block without experts -> (T, D)."""
    return k.expert_ffn(h_TD, w, ffn.activation)

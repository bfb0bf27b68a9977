"""The routers of a model as linear maps, read from its checkpoint."""

import torch

from windlass.ids import Part, WeightKey
from windlass.kernels.interface import Kernels
from windlass.models.spec import LayerNorm, ModelSpec, Moe, RmsNorm
from windlass.decoder.attention import linear
from windlass.decoder.block import has_own_norms
from windlass.replay.trace_file import Router
from windlass.tensors import Tensors, floats_or_none
from windlass.weights.store import WeightStore


def read_routers(spec: ModelSpec, weights: WeightStore, kernels: Kernels) -> list[Router]:
    """Of all layers with experts, in order. Reads their blocks, one at a time."""
    routers = []
    for layer, block in enumerate(spec.blocks):
        if isinstance(block.ffn, Moe):
            with torch.inference_mode(), weights.lease(WeightKey(Part.BLOCK, layer)) as lease:
                routers.append(_router(spec, block.ffn, lease.tensors, kernels))
    return routers


def _router(spec: ModelSpec, moe: Moe, w: Tensors, kernels: Kernels) -> Router:
    zero_E = torch.zeros(moe.num_experts)
    ones_D = torch.ones(spec.hidden_size)
    # what the kernels make of it, however it is stored: of no row its bias, of unit rows the rest
    bias_E = linear(kernels, w, "router", 0 * ones_D[None])[0].clone()
    weight_ED = (linear(kernels, w, "router", ones_D.diag()) - bias_E).T
    if moe.router_norm is not None:
        norm_D = floats_or_none(w, "router.norm.weight", multiplier=moe.router_norm)
        norm_bias_D = None
    else:
        name = "expert_norm" if has_own_norms(moe.shared) else "post_norm"
        norm_D, norm_bias_D = (floats_or_none(w, f"{name}.{kind}") for kind in ("weight", "bias"))
    if norm_bias_D is not None:
        bias_E = bias_E + weight_ED @ norm_bias_D
    weight_ED = weight_ED * _factor(spec, norm_D, ones_D)
    if isinstance(spec.norm, LayerNorm):  # its mean is taken off before
        weight_ED = weight_ED - weight_ED.mean(dim=1, keepdim=True)
    select_E = floats_or_none(w, "router.select_bias")
    arrays = (weight_ED, bias_E, zero_E if select_E is None else select_E)
    return Router(*(array.numpy().copy() for array in arrays))


def _factor(spec: ModelSpec, norm_D: torch.Tensor | None, ones_D: torch.Tensor) -> torch.Tensor:
    """What a norm multiplies each of its numbers by."""
    if norm_D is None:
        return ones_D
    return norm_D + 1 if isinstance(spec.norm, RmsNorm) and spec.norm.plus_one else norm_D

"""A router with the norm before it as one matrix, for whoever foretells what it will say.

Shapes: D hidden, E experts.
"""

import numpy as np

from windlass.decoder.block import routing_norm
from windlass.kernels.dequantise import dequantise
from windlass.models.spec import ModelSpec, Moe, RmsNorm
from windlass.schedule.observer import RouterWeights
from windlass.tensors import Packed, Tensors, plain, plain_or_none


def router_weights(spec: ModelSpec, layer: int, w: Tensors) -> RouterWeights:
    """Of a layer with experts, from its block; copies, as numpy has them."""
    moe = spec.blocks[layer].ffn
    assert isinstance(moe, Moe), f"layer {layer} has no router"
    name, multiplier = routing_norm(moe)
    scale_D = plain(w, f"{name}.weight").float() * multiplier
    if isinstance(spec.norm, RmsNorm) and spec.norm.plus_one:
        scale_D = scale_D + 1.0
    matrix = w["router.weight"]
    if isinstance(matrix, Packed):
        w_ED = dequantise(matrix, 0, matrix.shape[0])
    else:
        w_ED = plain(w, "router.weight").float()
    bias_E = np.zeros(len(w_ED), np.float32)
    if (norm_bias_D := plain_or_none(w, f"{name}.bias")) is not None:
        bias_E += (w_ED @ norm_bias_D.float()).numpy()
    if (own_bias_E := plain_or_none(w, "router.bias")) is not None:
        bias_E += own_bias_E.float().numpy()
    select_E = plain_or_none(w, "router.select_bias")
    return RouterWeights(
        layer,
        moe,
        spec.norm,
        (w_ED * scale_D).t().contiguous().numpy(),
        bias_E,
        None if select_E is None else select_E.float().clone().numpy(),
    )

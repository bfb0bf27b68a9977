"""A router with the norm before it as one matrix, for whoever foretells what it will say.

Shapes: D hidden, E experts.
"""

from windlass.decoder.block import routing_norm
from windlass.device.streams import Streams
from windlass.kernels.dequantise import dequantise
from windlass.models.spec import ModelSpec, Moe, RmsNorm
from windlass.schedule.observer import RouterWeights
from windlass.tensors import Packed, Tensors, plain, plain_or_none


def router_weights(spec: ModelSpec, layer: int, w: Tensors, streams: Streams) -> RouterWeights:
    """Of a layer with experts, from its block, on the device of `streams`; copies, as numpy has
    them."""
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
    bias_E = w_ED.new_zeros(len(w_ED))
    if (norm_bias_D := plain_or_none(w, f"{name}.bias")) is not None:
        bias_E += w_ED @ norm_bias_D.float()
    if (own_bias_E := plain_or_none(w, "router.bias")) is not None:
        bias_E += own_bias_E.float()
    made = [(w_ED * scale_D).t().contiguous(), bias_E]
    if (select_E := plain_or_none(w, "router.select_bias")) is not None:
        made.append(select_E.float().clone())
    weight_DE, bias_E, *select = streams.on_host(*made)
    return RouterWeights(
        layer,
        moe,
        spec.norm,
        weight_DE.numpy(),
        bias_E.numpy(),
        select[0].numpy() if select else None,
    )

"""A router with the norm before it as one matrix, for whoever foretells what it will say.

Shapes: D hidden, E experts.
"""

from dataclasses import replace

import torch

from windlass.decoder.block import routing_norm
from windlass.device.streams import Streams
from windlass.kernels.dequantise import dequantise
from windlass.models.spec import ModelSpec, Moe, RmsNorm
from windlass.schedule.observer import RouterWeights
from windlass.tensors import Packed, Tensors, Weight, plain, plain_or_none

_VECTORS = ("bias", "select_bias")


def router_weights(spec: ModelSpec, layer: int, w: Tensors, streams: Streams) -> RouterWeights:
    """Of a layer with experts, from its block, on the device of `streams`; made on the host, as
    numpy has them."""
    moe = spec.blocks[layer].ffn
    assert isinstance(moe, Moe), f"layer {layer} has no router"
    name, multiplier = routing_norm(moe)
    names = (f"{name}.weight", f"{name}.bias", *map("router.{}".format, ("weight", *_VECTORS)))
    w = {own: _on_host(w[own], streams) for own in names if own in w}
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
    select_E = plain_or_none(w, "router.select_bias")
    return RouterWeights(
        layer,
        moe,
        spec.norm,
        (w_ED * scale_D).t().contiguous().numpy(),
        bias_E.numpy(),
        None if select_E is None else select_E.float().clone().numpy(),
    )


def _on_host(weight: Weight, streams: Streams) -> Weight:
    """Neither a stack of heads nor anything else that no router is."""
    if isinstance(weight, torch.Tensor):
        return streams.on_host(weight.contiguous())[0]
    assert isinstance(weight, Packed), "a router is one matrix"
    names = [n for n in ("codes", "scales", "zeros", "groups") if getattr(weight, n) is not None]
    copies = streams.on_host(*(getattr(weight, name).contiguous() for name in names))
    own = dict(zip(names, copies, strict=True))
    return replace(
        weight,
        codes=own["codes"],
        scales=own["scales"],
        zeros=own.get("zeros"),
        groups=own.get("groups"),
    )

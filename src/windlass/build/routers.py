"""The routers of a model as linear maps, read from its checkpoint."""

import torch

from windlass.decoder.router import router_weights
from windlass.device.streams import Streams
from windlass.ids import Part, WeightKey
from windlass.models.spec import LayerNorm, ModelSpec, Moe
from windlass.replay.trace_file import Router
from windlass.schedule.observer import RouterWeights
from windlass.weights.store import WeightStore


def read_routers(spec: ModelSpec, weights: WeightStore, streams: Streams) -> list[Router]:
    """Of all layers of a pass with experts, in order. Reads their blocks, one at a time, on the
    device of `streams`."""
    routers = []
    for layer, block in enumerate(spec.trunk.blocks):
        if isinstance(block.ffn, Moe):
            with (
                streams.on(streams.compute),
                torch.inference_mode(),
                weights.lease(WeightKey(Part.BLOCK, layer)) as lease,
            ):
                routers.append(_router(router_weights(spec, layer, lease.tensors, streams)))
    return routers


def _router(router: RouterWeights) -> Router:
    weight_ED, select_E = router.weight_DE.T, router.select_bias_E
    if isinstance(router.norm, LayerNorm):  # its mean is taken off before
        weight_ED = weight_ED - weight_ED.mean(axis=1, keepdims=True)
    return Router(
        weight_ED.copy(), router.bias_E, 0 * router.bias_E if select_E is None else select_E
    )

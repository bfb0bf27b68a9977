"""The routers of a trace, as forecasts that begin with them want them."""

from collections.abc import Iterator, Mapping

import numpy as np

from windlass.errors import UsageError
from windlass.forecast.gate_shares import LOGIT_ROUTINGS
from windlass.forecast.interface import ExpertForecast
from windlass.forecast.learned import LearnedForecast
from windlass.models.spec import (
    Ffn,
    Moe,
    RmsNorm,
    Routing,
    SigmoidTopK,
    SoftmaxTopK,
    SparseMixer,
    SwiGlu,
    TopKSoftmax,
)
from windlass.replay.routing_trace import RoutingTrace
from windlass.schedule.observer import RouterWeights

# A trace knows the kind of routing alone: groups of experts, which a choice is limited to, are not
# in it. Weights of the experts that are chosen do not matter to who foretells the choice.
_ROUTINGS: Mapping[str, Routing] = {
    "SoftmaxTopK": SoftmaxTopK(renorm_floor=None),
    "TopKSoftmax": TopKSoftmax(),
    "SigmoidTopK": SigmoidTopK(renorm_eps=None),
    "SparseMixer": SparseMixer(jitter_eps=0.01),
}
_EPS = 1e-6  # of the mean square that the residual stream is divided by


def are_logits(trace: RoutingTrace) -> bool:
    """Whether the scores of a trace are logits."""
    return any(isinstance(_ROUTINGS.get(name), LOGIT_ROUTINGS) for name in trace.routings)


def tell_routers(forecast: ExpertForecast, trace: RoutingTrace) -> None:
    """Gives `forecast` the routers, if it begins with them."""
    if isinstance(forecast, LearnedForecast):
        for router in _routers(trace):
            forecast.set_router(router)


def _routers(trace: RoutingTrace) -> Iterator[RouterWeights]:
    layers = trace.table().layers
    for layer, name, router in zip(layers, trace.routings, trace.routers, strict=True):
        routing = _ROUTINGS.get(name)
        if routing is None:
            raise UsageError(
                f"trace of {trace.model}: got {name} of layer {layer}, allowed"
                f" {', '.join(_ROUTINGS)}"
            )
        moe = Moe(
            num_experts=trace.num_experts[layer], top_k=trace.top_k, routing=routing,
            expert=Ffn(intermediate=1, activation=SwiGlu()),
        )  # fmt: skip
        select_E = router.select_bias_E if np.any(router.select_bias_E) else None
        yield RouterWeights(
            layer, moe, RmsNorm(eps=_EPS), router.weight_ED.T.copy(), router.bias_E, select_E
        )

"""Routing in Triton against that in torch."""

import pytest
import torch
from gpu.tolerances import TOLERANCES, error

from windlass.kernels import routing as reference
from windlass.kernels.triton.routing import route
from windlass.models.spec import (
    Routing,
    RoutingGroups,
    SigmoidTopK,
    SoftmaxTopK,
    SparseMixer,
    TopKSoftmax,
)

BY_MAX = RoutingGroups(num=4, kept=2, score="max")
BY_TWO = RoutingGroups(num=4, kept=2, score="top2_sum")
EXPERTS = 12
ROUTINGS: dict[str, tuple[Routing, int]] = {
    "softmax": (SoftmaxTopK(renorm_floor=None, scale=1.5), 3),
    "softmax, sum": (SoftmaxTopK(renorm_floor=0.0, expert_scale=True), 3),
    "softmax, floor": (SoftmaxTopK(renorm_floor=0.9, select_bias=True), 3),
    "softmax, euclid": (SoftmaxTopK(renorm_floor=0.0, renorm_order=2), 3),
    "softmax, groups": (SoftmaxTopK(renorm_floor=None, groups=BY_MAX), 5),
    "top k": (TopKSoftmax(), 3),
    "sigmoid": (SigmoidTopK(renorm_eps=0.1, scale=2.0, select_bias=False), 3),
    "sigmoid, groups": (SigmoidTopK(renorm_eps=None, groups=BY_TWO), 6),
    "mixer": (SparseMixer(jitter_eps=0.2), 2),
}


def vectors(routing: Routing) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    bias, scale = torch.randn(2, EXPERTS, generator=generator)
    return (
        bias if getattr(routing, "select_bias", False) else None,
        scale if getattr(routing, "expert_scale", False) else None,
    )


@pytest.mark.parametrize("name", ROUTINGS)
def test_as_the_reference(name: str) -> None:
    routing, top_k = ROUTINGS[name]
    logits = torch.randn(6, EXPERTS, generator=torch.Generator().manual_seed(0))
    bias, scale = vectors(routing)
    got = route(routing, top_k, logits, bias, scale, wants_scores=True)
    want = reference.route(lambda f, x: f(x), routing, top_k, logits, bias)
    weights = want.weights_TA if scale is None else want.weights_TA * scale[want.ids_TA]
    assert torch.equal(got.ids_TA, want.ids_TA)
    assert error(got.weights_TA, weights) < TOLERANCES[torch.float32]
    assert got.scores_TE is not None and want.scores_TE is not None
    assert error(got.scores_TE, want.scores_TE) < TOLERANCES[torch.float32]
    alone = route(routing, top_k, logits[2:3], bias, scale)
    assert torch.equal(alone.weights_TA[0], got.weights_TA[2])
    assert torch.equal(alone.ids_TA[0], got.ids_TA[2]) and alone.scores_TE is None


def test_of_equals_the_first_and_no_expert_twice() -> None:
    logits = torch.tensor([[1.0, 2, 2, 1, 2], [0, 0, 0, 0, 0]])
    assert route(TopKSoftmax(), 4, logits, None).ids_TA.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["softmax", "top k", "sigmoid, groups"])
def test_ids_stay_in_range_whatever_the_logits(name: str) -> None:
    routing, top_k = ROUTINGS[name]
    logits = torch.full((2, EXPERTS), torch.nan)
    logits[1] = -torch.inf
    ids = route(routing, top_k, logits, vectors(routing)[0]).ids_TA
    assert ids.ge(0).all() and ids.lt(EXPERTS).all()

"""Choices by numpy, against the routing that kernels are tested against."""

import numpy as np
import pytest
import torch

from windlass.forecast.selection import is_relative, logits_of, margins
from windlass.kernels.routing import route
from windlass.models.spec import (
    Ffn,
    Moe,
    Routing,
    RoutingGroups,
    SigmoidTopK,
    SoftmaxTopK,
    SparseMixer,
    TopKSoftmax,
)

MAX = RoutingGroups(num=8, kept=3, score="max")
TWO = RoutingGroups(num=8, kept=3, score="top2_sum")
KINDS: list[tuple[Routing, bool]] = [
    (SoftmaxTopK(renorm_floor=0.0), False),
    (SoftmaxTopK(renorm_floor=None, select_bias=True), True),
    (SoftmaxTopK(renorm_floor=None, groups=MAX), False),
    (SoftmaxTopK(renorm_floor=None, groups=TWO), False),
    (TopKSoftmax(router_bias=True), False),
    (SigmoidTopK(renorm_eps=1e-20), True),
    (SigmoidTopK(renorm_eps=None, select_bias=False), False),
    (SigmoidTopK(renorm_eps=1e-20, groups=TWO), True),
    (SigmoidTopK(renorm_eps=1e-20, groups=MAX), True),
]
CASES = [
    *((kind, has_bias, size, 6) for kind, has_bias in KINDS for size in (128, 512)),
    (SparseMixer(jitter_eps=0.01), False, 16, 2),
    (SoftmaxTopK(renorm_floor=0.0), False, 4, 4),
]


@pytest.mark.parametrize(("routing", "has_bias", "size", "top_k"), CASES)
def test_what_is_above_zero_is_what_is_chosen(routing, has_bias, size, top_k):
    chance = np.random.default_rng(0)
    logits = chance.normal(0, 1.5, (50, size)).astype(np.float32)
    # as wide as the scores: it decides some choices, and not all
    bias = chance.normal(0, 0.3 if isinstance(routing, SigmoidTopK) else 0.01, size)
    bias = bias.astype(np.float32) if has_bias else None
    bias_E = None if bias is None else torch.from_numpy(bias)
    routes = route(lambda f, x: f(x), routing, top_k, torch.from_numpy(logits), bias_E)
    moe = Moe(num_experts=size, top_k=top_k, routing=routing, expert=Ffn(intermediate=1))
    found = margins(moe, logits, bias)
    chosen = np.zeros(found.shape, bool)
    np.put_along_axis(chosen, routes.ids_TA.numpy(), True, 1)
    assert ((found > 0) == chosen).all()
    assert routes.scores_TE is not None
    recovered = logits_of(routing, routes.scores_TE.numpy())
    if is_relative(routing):
        recovered, logits = (z - z.mean(-1, keepdims=True) for z in (recovered, logits))
    np.testing.assert_allclose(recovered, logits, atol=2e-4)
    assert ((margins(moe, recovered, bias) > 0) == chosen).mean() > 0.999


def test_experts_of_a_group_that_is_far_behind_are_far_from_being_chosen():
    groups = RoutingGroups(num=2, kept=1, score="max")
    routing = SigmoidTopK(renorm_eps=None, select_bias=False, groups=groups)
    moe = Moe(num_experts=4, top_k=1, routing=routing, expert=Ffn(intermediate=1))
    near, far = (
        margins(moe, np.array([[2.0, -9.0, best, -9.0]], np.float32), None)[0]
        for best in (1.9, -3.0)
    )
    assert 0 > near[2] > -0.01 and far[2] < -0.4


def test_scores_that_rounded_to_the_ends_give_finite_logits():
    for routing in (SoftmaxTopK(renorm_floor=0.0), SigmoidTopK(renorm_eps=None)):
        found = logits_of(routing, np.array([[0.0, 1.0, 1e-40]], np.float32))
        assert np.isfinite(found).all() and found[0, 1] > found[0, 0]

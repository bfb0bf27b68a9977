"""Routing against plain arithmetic, and independence of rows."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import NATIVE, kernels_of
from windlass.decoder.moe import route
from windlass.kernels.reference import TorchKernels
from windlass.kernels.rowwise import normalise
from windlass.models.spec import (
    Ffn,
    LayerNorm,
    Moe,
    RmsNorm,
    Routing,
    RoutingGroups,
    SigmoidTopK,
    SoftmaxTopK,
    SparseMixer,
    TopKSoftmax,
)

KERNELS = TorchKernels()
HIDDEN = 24
ROUTINGS: dict[str, Routing] = {
    "softmax": SoftmaxTopK(renorm_floor=None, scale=1.5),
    "softmax, sum": SoftmaxTopK(renorm_floor=0.0),
    "softmax, sum, floor": SoftmaxTopK(renorm_floor=0.9, select_bias=True),
    "softmax, sum, by expert": SoftmaxTopK(renorm_floor=0.0, expert_scale=True),
    "softmax, euclid": SoftmaxTopK(renorm_floor=0.0, renorm_order=2),
    "softmax, groups": SoftmaxTopK(
        renorm_floor=None, groups=RoutingGroups(num=4, kept=2, score="max")
    ),
    "top k softmax": TopKSoftmax(router_bias=True),
    "sigmoid": SigmoidTopK(renorm_eps=0.1, scale=2.0),
    "sigmoid, groups": SigmoidTopK(
        renorm_eps=None, groups=RoutingGroups(num=4, kept=2, score="top2_sum"), select_bias=True
    ),
    "sparse mixer": SparseMixer(jitter_eps=0.2),
}


def moe(routing: Routing, top_k: int = 2) -> Moe:
    return Moe(num_experts=12, top_k=top_k, routing=routing, expert=Ffn(intermediate=8))


def weights(routing: Routing, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w = {"router.weight": torch.randn(12, HIDDEN, generator=generator) / 3}
    if isinstance(routing, TopKSoftmax):
        w["router.bias"] = torch.randn(12, generator=generator)
    if isinstance(routing, SoftmaxTopK | SigmoidTopK) and routing.select_bias:
        w["router.select_bias"] = torch.randn(12, generator=generator)
    if isinstance(routing, SoftmaxTopK) and routing.expert_scale:
        w["router.expert_scale"] = torch.randn(12, generator=generator)
    return w


def rows(num: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num, HIDDEN, generator=torch.Generator().manual_seed(seed))


def by_hand(
    routing: Routing, top_k: int, w: dict[str, torch.Tensor], h: torch.Tensor
) -> dict[int, float]:
    """Experts and weights of one row, expert by expert."""
    logits = (w["router.weight"].double() @ h.double()).tolist()
    exp = [torch.tensor(x).exp().item() for x in logits]
    bias = w.get("router.select_bias", torch.zeros(12)).tolist()
    match routing:
        case TopKSoftmax():
            logits = [x + b for x, b in zip(logits, w["router.bias"].tolist(), strict=True)]
            best = sorted(range(12), key=lambda e: -logits[e])[:top_k]
            total = sum(2.718281828459045 ** logits[e] for e in best)
            return {e: 2.718281828459045 ** logits[e] / total for e in best}
        case SoftmaxTopK():
            scores = [x / sum(exp) for x in exp]
        case SigmoidTopK():
            scores = [1 / (1 + 1 / x) for x in exp]
        case SparseMixer():
            return _sparse_mixer_by_hand(logits, routing.jitter_eps)
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    eligible = set(range(12))
    if isinstance(routing.groups, RoutingGroups):
        size = 12 // routing.groups.num
        groups = [list(range(g * size, (g + 1) * size)) for g in range(routing.groups.num)]
        num = 1 if routing.groups.score == "max" else 2
        rank = [sum(sorted((choice[e] for e in group), reverse=True)[:num]) for group in groups]
        kept = sorted(range(len(groups)), key=lambda g: -rank[g])[: routing.groups.kept]
        eligible = {e for g in kept for e in groups[g]}
    best = sorted(eligible, key=lambda e: -choice[e])[:top_k]
    size_of_kept = 1.0
    if isinstance(routing, SoftmaxTopK) and routing.renorm_floor is not None:
        order = routing.renorm_order
        norm = sum(scores[e] ** order for e in best) ** (1 / order)
        size_of_kept = max(norm, routing.renorm_floor)
    if isinstance(routing, SigmoidTopK) and routing.renorm_eps is not None:
        size_of_kept = sum(scores[e] for e in best) + routing.renorm_eps
    factors = w.get("router.expert_scale", torch.ones(12)).tolist()
    return {e: scores[e] / size_of_kept * routing.scale * factors[e] for e in best}


def _sparse_mixer_by_hand(logits: list[float], eps: float) -> dict[int, float]:
    chosen: dict[int, float] = {}
    for _ in range(2):
        left = [e for e in range(12) if e not in chosen]
        best = max(left, key=lambda e: logits[e])
        top = logits[best]
        near = [e for e in left if (top - logits[e]) / max(abs(logits[e]), top) <= 2 * eps]
        total = sum(2.718281828459045 ** (logits[e] - top) for e in near)
        chosen[best] = 1 / total
    return chosen


@pytest.fixture(scope="module", params=["torch", *NATIVE])
def kernels(request: pytest.FixtureRequest) -> Iterator[TorchKernels]:
    with kernels_of(request.param) as found:
        yield found


@pytest.mark.parametrize("name", ROUTINGS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), top_k=st.integers(1, 6))
def test_against_plain_arithmetic(kernels: TorchKernels, name: str, seed: int, top_k: int) -> None:
    routing = ROUTINGS[name]
    top_k = 2 if isinstance(routing, SparseMixer) else top_k
    w, h_TD = weights(routing, seed), rows(3, seed + 1)
    got, ids, _ = route(kernels, moe(routing, top_k), w, h_TD)
    assert got.dtype == torch.float32 and ids.dtype == torch.int64
    assert got.shape == ids.shape == (3, top_k)
    for row in range(3):
        expected = by_hand(routing, top_k, w, h_TD[row])
        assert dict(zip(ids[row].tolist(), got[row].tolist(), strict=True)) == pytest.approx(
            expected, abs=1e-5
        )


@pytest.mark.parametrize("name", ROUTINGS)
def test_rows_do_not_depend_on_each_other(kernels: TorchKernels, name: str) -> None:
    routing = ROUTINGS[name]
    w, h_TD = weights(routing), rows(67)
    got, ids, _ = route(kernels, moe(routing), w, h_TD)
    for first, last in ((0, 1), (5, 6), (3, 20), (66, 67), (1, 67)):
        part, part_ids, _ = route(kernels, moe(routing), w, h_TD[first:last].clone())
        assert torch.equal(part, got[first:last]) and torch.equal(part_ids, ids[first:last])


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("num_rows", [1, 67])
def test_scores_are_handed_out_and_change_nothing(
    kernels: TorchKernels, name: str, num_rows: int
) -> None:
    routing = ROUTINGS[name]
    w, h_TD = weights(routing), rows(num_rows)
    bare = route(kernels, moe(routing), w, h_TD)
    got = route(kernels, moe(routing), w, h_TD, wants_scores=True)
    assert bare.scores_TE is None
    assert torch.equal(got.weights_TA, bare.weights_TA) and torch.equal(got.ids_TA, bare.ids_TA)
    assert got.scores_TE is not None and got.scores_TE.dtype == torch.float32
    logits_TE = h_TD.double() @ w["router.weight"].double().T
    if isinstance(routing, TopKSoftmax):
        logits_TE += w["router.bias"].double()
    expected = {
        SoftmaxTopK: lambda: logits_TE.softmax(-1),
        SigmoidTopK: lambda: logits_TE.sigmoid(),
        TopKSoftmax: lambda: logits_TE,
        SparseMixer: lambda: logits_TE,
    }[type(routing)]()
    torch.testing.assert_close(got.scores_TE, expected.float(), rtol=1e-5, atol=1e-6)
    torch_scores = route(KERNELS, moe(routing), w, h_TD, wants_scores=True).scores_TE
    torch.testing.assert_close(got.scores_TE, torch_scores, rtol=1e-5, atol=1e-6)
    for row in (0, num_rows - 1):
        alone = route(kernels, moe(routing), w, h_TD[row : row + 1].clone(), wants_scores=True)
        assert alone.scores_TE is not None
        assert torch.equal(alone.scores_TE[0], got.scores_TE[row])


@pytest.mark.parametrize("width", [7, 64, 100, 2880])
@pytest.mark.parametrize("norm", [RmsNorm(eps=1e-6), LayerNorm(eps=1e-6, bias=True)])
def test_normalised_rows_do_not_depend_on_each_other(norm: RmsNorm | LayerNorm, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(width, generator=generator) for _ in range(2))
    x = torch.randn(67, width, generator=generator)
    whole = normalise(norm, weight, bias, x)
    for first, last in ((0, 1), (5, 6), (3, 20), (66, 67), (1, 67)):
        assert torch.equal(normalise(norm, weight, bias, x[first:last].clone()), whole[first:last])


def test_norms_against_torch() -> None:
    x, weight, bias = torch.randn(5, 33), torch.randn(33), torch.randn(33)
    layer = torch.nn.functional.layer_norm(x, (33,), weight, bias, 1e-3)
    torch.testing.assert_close(normalise(LayerNorm(eps=1e-3, bias=True), weight, bias, x), layer)
    rms = torch.nn.functional.rms_norm(x, (33,), weight, 1e-3)
    torch.testing.assert_close(normalise(RmsNorm(eps=1e-3), weight, None, x), rms)
    plus = torch.nn.functional.rms_norm(x, (33,), weight + 1, 1e-3)
    torch.testing.assert_close(normalise(RmsNorm(eps=1e-3, plus_one=True), weight, None, x), plus)


def test_combination_goes_in_routing_order() -> None:
    outputs = torch.tensor([[[1e8], [-1e8], [1.0]], [[1.0], [1e8], [-1e8]]])
    ones = torch.ones(2, 3)
    hidden = torch.zeros(2, 1)
    KERNELS.combine(ones, outputs, None, hidden, 1.0)
    assert hidden.tolist() == [[1.0], [0.0]]  # fp32: 1 is lost in 1e8 first
    KERNELS.combine(ones * 2, outputs[:, :1].repeat(1, 3, 1), torch.ones(2, 1), hidden, 0.5)
    assert hidden.tolist() == [[3e8], [3.5]]


def test_bias_decides_the_choice_but_not_the_weight() -> None:
    routing = SoftmaxTopK(renorm_floor=None, select_bias=True)
    w, h_TD = weights(routing), rows(4)
    w["router.select_bias"] = torch.zeros(12)
    w["router.select_bias"][7] = 10.0
    got, ids, _ = route(KERNELS, moe(routing), w, h_TD)
    assert (ids[:, 0] == 7).all()
    plain = route(KERNELS, moe(replace(routing, select_bias=False), 12), w, h_TD)
    scores = torch.zeros(4, 12).scatter(1, plain[1], plain[0])
    torch.testing.assert_close(got, scores.gather(1, ids))

"""From a router's logits to the experts of each row: a program for a row.

Shapes: T rows, E experts, A experts per row, G groups.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from windlass.kernels.interface import Routes
from windlass.models.spec import (
    Routing,
    RoutingGroups,
    SigmoidTopK,
    SoftmaxTopK,
    SparseMixer,
    TopKSoftmax,
)


@triton.jit
def _best(x, at):
    """The largest of `x`, and the first place where it is."""
    largest = tl.max(x, 0)
    return largest, tl.min(tl.where(x == largest, at, 1 << 30), 0)


@triton.jit
def _eligible(
    choice, e, E: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    BG: tl.constexpr,
):  # fmt: skip
    """-inf for experts outside the best groups."""
    group = e // (E // GROUPS)
    g = tl.arange(0, BG)
    rank = tl.full((BG,), float("-inf"), tl.float32)
    for i in tl.static_range(GROUPS):
        own = tl.where(group == i, choice, float("-inf"))
        first, place = _best(own, e)
        if TOP2:
            first += tl.max(tl.where(e == place, float("-inf"), own), 0)
        rank = tl.where(g == i, first, rank)
    kept = e < 0
    for _ in tl.static_range(KEPT):
        _, place = _best(rank, g)
        kept = kept | (group == place)
        rank = tl.where(g == place, float("-inf"), rank)
    return tl.where(kept, choice, float("-inf"))


@triton.jit
def _softmax(x):
    weight = tl.exp(x - tl.max(x, 0))
    return weight / tl.sum(weight, 0)


@triton.jit
def _shared_out(weight, floor, NORM: tl.constexpr):
    """Norm 0 leaves weights as they are, 1 and 2 divide by that norm or `floor`, the larger; 3 by
    their sum plus `floor`."""
    if NORM == 1:
        return weight / tl.maximum(tl.sum(weight, 0), floor)
    if NORM == 2:
        return weight / tl.maximum(tl.sqrt(tl.sum(weight * weight, 0)), floor)
    if NORM == 3:
        return weight / (tl.sum(weight, 0) + floor)
    return weight


@triton.jit
def route_row(
    logits, bias, expert_scale, weights, ids, scores, scale, floor, jitter,
    E: tl.constexpr, A: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    BE: tl.constexpr, BA: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    e, a = tl.arange(0, BE), tl.arange(0, BA)
    logit = tl.load(logits + t * E + e, mask=e < E, other=float("-inf"))
    score = _softmax(logit) if KIND == "softmax" else logit
    if KIND == "sigmoid":
        score = tl.sigmoid(logit)
    if scores is not None:
        tl.store(scores + t * E + e, score, mask=e < E)
    choice = score
    if bias is not None:
        choice += tl.load(bias + e, mask=e < E, other=0.0)
    choice = tl.where((e < E) & (choice == choice), choice, float("-inf"))
    if GROUPS > 1:
        choice = _eligible(choice, e, E, GROUPS, KEPT, TOP2, BG)
    weight = tl.full((BA,), float("-inf"), tl.float32)
    chosen = tl.zeros((BA,), tl.int32)
    for i in tl.static_range(A):
        best, place = _best(choice, e)
        own = tl.sum(tl.where(e == place, score, 0.0), 0)
        if KIND == "mixer":  # distances are relative to the larger of the logit itself and the best
            far = tl.maximum(tl.abs(logit), best)
            near = tl.where((best - logit) / far > 2 * jitter, float("-inf"), choice)
            own = 1.0 / tl.sum(tl.exp(near - best), 0)
        weight = tl.where(a == i, own, weight)
        chosen = tl.where(a == i, place, chosen)
        choice = tl.where(e == place, float("-inf"), choice)
    if KIND == "top_k":
        weight = _softmax(weight)
    weight = _shared_out(tl.where(a < A, weight, 0.0), floor, NORM) * scale
    if expert_scale is not None:
        weight = weight * tl.load(expert_scale + chosen, mask=a < A, other=0.0)
    tl.store(weights + t * A + a, weight, mask=a < A)
    tl.store(ids + t * A + a, chosen.to(tl.int64), mask=a < A)


class _Kind(NamedTuple):
    """A routing as `route_row` is told it."""

    name: str
    norm: int = 0
    floor: float = 0.0
    scale: float = 1.0
    jitter: float = 0.0


def _kind(routing: Routing) -> _Kind:
    norm: int
    match routing:
        case SoftmaxTopK():
            norm = 0 if routing.renorm_floor is None else routing.renorm_order
            return _Kind("softmax", norm, routing.renorm_floor or 0.0, routing.scale)
        case TopKSoftmax():
            return _Kind("top_k")
        case SigmoidTopK():
            norm = 0 if routing.renorm_eps is None else 3
            return _Kind("sigmoid", norm, routing.renorm_eps or 0.0, routing.scale)
        case SparseMixer():
            return _Kind("mixer", jitter=routing.jitter_eps)


def route(
    routing: Routing,
    top_k: int,
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    scale_E: torch.Tensor | None = None,
    *,
    wants_scores: bool = False,
) -> Routes:
    """As `Kernels.route`, of contiguous fp32 logits. Of equals the first is better; a NaN is worse
    than any number."""
    rows, experts = logits_TE.shape
    kind = _kind(routing)
    groups = getattr(routing, "groups", None)
    grouped = (
        groups if isinstance(groups, RoutingGroups) else RoutingGroups(num=1, kept=1, score="max")
    )
    weights_TA = logits_TE.new_empty(rows, top_k)
    ids_TA = torch.empty(rows, top_k, dtype=torch.int64, device=logits_TE.device)
    scores_TE = torch.empty_like(logits_TE) if wants_scores else None
    width = triton.next_power_of_2(experts)
    route_row[(rows,)](
        logits_TE, bias_E, scale_E, weights_TA, ids_TA, scores_TE,
        kind.scale, kind.floor, kind.jitter,
        E=experts, A=top_k, KIND=kind.name, NORM=kind.norm,
        GROUPS=grouped.num, KEPT=grouped.kept, TOP2=grouped.score == "top2_sum",
        BE=width, BA=triton.next_power_of_2(top_k), BG=triton.next_power_of_2(grouped.num),
        num_warps=1,
    )  # fmt: skip
    return Routes(weights_TA, ids_TA, scores_TE)

"""From a router's logits to the experts of each row, in torch.

Shapes: T rows, E experts, A experts per row, G groups.
"""

from collections.abc import Callable

import torch

from windlass.kernels.interface import Routes
from windlass.models.spec import (
    NoGroups,
    Routing,
    RoutingGroups,
    SigmoidTopK,
    SoftmaxTopK,
    SparseMixer,
    TopKSoftmax,
)

Pointwise = Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]


def route(
    pointwise: Pointwise,
    routing: Routing,
    top_k: int,
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
) -> Routes:
    """See `Kernels.route`; the scores are there, wanted or not."""
    match routing:
        case SoftmaxTopK():
            scores_TE = logits_TE.softmax(-1)
            ids = _choose(scores_TE, top_k, routing.groups, bias_E)
            kept_TA = _kept_softmax(scores_TE.gather(1, ids), routing)
            return Routes(kept_TA * routing.scale, ids, scores_TE)
        case TopKSoftmax():
            best_TA, ids = logits_TE.topk(top_k, dim=-1)
            return Routes(best_TA.softmax(-1), ids, logits_TE)
        case SigmoidTopK():
            scores_TE = pointwise(torch.sigmoid, logits_TE)
            ids = _choose(scores_TE, top_k, routing.groups, bias_E)
            kept_TA = scores_TE.gather(1, ids)
            if routing.renorm_eps is not None:
                kept_TA = kept_TA / (kept_TA.sum(-1, keepdim=True) + routing.renorm_eps)
            return Routes(kept_TA * routing.scale, ids, scores_TE)
        case SparseMixer():
            return Routes(*_sparse_mixer(logits_TE, routing.jitter_eps), logits_TE)


def _choose(
    scores_TE: torch.Tensor,
    top_k: int,
    groups: NoGroups | RoutingGroups,
    bias_E: torch.Tensor | None,
) -> torch.Tensor:
    """Ids (T, A) of the best experts among the kept groups."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if isinstance(groups, RoutingGroups):
        choice_TGe = choice_TE.view(len(choice_TE), groups.num, -1)
        if groups.score == "max":
            rank_TG = choice_TGe.amax(-1)
        else:
            rank_TG = choice_TGe.topk(2, dim=-1).values.sum(-1)
        kept = rank_TG.topk(groups.kept, dim=-1).indices
        dropped_TG = torch.ones_like(rank_TG, dtype=torch.bool).scatter_(1, kept, False)
        choice_TE = choice_TGe.masked_fill(dropped_TG[..., None], -torch.inf).flatten(1)
    return choice_TE.topk(top_k, dim=-1).indices


def _kept_softmax(kept_TA: torch.Tensor, routing: SoftmaxTopK) -> torch.Tensor:
    if routing.renorm_floor is None:
        return kept_TA
    if routing.renorm_order == 1:
        size = kept_TA.sum(-1, keepdim=True)
    else:
        size = torch.sqrt((kept_TA * kept_TA).sum(-1, keepdim=True))
    return kept_TA / size.clamp(min=routing.renorm_floor)


def _sparse_mixer(logits_TE: torch.Tensor, jitter_eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = [], []
    left_TE = logits_TE
    for _ in range(2):
        best, chosen = left_TE.max(-1, keepdim=True)
        # distances are relative to the larger of the logit itself and the best
        far = (best - logits_TE) / logits_TE.abs().clamp(min=best) > 2 * jitter_eps
        weights.append(left_TE.masked_fill(far, -torch.inf).softmax(-1).gather(1, chosen))
        ids.append(chosen)
        left_TE = left_TE.scatter(1, chosen, -torch.inf)
    return torch.cat(weights, dim=-1), torch.cat(ids, dim=-1)

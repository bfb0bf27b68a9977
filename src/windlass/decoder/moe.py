"""Routing and feed-forward networks of one block. Pure functions over (description, weights).

Which experts are in memory, and in which order they run, is not known here: `route` says who is
needed.

Shapes: T rows, D hidden, E experts, A experts per row, G groups.
"""

import torch

from windlass.decoder.attention import linear
from windlass.kernels.base import Kernels, Tensors
from windlass.packed import plain
from windlass.spec.model import (
    Ffn,
    Groups,
    Moe,
    NoGroups,
    Shared,
    SigmoidTopK,
    SoftmaxTopK,
    SparseMixer,
    TopKSoftmax,
)


def route(
    k: Kernels, moe: Moe, w: Tensors, h_TD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each row: weights (T, A) fp32 and ids (T, A) int64."""
    logits_TE = linear(k, w, "router", h_TD)
    match moe.routing:
        case SoftmaxTopK() as routing:
            scores_TE = logits_TE.softmax(-1)
            ids = _choose(scores_TE, moe.top_k, routing.groups, _select_bias(routing, w))
            return _kept_softmax(scores_TE.gather(1, ids), routing) * routing.scale, ids
        case TopKSoftmax():
            best_TA, ids = logits_TE.topk(moe.top_k, dim=-1)
            return best_TA.softmax(-1), ids
        case SigmoidTopK() as routing:
            scores_TE = k.pointwise(torch.sigmoid, logits_TE)
            ids = _choose(scores_TE, moe.top_k, routing.groups, _select_bias(routing, w))
            kept_TA = scores_TE.gather(1, ids)
            if routing.renorm_eps is not None:
                kept_TA = kept_TA / (kept_TA.sum(-1, keepdim=True) + routing.renorm_eps)
            return kept_TA * routing.scale, ids
        case SparseMixer() as routing:
            return _sparse_mixer(logits_TE, routing.jitter_eps)


def shared_expert(k: Kernels, shared: Shared, w: Tensors, h_TD: torch.Tensor) -> torch.Tensor:
    """The expert that every row uses -> (T, D)."""
    names = ("gate", "up", "down")
    own = {name: w[f"shared.{name}.weight"] for name in names}
    if shared.ffn.bias:
        own |= {f"{name}_bias": w[f"shared.{name}.bias"] for name in names}
    y_TD = k.expert_ffn(h_TD, own, shared.ffn.activation)
    if not shared.gated:
        return y_TD
    return y_TD * k.pointwise(torch.sigmoid, linear(k, w, "shared.mix", h_TD))


def dense_ffn(k: Kernels, ffn: Ffn, w: Tensors, h_TD: torch.Tensor) -> torch.Tensor:
    """The feed-forward network of a block without experts -> (T, D)."""
    return k.expert_ffn(h_TD, w, ffn.activation)


def _select_bias(routing: SoftmaxTopK | SigmoidTopK, w: Tensors) -> torch.Tensor | None:
    return plain(w, "router.select_bias").float() if routing.select_bias else None


def _choose(
    scores_TE: torch.Tensor, top_k: int, groups: NoGroups | Groups, bias_E: torch.Tensor | None
) -> torch.Tensor:
    """Ids (T, A) of the best experts among the kept groups."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if isinstance(groups, Groups):
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

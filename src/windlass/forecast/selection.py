"""Which experts a router chooses of logits that are foretold, and by how much: `kernels/routing.py`
in numpy, with a distance for each expert in place of a yes or no.

T tokens, E experts of a layer, G groups, e experts of a group.
"""

import numpy as np
from numpy.typing import NDArray

from windlass.models.spec import (
    Moe,
    NoGroups,
    Routing,
    RoutingGroups,
    SigmoidTopK,
    SoftmaxTopK,
)

Singles = NDArray[np.float32]
Numbers = NDArray[np.floating]

_LEAST_PROBABILITY = 1e-30
_SATURATED = 15.0  # logits beyond are as good as certain, and sigmoids of fp32 no longer tell them


def logits_of(routing: Routing, scores_TE: Singles) -> Singles:
    """Logits that give these scores; those of a softmax up to a number for each token."""
    match routing:
        case SoftmaxTopK():
            logs_TE: Singles = np.log(np.maximum(scores_TE, _LEAST_PROBABILITY))
            return logs_TE
        case SigmoidTopK():
            rest_TE = np.maximum(1.0 - scores_TE, _LEAST_PROBABILITY)
            odds_TE = np.maximum(scores_TE, _LEAST_PROBABILITY) / rest_TE
            clipped_TE: Singles = np.clip(np.log(odds_TE), -_SATURATED, _SATURATED)
            return clipped_TE
        case _:
            return scores_TE.copy()


def is_relative(routing: Routing) -> bool:
    """Whether the same number added to all logits of a token changes no choice."""
    return not isinstance(routing, SigmoidTopK)


def margins(moe: Moe, logits_TE: Numbers, select_bias_E: Singles | None) -> Numbers:
    """How far each expert is above (or below) what it takes to be chosen. Of what decides: scores
    where a bias or groups compare them, else logits."""
    groups = getattr(moe.routing, "groups", NoGroups())
    choice_TE = logits_TE
    if select_bias_E is not None or isinstance(groups, RoutingGroups):
        choice_TE = _scores(moe.routing, logits_TE)
        if select_bias_E is not None:
            choice_TE = choice_TE + select_bias_E
    if isinstance(groups, RoutingGroups):
        return _grouped(moe.top_k, groups, choice_TE)
    return choice_TE - _threshold(choice_TE, moe.top_k)


def _scores(routing: Routing, logits_TE: Numbers) -> Numbers:
    if isinstance(routing, SigmoidTopK):
        scores_TE: Numbers = 1.0 / (1.0 + np.exp(-logits_TE))
        return scores_TE
    scores_TE = np.exp(logits_TE - logits_TE.max(-1, keepdims=True))
    scores_TE /= scores_TE.sum(-1, keepdims=True)
    return scores_TE


def _threshold(choice_TE: Numbers, kept: int) -> Numbers:
    """(T, 1): midway between the last that is chosen and the first that is not."""
    size = choice_TE.shape[1]
    below = size - kept - 1
    if below < 0:
        least_T1: Numbers = choice_TE.min(-1, keepdims=True)
        return least_T1 - 1.0
    sorted_TE = np.partition(choice_TE, (below, below + 1), -1)
    return 0.5 * (sorted_TE[:, below : below + 1] + sorted_TE[:, below + 1 : below + 2])


def _grouped(top_k: int, groups: RoutingGroups, choice_TE: Numbers) -> Numbers:
    """Experts of a group that is not kept lack at least what their group lacks."""
    num_tokens, size = choice_TE.shape
    choice_TGe = choice_TE.reshape(num_tokens, groups.num, -1)
    if groups.score == "max":
        rank_TG = choice_TGe.max(-1)
    else:
        rank_TG = np.partition(choice_TGe, -2, -1)[:, :, -2:].sum(-1)
    lead_TG = rank_TG - _threshold(rank_TG, groups.kept)
    lead_TE = lead_TG.repeat(size // groups.num, 1)
    is_kept_TE = lead_TE > 0
    least = choice_TE.min() - 1.0
    margin_TE = choice_TE - _threshold(np.where(is_kept_TE, choice_TE, least), top_k)
    return np.where(is_kept_TE, margin_TE, np.minimum(margin_TE, lead_TE))

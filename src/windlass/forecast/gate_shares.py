"""What forecasts that follow the paths of passes see of a pass: one row per sequence.

T tokens of a pass, B sequences, E experts of a layer, H hidden.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.interface import Floats
from windlass.models.spec import ModelSpec, Moe, SparseMixer, TopKSoftmax
from windlass.schedule.batch import Batch

Rows = NDArray[np.float32]

LOGIT_ROUTINGS = (TopKSoftmax, SparseMixer)  # their scores are logits, others' positive numbers

_MOST = 1.0 - 1e-6  # keeps logarithms finite


def are_logits(spec: ModelSpec) -> bool:
    """Whether the scores that a model's routers report are logits."""
    networks = [block.ffn for block in spec.blocks]
    return any(isinstance(ffn, Moe) and isinstance(ffn.routing, LOGIT_ROUTINGS) for ffn in networks)


def shares_of(scores_TE: Any, *, are_logits: bool) -> Rows:
    """A router's distribution (T, E), each row with the sum 1: the softmax of logits; softmaxed
    scores as they are; sigmoids divided by their sum, without the bias of the choice, which is not
    part of the scores."""
    given_TE: Rows = np.asarray(scores_TE).astype(np.float32)  # a copy
    if are_logits:
        given_TE = np.exp(given_TE - given_TE.max(1, keepdims=True))
    total_T = given_TE.sum(1, keepdims=True)
    given_TE /= np.maximum(total_T, np.finfo(np.float32).tiny)
    return given_TE


def chosen(ids_TA: Any, num_experts: int) -> Rows:
    """(T, E): 1 where a token goes."""
    ids_TA = np.asarray(ids_TA)
    chosen_TE = np.zeros((len(ids_TA), num_experts), np.float32)
    np.put_along_axis(chosen_TE, ids_TA, 1.0, 1)
    return chosen_TE


class SequenceRows:
    """Which rows of a pass are whose. A chunk of a prompt is one row, as a generated token is."""

    def __init__(self, batch: Batch) -> None:
        self.sequences = [segment.sequence for segment in batch.segments]
        self.tokens_B = np.array([segment.num_tokens for segment in batch.segments])
        self._first_B = np.cumsum(self.tokens_B) - self.tokens_B

    def sum(self, rows_T: Rows) -> Rows:
        """Over each sequence's tokens: a new array."""
        return np.add.reduceat(rows_T, self._first_B, axis=0)

    def mean(self, rows_T: Rows) -> Rows:
        """Over each sequence's tokens."""
        means: Rows = self.sum(rows_T) / self.tokens_B.astype(np.float32)[:, None]
        return means


def merged(shares_BE: NDArray[np.floating], tokens_B: Sequence[int] | NDArray[Any]) -> Floats:
    """(E): that any of all tokens uses an expert, `1 - prod(1 - q)`, where each of so many tokens
    of a sequence does with its q. One token: q itself."""
    kept_BE = np.log1p(-np.clip(np.asarray(shares_BE, np.float64), 0.0, _MOST))
    return np.asarray(-np.expm1(np.asarray(tokens_B, np.float64) @ kept_BE))

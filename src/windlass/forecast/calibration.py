"""From how far an expert is from being chosen, and how often it was lately, to the probability that
it is, by what came of it. A source that knows nothing, or lies, ends at the base rate and passes no
threshold.

T tokens, E experts, k features of a forecast.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.interface import Floats

Numbers = NDArray[np.floating]

_LEFT = 0.5 ** (1.0 / 512.0)  # by token: what came counts half after 512
_PRIOR = 4.0  # how firmly the first guess is held, in observations
_HELD = 1.0  # so much of it for good
_LONGEST_STEP = 1.0
_LEAST = 1e-3  # of a rate of use


class Said(NamedTuple):
    """Probabilities of use, what they were computed of, and the mean distance."""

    features_kTE: Floats
    chances_TE: Floats
    distance: float


class Calibration:
    """Logistic regression of use on the margin and on the log odds of a rate of use; one step of
    Newton's after each token, older tokens counting less. Of a margin x, in units of the mean
    distance, x / (1 + |x|) counts: far from the threshold there are more errors than further
    distance would say (error on real routing 0.006 to 0.010, with x itself 0.015 to 0.022)."""

    def __init__(self, *, has_rates: bool) -> None:
        self._weights = np.array([-1.0, 4.0, *[0.5] * has_rates])  # of 1, margin, rate
        self._precision = np.eye(2 + has_rates) * _PRIOR
        self._floor = np.eye(2 + has_rates) * _HELD
        self._scale = 0.0
        self._num_tokens = 0.0

    def say(self, margin_TE: Numbers, rate_TE: Floats | None) -> Said:
        """Of tokens with these margins; `rate_TE`: where the calibration has rates."""
        size_TE = np.abs(margin_TE)
        distance = float(size_TE.sum()) / size_TE.size or 1.0
        scale = self._scale or distance
        features_kTE = np.empty((len(self._weights), *margin_TE.shape))
        features_kTE[0] = 1.0
        np.divide(margin_TE, size_TE + scale, out=features_kTE[1])
        if rate_TE is not None:
            rate_TE = np.minimum(np.maximum(rate_TE, _LEAST), 1.0 - _LEAST)
            np.log(rate_TE / (1.0 - rate_TE), out=features_kTE[2])
        odds_n = np.exp(self._weights @ features_kTE.reshape(len(self._weights), -1))
        chances_TE = (odds_n / (1.0 + odds_n)).reshape(margin_TE.shape)
        return Said(features_kTE, chances_TE, distance)

    def learn(self, said: Said, used_TE: NDArray[np.bool_]) -> None:
        """What became of tokens."""
        num = len(used_TE)
        left = _LEFT**num
        self._num_tokens = self._num_tokens * left + num
        scale = self._scale or said.distance
        self._scale = scale + (said.distance - scale) * num / self._num_tokens
        chances = said.chances_TE.ravel()
        x_kn = said.features_kTE.reshape(len(self._weights), -1)
        self._precision *= left
        self._precision += (x_kn * (chances - chances * chances)) @ x_kn.T
        self._step(self._precision + self._floor, x_kn @ (used_TE.ravel() - chances))

    def _step(self, precision: Floats, gradient: Floats) -> None:
        step = np.linalg.solve(precision, gradient)
        slope = float(self._weights[1])
        if slope + step[1] < 0.0:  # whoever is wrong by more than chance is not believed at all
            others = [i for i in range(len(gradient)) if i != 1]
            step[1] = -slope
            given = gradient[others] - precision[others, 1] * step[1]
            step[others] = np.linalg.solve(precision[np.ix_(others, others)], given)
        self._weights += np.minimum(np.maximum(step, -_LONGEST_STEP), _LONGEST_STEP)

"""From how far an expert is from being chosen, and how often it was lately, to the probability that
it is, by what came of it. A source that knows nothing, or lies, ends at the base rate and passes no
threshold.

T tokens, E experts.
"""

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.interface import Floats

_LEFT = 0.5 ** (1.0 / 512.0)  # by token: what came counts half after 512
_PRIOR = 4.0  # how firmly the first guess is held, in observations
_HELD = 1.0  # so much of it for good
_LONGEST_STEP = 1.0
_LEAST = 1e-3  # of a rate of use


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

    def chances(self, margin_TE: NDArray[np.floating], rate_TE: Floats | None) -> Floats:
        """Of use. `rate_TE`: where the calibration has rates."""
        weights = self._weights
        scale = self._scale or float(np.abs(margin_TE).mean()) or 1.0
        said_TE = weights[0] + weights[1] * _squashed(margin_TE / scale)
        if rate_TE is not None:
            said_TE += weights[2] * _log_odds(rate_TE)
        return 1.0 / (1.0 + np.exp(-np.clip(said_TE, -30.0, 30.0)))

    def learn(
        self, margin_TE: NDArray[np.floating], rate_TE: Floats | None, used_TE: NDArray[np.bool_]
    ) -> None:
        """What became of tokens with these margins and rates."""
        self._rescale(margin_TE)
        said_TE = self.chances(margin_TE, rate_TE)
        features = [np.ones(margin_TE.size), _squashed(margin_TE / self._scale).ravel()]
        if rate_TE is not None:
            features.append(_log_odds(rate_TE).ravel())
        x = np.stack(features)
        error, weight = (used_TE - said_TE).ravel(), (said_TE * (1.0 - said_TE)).ravel()
        self._precision *= _LEFT ** len(margin_TE)
        self._precision += (x * weight) @ x.T
        step = np.linalg.solve(self._precision + self._floor, x @ error)
        self._weights += np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)

    def _rescale(self, margin_TE: NDArray[np.floating]) -> None:
        """Follows the mean distance."""
        mean, num = float(np.abs(margin_TE).mean()) or 1.0, len(margin_TE)
        old = self._scale or mean
        self._num_tokens = self._num_tokens * _LEFT**num + num
        self._scale = old + (mean - old) * num / self._num_tokens


def _squashed(margin_TE: NDArray[np.floating]) -> NDArray[np.floating]:
    return margin_TE / (1.0 + np.abs(margin_TE))


def _log_odds(rate_TE: Floats) -> Floats:
    rate_TE = np.clip(rate_TE, _LEAST, 1.0 - _LEAST)
    return np.log(rate_TE / (1.0 - rate_TE))

"""Routers' own matrices, turned by what they were to foretell and what came: from hidden states now
to a router's logits later. Numbers only; which states, and when, is not known here.

T tokens (a few), D hidden, E experts of a layer.
"""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.calibration import Calibration, Said
from windlass.forecast.interface import ExpertTable, Floats
from windlass.forecast.selection import Singles, is_relative, margins
from windlass.models.spec import LayerNorm, Norm
from windlass.schedule.observer import RouterWeights

MOST_TOKENS = 16  # of a pass, that are foretold or learnt from
_BIAS_STEP = 0.05  # of a bias, in steps of a weight
# Multiplications of one call: OpenBLAS starts no thread for fewer. Its threads would spin on the
# cores that kernels compute on: 1.2 ms in place of 0.17 beside a busy core.
_BLAS_CALL = 1 << 18


class Source(Enum):
    """What states a forecast of a layer is made of; the nearest first."""

    ONE_BEFORE = 1  # those of the layer with experts before it
    TWO_BEFORE = 2
    THREE_BEFORE = 3
    START = 4  # the token's embedding, and what the token before it left in the last layer
    TOKEN_BEFORE = 5  # those of the same layer, of the token before

    @property
    def layers_before(self) -> int:
        """Of sources within a pass; else 0."""
        return self.value if self.value <= 3 else 0


# What fits is kept in this order.
BY_WORTH = (
    Source.ONE_BEFORE,
    Source.TOKEN_BEFORE,
    Source.TWO_BEFORE,
    Source.THREE_BEFORE,
    Source.START,
)
FIXED = (Source.ONE_BEFORE, Source.TWO_BEFORE, Source.THREE_BEFORE)  # what a router foretells as is

RATED = (Source.TOKEN_BEFORE,)


def targets(table: ExpertTable, source: Source) -> tuple[int, ...]:
    """Layers that `source` can foretell."""
    return table.layers[source.layers_before :]


def gate_bytes(table: ExpertTable, hidden: int, sources: Sequence[Source]) -> int:
    """Of the matrices, at `hidden` dimensions."""
    return sum(
        4 * table.num_experts[layer] * (hidden * (1 + (source is Source.START)) + 1)
        for source in sources
        for layer in targets(table, source)
    )


def normalised(norm: Norm, x_TD: Singles) -> Singles:
    """A copy as the norm gives it without weights."""
    x_TD = x_TD - x_TD.mean(-1, keepdims=True) if isinstance(norm, LayerNorm) else x_TD
    mean_T = np.einsum("td,td->t", x_TD, x_TD) / x_TD.shape[1]
    scaled: Singles = x_TD * (1.0 / np.sqrt(mean_T + norm.eps))[:, None]
    return scaled


class Foretold(NamedTuple):
    """Logits of a layer's router, which update of the matrix they are from, and what use of each
    expert follows from them."""

    logits_TE: Singles
    version: int
    said: Said


class Gate:
    """Foretells one layer from one source."""

    def __init__(
        self, router: RouterWeights, weight_DE: Singles, *, step: float, has_rates: bool
    ) -> None:
        """`weight_DE` is changed. `step`: share of an error that the next look at the same states
        no longer has; 0: nothing is learnt but how far to trust it. `has_rates`: whether what was
        used lately says more than the matrix knows."""
        self.routing = router.moe.routing
        self.has_rates = has_rates
        self._moe = router.moe
        self._select_bias_E = router.select_bias_E
        self._weight_DE = weight_DE
        self._bias_E: Singles = np.array(router.bias_E, np.float32)
        self._step = step
        self._is_relative = is_relative(router.moe.routing)
        self._version = 0
        self.calibration = Calibration(has_rates=has_rates)

    def foretell(self, x_TD: Singles, rate_TE: Floats | None = None) -> Foretold:
        """Of states, normalised. `rate_TE`: of use, where the gate has rates."""
        logits_TE = self._logits(x_TD)
        margin_TE = margins(self._moe, logits_TE, self._select_bias_E)
        return Foretold(logits_TE, self._version, self.calibration.say(margin_TE, rate_TE))

    def learn(
        self,
        x_TD: Singles,
        foretold: Foretold | None,
        logits_TE: Singles | None,
        used_TE: NDArray[np.bool_],
    ) -> None:
        """What came of states: the logits, where anything is learnt of them, and the choice.
        `foretold`: what was said of them, if anything."""
        if foretold is not None:
            self.calibration.learn(foretold.said, used_TE)
        if not self._step or logits_TE is None:
            return
        if foretold is not None and foretold.version == self._version:
            error_TE = logits_TE - foretold.logits_TE
        else:
            error_TE = logits_TE - self._logits(x_TD)
        if self._is_relative:
            error_TE -= error_TE.sum(-1, keepdims=True) / error_TE.shape[1]
        self._turn(x_TD, error_TE)
        self._version += 1

    def _logits(self, x_TD: Singles) -> Singles:
        return _product(x_TD, self._weight_DE) + self._bias_E

    def _turn(self, x_TD: Singles, error_TE: Singles) -> None:
        """One step of normalised least squares for all tokens together; stable however alike they
        are (affine projection, damped so that one token alone takes the plain step)."""
        size_T = np.einsum("td,td->t", x_TD, x_TD)
        if len(x_TD) == 1:
            part_TE = error_TE * (self._step / max(float(size_T[0]), 1e-6))
            mean_step_E = self._step * error_TE[0]
        else:
            alike_TT = _product(x_TD, x_TD.T)
            size = max(float(size_T.mean()), 1e-6)
            alike_TT[np.diag_indices(len(alike_TT))] += size * (1.0 / self._step - 1.0) + 1e-6
            part_TE = np.linalg.solve(alike_TT, error_TE)
            mean_step_E = size * part_TE.sum(0)
        _add_product(self._weight_DE, x_TD, part_TE)
        self._bias_E += _BIAS_STEP * mean_step_E


def make_gate(router: RouterWeights, source: Source, *, is_first: bool, step: float) -> Gate:
    """Begins as the router itself; from the token's start only the first layer's can, of the
    embedding. Without steps the router's matrix is shared, not copied."""
    weight_DE = router.weight_DE
    if source is Source.START:
        none_DE = np.zeros_like(weight_DE)
        weight_DE = np.concatenate((weight_DE if is_first else none_DE, none_DE))
    elif step:
        weight_DE = weight_DE.copy()
    return Gate(router, weight_DE, step=step, has_rates=source in RATED)


def _rows_of_a_call(num_tokens: int, num_experts: int) -> int:
    return max(1, _BLAS_CALL // (num_tokens * num_experts))


def _product(x_TD: Singles, weight_DE: Singles) -> Singles:
    if len(x_TD) == 1:
        product: Singles = np.einsum("td,de->te", x_TD, weight_DE)
        return product
    step = _rows_of_a_call(len(x_TD), weight_DE.shape[1])
    parts = range(0, len(weight_DE), step)
    total = np.zeros((len(x_TD), weight_DE.shape[1]), np.float32)
    for i in parts:
        total += x_TD[:, i : i + step] @ weight_DE[i : i + step]
    return total


def _add_product(weight_DE: Singles, x_TD: Singles, y_TE: Singles) -> None:
    step = _rows_of_a_call(max(8, len(x_TD)), weight_DE.shape[1])
    for i in range(0, len(weight_DE), step):
        x = x_TD[:, i : i + step].T
        weight_DE[i : i + step] += x * y_TE if len(x_TD) == 1 else x @ y_TE

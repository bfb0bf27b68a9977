"""How well a forecast foretells: recall and calibration by layer and horizon, over passes that are
given one after the other. What it put off is done between layers, as beside a slow link.

E experts of a layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.gate import Source, make_gate, normalised
from windlass.forecast.interface import ExpertForecast, Floats
from windlass.forecast.selection import margins
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens, RouterWeights

WIDTHS = (1.0, 1.5, 2.0, 3.0)  # experts read ahead, in those that are used
_BINS = 10
_MOST_LAYERS_AHEAD = 3
START = "start"  # of the pass
BEFORE = "before"  # the pass: in the one before it, once the same layer has routed
OWN = "own"  # the layer itself: the control


class Recall:
    """Of one layer at one horizon. Shares are None where nothing was counted."""

    def __init__(self) -> None:
        self._num = 0
        self._found_W = np.zeros(len(WIDTHS))
        self._num_whole = 0
        self._bins: NDArray[np.float64] = np.zeros((3, _BINS))  # chances, uses, how many

    def add(self, chance_E: Floats, used_E: NDArray[np.bool_]) -> None:
        """A forecast, and what came. Chances are probabilities where calibration is looked at."""
        needed = int(used_E.sum())
        found_E = used_E[np.argsort(-chance_E, kind="stable")].cumsum()
        places = [min(len(found_E), round(width * needed)) - 1 for width in WIDTHS]
        self._num += 1
        self._found_W += found_E[places] / needed
        self._num_whole += int(found_E[needed - 1]) == needed
        bins = np.minimum((chance_E * _BINS).astype(np.int64), _BINS - 1)
        for row, weights in zip(self._bins, (chance_E, used_E, None), strict=True):
            row += np.bincount(bins.clip(0), weights, _BINS)

    @property
    def num(self) -> int:
        """Forecasts counted."""
        return self._num

    @property
    def at_widths(self) -> tuple[float, ...]:
        """Share of needed experts among the most likely ones, by width (`WIDTHS`)."""
        return tuple((self._found_W / self._num).tolist())

    @property
    def whole(self) -> float:
        """Share of passes with all needed experts among as many."""
        return self._num_whole / self._num

    @property
    def calibration_error(self) -> float:
        """Mean distance between probabilities and what came, over ten bins of probability."""
        chances, uses, counts = self._bins
        return float(np.abs(chances - uses).sum() / counts.sum())


class RouterControl:
    """What routers say of their own states, by the weights that forecasts are given. Implements
    `RouterReader`."""

    def __init__(self) -> None:
        self._routers: dict[int, RouterWeights] = {}

    def set_router(self, router: RouterWeights) -> None:
        assert router.layer not in self._routers, f"the router of layer {router.layer}: read twice"
        self._routers[router.layer] = router

    def logits(self, tokens: RoutedTokens) -> Floats:
        """(T, E)"""
        router = self._routers[tokens.layer]
        x_TD = normalised(router.norm, np.asarray(tokens.residual_TD))
        gate = make_gate(router, Source.ONE_BEFORE, is_first=False, step=0.0)
        logits_TE: Floats = gate.foretell(x_TD).logits_TE.astype(np.float64)
        return logits_TE

    def chances(self, tokens: RoutedTokens) -> Floats:
        """Of one token (E): 1 of what is chosen by them, else 0."""
        router = self._routers[tokens.layer]
        found_TE = margins(router.moe, self.logits(tokens), router.select_bias_E)
        chosen_E: Floats = (found_TE[0] > 0).astype(np.float64)
        return chosen_E


class _Guess(NamedTuple):
    horizon: int | str
    chance_E: Floats


class RecallMeter:
    """Tells a forecast of passes, and counts what it foretold of the layers of those that `counts`
    says. Implements `RoutingObserver`."""

    def __init__(
        self,
        forecast: ExpertForecast,
        *,
        counts: Callable[[Batch], bool] = lambda batch: batch.num_tokens == 1,
        own: Callable[[RoutedTokens], Floats] | None = None,
    ) -> None:
        """`own`: what is known of a layer by its own states (`RouterControl.chances`): recall of
        `OWN` must be 1, or states, weights or the selection are not as they should be."""
        self.by_layer: dict[tuple[int | str, int], Recall] = {}
        self.wants_scores = forecast.wants_scores
        self.wants_states = forecast.wants_states
        self._forecast = forecast
        self._counts = counts
        self._own = own
        self._guesses: dict[int, list[_Guess]] = {}
        self._next: dict[int, list[_Guess]] = {}

    def begin(self, batch: Batch, embedded_TD: Any) -> None:
        self._guesses, self._next = self._next, {}
        self._forecast.begin(batch, embedded_TD)
        self._drain()
        for layer in self._forecast.outlook.table.layers:
            self._note(self._guesses, START, layer, self._forecast.outlook.now)

    def observe(self, tokens: RoutedTokens) -> None:
        layer, outlook = tokens.layer, self._forecast.outlook
        used_E = np.asarray(tokens.counts_E) > 0
        if self._counts(tokens.batch):
            guesses = self._guesses.pop(layer, [])
            if self._own is not None:
                guesses.append(_Guess(OWN, self._own(tokens)))
            for horizon, chance_E in guesses:
                self.by_layer.setdefault((horizon, layer), Recall()).add(chance_E, used_E)
        self._forecast.observe(tokens)
        self._drain()
        index = outlook.table.layers.index(layer)
        ahead = outlook.table.layers[index + 1 : index + 1 + _MOST_LAYERS_AHEAD]
        for horizon, at in enumerate(ahead, 1):
            self._note(self._guesses, horizon, at, outlook.now)
        self._note(self._next, BEFORE, layer, outlook.next)

    def end(self, final_TD: Any) -> None:
        self._forecast.end(final_TD)
        self._drain()

    def mean(self, horizon: int | str) -> dict[str, float]:
        """Over layers; empty where nothing was counted."""
        found = [one for (at, _), one in self.by_layer.items() if at == horizon]
        if not found:
            return {}
        names = [f"recall_{width:g}k" for width in WIDTHS]
        widths = np.mean([one.at_widths for one in found], axis=0).tolist()
        return {
            **dict(zip(names, widths, strict=True)),
            "whole": float(np.mean([one.whole for one in found])),
            "worst_calibration_error": max(one.calibration_error for one in found),
        }

    def _drain(self) -> None:
        while self._forecast.work():
            pass

    def _note(
        self, into: dict[int, list[_Guess]], horizon: int | str, layer: int, chances: Floats
    ) -> None:
        part = self._forecast.outlook.table.slice(layer)
        into.setdefault(layer, []).append(_Guess(horizon, chances[part].copy()))

"""How likely each expert is to be used, from what each sequence used lately: text is about one
thing for a while, and its experts with it.

S sequences of a pass, T its tokens, A experts of a token, H half lives, E experts of a layer.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.interface import CERTAIN, Candidates, ExpertTable, Floats, Outlook, likely
from windlass.forecast.usage import SharedUsage, of_tokens
from windlass.schedule.batch import Batch, Segment
from windlass.schedule.observer import RoutedTokens

HALF_LIVES = (8.0, 16.0, 64.0)  # tokens of a sequence; the shared usage, of 4096, stands beside
# Of a pass; of more, what all use is as good or better (hits of 12 layers of 64 experts, half of
# them resident, by sequence and by what all use: 8 rows 82.8 and 83.0 %, 16: 78.8 and 78.7, 32:
# 70.0 and 70.5, 64: 61.5 and 62.1), and costs nothing.
MOST_SEQUENCES = 16
_REMEMBERED = 64
_LEFT_H = 0.5 ** (1.0 / np.array(HALF_LIVES))
_LEAST = 1e-3  # of a probability: bounds what a token can cost whoever was sure
# Tokens after which a half life's log loss counts half, and what losses are times: larger follows
# the best half life more closely, to no gain (hits on real routing: 60.5 % of 0.1, 60.4 of 1).
_LOSS_LEFT = 0.5 ** (1.0 / 64.0)
_SHARPNESS = 0.1


class _Sequences(NamedTuple):
    """Those of a pass, and how its tokens change what is known of them."""

    slots_S: NDArray[np.int64]
    num_tokens_S: NDArray[np.int64]
    next_tokens_S: NDArray[np.int64]  # in the next pass
    of_T: NDArray[np.int64]
    gain_HT: Floats
    left_SH1: Floats
    are_single: bool  # one token of each


def usage_bytes(table: ExpertTable) -> int:
    """What `SequenceUsage` holds."""
    return 8 * len(table) * (_REMEMBERED * (len(HALF_LIVES) + 1) + 6)


class SequenceUsage:
    """Exponential averages of each sequence's uses over several half lives, each weighted by how
    well it foretold the layer's uses lately (log loss). Sequences begin with what all text uses,
    and are forgotten when many others have come since. Implements `ExpertForecast`."""

    wants_scores = False
    wants_states = False

    def __init__(self, table: ExpertTable) -> None:
        self._table = table
        self.outlook = Outlook(table)
        self._shared = SharedUsage(table)
        self._slots: dict[int, int] = {}  # by sequence, the one seen last at the end
        self._last = np.full(_REMEMBERED, -1)  # position, by slot
        self._rates = np.zeros((_REMEMBERED, len(HALF_LIVES), len(table)))
        self._chances = np.zeros((_REMEMBERED, len(table)))  # of one token
        self._losses = np.zeros((len(table.layers), len(HALF_LIVES) + 1))
        self._num_segments = self._num_tokens = 1
        self._pass: _Sequences | None = None  # None: too many, only what all text uses is known
        self._routed: dict[int, NDArray[np.int64]] = {}  # ids by layer, of a pass of single tokens
        self.threshold: float | None = 0.5
        self.speculates = True

    def seed(self, counts: Floats, num_tokens: float) -> None:
        """What earlier runs saw (`SharedUsage.seed`); before the first pass."""
        self._shared.seed(counts, num_tokens)

    def begin(self, batch: Batch, embedded_TD: Any = None) -> None:
        segments = batch.segments
        self._routed.clear()
        self._num_segments, self._num_tokens = len(segments), batch.num_tokens
        self._pass = self._sequences(segments) if len(segments) <= MOST_SEQUENCES else None
        every = slice(None)
        self.outlook.now[:] = self._merged(every, None)
        self.outlook.next[:] = self._merged(every, 0)
        self.outlook.usage[:] = self._merged(every, 1)
        self.outlook.version += 1

    def observe(self, tokens: RoutedTokens) -> None:
        layer, counts_E = tokens.layer, np.asarray(tokens.counts_E)
        part, outlook = self._table.slice(layer), self.outlook
        outlook.now[part] = counts_E > 0
        outlook.version += 1
        if tokens.ids_TA is None:
            self._pass = None
        if self._pass is None:
            self._shared.add(layer, counts_E)
        elif self._pass.are_single:
            # what follows waits for the end of the pass: all layers at once, in little more time
            self._routed[layer] = np.asarray(tokens.ids_TA).copy()
            return
        else:
            self._learn_prompts(layer, self._pass, np.asarray(tokens.ids_TA))
            self._shared.add(layer, counts_E)
        outlook.usage[part] = self._merged(part, 1)
        outlook.next[part] = self._merged(part, 0)

    def end(self, final_TD: Any = None) -> None:
        routed, layers = self._routed, self._table.layers
        if len(routed) == len(layers):
            self._learn_tokens(slice(0, len(layers)))
        else:
            for layer in routed:
                index = layers.index(layer)
                self._learn_tokens(slice(index, index + 1))
        routed.clear()

    def work(self) -> bool:
        return False

    def candidates(self, layer: int) -> Candidates:
        return likely(self.outlook, layer, at_least=self.threshold or 1.0)

    def chances(self, layer: int) -> Floats:
        """That the next token of each sequence of the pass uses each expert (S, E)."""
        part = self._table.slice(layer)
        if self._pass is None:
            return self._shared.shares[part][None].repeat(self._num_segments, 0)
        return self._chances[self._pass.slots_S, part]

    def _sequences(self, segments: tuple[Segment, ...]) -> _Sequences:
        slots_S = np.array([self._slot(segment) for segment in segments])
        num_S = np.array([segment.num_tokens for segment in segments])
        # what ends a prompt is followed by one token; guesses by as many
        next_S = np.array([1 if s.is_prompt and s.wants_logits else s.num_tokens for s in segments])
        of_T = np.arange(len(segments)).repeat(num_S)
        later_T = num_S.cumsum()[of_T] - 1 - np.arange(len(of_T))  # tokens behind each
        gain_HT = (1.0 - _LEFT_H)[:, None] * _LEFT_H[:, None] ** later_T
        left_SH1 = _LEFT_H[:, None] ** num_S[:, None, None]
        are_single = len(of_T) == len(segments)
        return _Sequences(slots_S, num_S, next_S, of_T, gain_HT, left_SH1, are_single)

    def _slot(self, segment: Segment) -> int:
        """Of the segment's sequence, which is new where it begins again."""
        known = self._slots.pop(segment.sequence, None)
        is_new = known is None or segment.is_prompt and segment.first_position <= self._last[known]
        if known is None:
            full = len(self._slots) == _REMEMBERED
            known = self._slots.pop(next(iter(self._slots))) if full else len(self._slots)
        self._slots[segment.sequence] = known
        if is_new:
            self._rates[known] = self._chances[known] = self._shared.shares
        self._last[known] = segment.first_position + segment.num_tokens - 1
        return known

    def _learn_tokens(self, layers: slice) -> None:
        """What one token of each sequence used in these layers with experts, one or all."""
        seen, table = self._pass, self._table
        assert seen is not None, "tokens of no pass"
        which = table.layers[layers]
        part = slice(table.slice(which[0]).start, table.slice(which[-1]).stop)
        slots_S = seen.slots_S
        used_SE = np.zeros((len(slots_S), part.stop - part.start))
        for layer in which:
            places_SA = self._routed[layer] + (table.first[layer] - part.start)
            used_SE[np.arange(len(slots_S))[:, None], places_SA] = 1.0
        rates_SHE = self._rates[slots_S, :, part]
        self._weigh(layers, part, rates_SHE, used_SE)
        rates_SHE += seen.gain_HT[:, :1] * (used_SE[:, None] - rates_SHE)
        self._keep(layers, part, slots_S, rates_SHE)
        self._shared.add_range(layers, part, used_SE.sum(0))

    def _learn_prompts(self, layer: int, seen: _Sequences, ids_TA: NDArray[np.int64]) -> None:
        """What several tokens of sequences used in a layer, in one step."""
        part, index = self._table.slice(layer), self._table.layers.index(layer)
        num, size = len(seen.slots_S), part.stop - part.start
        places = (seen.of_T[:, None] * size + ids_TA).ravel()
        rates_SHE = self._rates[seen.slots_S, :, part] * seen.left_SH1
        for i, gain_T in enumerate(seen.gain_HT):
            added = np.bincount(places, gain_T.repeat(ids_TA.shape[1]), num * size)
            rates_SHE[:, i] += added.reshape(num, size)
        self._keep(slice(index, index + 1), part, seen.slots_S, rates_SHE)

    def _weigh(self, layers: slice, part: slice, rates_SHE: Floats, used_SE: Floats) -> None:
        """Adds what this use cost each half life: nats of a token, on average over sequences."""
        shape = (len(rates_SHE), rates_SHE.shape[1] + 1, rates_SHE.shape[2])
        spared = np.empty(shape)  # the probability of what did not come
        spared[:, :-1], spared[:, -1] = rates_SHE, self._shared.shares[part]
        np.abs(spared - used_SE[:, None], out=spared)
        came = np.log(np.minimum(np.maximum(1.0 - spared, _LEAST), 1.0 - _LEAST)).mean(0)
        first = np.array([self._table.first[layer] for layer in self._table.layers[layers]])
        cost_LH = -np.add.reduceat(came, first - first[0], axis=1).T
        self._losses[layers] = self._losses[layers] * _LOSS_LEFT + cost_LH

    def _keep(
        self, layers: slice, part: slice, slots_S: NDArray[np.int64], rates_SHE: Floats
    ) -> None:
        """New averages, and what follows from them and the weights of half lives."""
        self._rates[slots_S, :, part] = rates_SHE
        losses = self._losses[layers]
        weights_LH = np.exp(_SHARPNESS * (losses.min(1, keepdims=True) - losses))
        weights_LH /= weights_LH.sum(1, keepdims=True)
        spread = [self._table.num_experts[layer] for layer in self._table.layers[layers]]
        weights_HE = weights_LH.repeat(spread, 0).T
        chances_SE = np.einsum("she,he->se", rates_SHE, weights_HE[:-1])
        self._chances[slots_S, part] = chances_SE + weights_HE[-1] * self._shared.shares[part]

    def _merged(self, part: slice, num_tokens: int | None) -> Floats:
        """That any token uses an expert, of a pass with so many tokens of each sequence; None: as
        in this pass; 0: as in the next."""
        seen = self._pass
        if seen is None:
            total = self._num_segments if num_tokens == 1 else self._num_tokens
            return of_tokens(self._shared.shares[part], total)
        chances_SE = self._chances[seen.slots_S, part]
        if num_tokens == 1:
            num_S = np.ones(1, np.int64)
        else:
            num_S = seen.num_tokens_S if num_tokens is None else seen.next_tokens_S
        if len(chances_SE) == 1 and num_S[0] == 1:
            merged = chances_SE[0]
        else:
            merged = 1.0 - ((1.0 - chances_SE) ** num_S[:, None]).prod(0)
        merged[merged > CERTAIN] = 1.0
        result: Floats = merged
        return result

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
MOST_SEQUENCES = 64  # of a pass; of more, their average is as good
_REMEMBERED = 2 * MOST_SEQUENCES
_LEFT_H = 0.5 ** (1.0 / np.array(HALF_LIVES))
_LEAST, _MOST = 1e-3, 1.0 - 1e-3  # what a token can cost whoever was sure
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
    goes_on_alone: bool  # each by one token


def usage_bytes(table: ExpertTable) -> int:
    """What `SequenceUsage` holds."""
    return 8 * len(table) * (_REMEMBERED * (len(HALF_LIVES) + 1) + 5)


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
        self._losses = np.zeros((len(table.num_experts), len(HALF_LIVES) + 1))
        self._num_segments = self._num_tokens = 1
        self._pass: _Sequences | None = None  # None: too many, only what all text uses is known
        self.threshold = 0.5  # probability of a use that is worth a read ahead

    def begin(self, batch: Batch, embedded_TD: Any = None) -> None:
        segments = batch.segments
        self._num_segments, self._num_tokens = len(segments), batch.num_tokens
        self._pass = self._sequences(segments) if len(segments) <= MOST_SEQUENCES else None
        every = slice(None)
        self.outlook.now[:] = self._merged(every, None)
        self.outlook.usage[:] = self._merged(every, 1)
        self.outlook.version += 1

    def observe(self, tokens: RoutedTokens) -> None:
        layer, counts_E = tokens.layer, np.asarray(tokens.counts_E)
        part = self._table.slice(layer)
        self._shared.add(layer, counts_E)
        if tokens.ids_TA is None:
            self._pass = None
        elif self._pass is not None:
            self._learn(layer, part, self._pass, np.asarray(tokens.ids_TA))
        outlook = self.outlook
        outlook.now[part] = counts_E > 0
        later = outlook.usage[part] = self._merged(part, 1)
        is_alike = self._pass is not None and self._pass.goes_on_alone
        outlook.next[part] = later if is_alike else self._merged(part, 0)
        outlook.version += 1

    def end(self, final_TD: Any = None) -> None:
        pass

    def work(self) -> bool:
        return False

    def candidates(self, layer: int) -> Candidates:
        return likely(self.outlook, layer, at_least=self.threshold)

    def chances(self, layer: int) -> Floats:
        """That the next token of each sequence of the pass uses each expert (S, E)."""
        part = self._table.slice(layer)
        if self._pass is None:
            return self._shared.shares[part][None].repeat(self._num_segments, 0)
        return self._chances[self._pass.slots_S, part]

    def _sequences(self, segments: tuple[Segment, ...]) -> _Sequences:
        slots_S = np.array([self._slot(segment) for segment in segments])
        num_S = np.array([segment.num_tokens for segment in segments])
        next_S = np.array([1 if s.wants_logits else s.num_tokens for s in segments])
        of_T = np.arange(len(segments)).repeat(num_S)
        later_T = num_S.cumsum()[of_T] - 1 - np.arange(len(of_T))  # tokens behind each
        gain_HT = (1.0 - _LEFT_H)[:, None] * _LEFT_H[:, None] ** later_T
        left_SH = _LEFT_H ** num_S[:, None]
        goes_on_alone = bool((next_S == 1).all())
        return _Sequences(
            slots_S, num_S, next_S, of_T, gain_HT, left_SH[:, :, None], goes_on_alone
        )

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

    def _learn(
        self, layer: int, part: slice, seen: _Sequences, ids_TA: NDArray[np.int64]
    ) -> None:
        num, size = len(seen.slots_S), part.stop - part.start
        places = (seen.of_T[:, None] * size + ids_TA).ravel()
        rates_SHE = self._rates[seen.slots_S, :, part]
        if len(seen.of_T) == num:  # one token of each
            used_SE = np.zeros(num * size)
            used_SE[places] = 1.0
            used_SE = used_SE.reshape(num, size)
            self._weigh(layer, rates_SHE, self._shared.shares[part], used_SE)
            added_SHE = seen.gain_HT[:, :1] * used_SE[:, None]
        else:
            added_SHE = np.stack(
                [
                    np.bincount(places, gain_T.repeat(ids_TA.shape[1]), num * size)
                    for gain_T in seen.gain_HT
                ]
            ).reshape(-1, num, size).swapaxes(0, 1)
        rates_SHE *= seen.left_SH1
        rates_SHE += added_SHE
        self._rates[seen.slots_S, :, part] = rates_SHE
        weights = np.exp(_SHARPNESS * (self._losses[layer].min() - self._losses[layer]))
        weights /= weights.sum()
        chances_SE = weights[:-1] @ rates_SHE
        chances_SE += weights[-1] * self._shared.shares[part]
        self._chances[seen.slots_S, part] = chances_SE

    def _weigh(self, layer: int, rates_SHE: Floats, shares_E: Floats, used_SE: Floats) -> None:
        """Adds what this use cost each half life: nats of a token, on average."""
        said = np.empty((len(rates_SHE), rates_SHE.shape[1] + 1, rates_SHE.shape[2]))
        said[:, :-1], said[:, -1] = rates_SHE, shares_E
        hit = np.abs(said - (1.0 - used_SE[:, None]))  # the probability of what came
        cost = -np.log(np.clip(hit, _LEAST, _MOST, out=hit))
        self._losses[layer] *= _LOSS_LEFT
        self._losses[layer] += cost.sum(-1).mean(0)

    def _merged(self, part: slice, num_tokens: int | None) -> Floats:
        """That any token uses an expert, of a pass with so many tokens of each sequence; None: as
        in this pass; 0: as in the next."""
        seen = self._pass
        if seen is None:
            total = self._num_segments if num_tokens == 1 else self._num_tokens
            return of_tokens(self._shared.shares[part], total)
        chances_SE = self._chances[seen.slots_S, part]
        if len(chances_SE) == 1 and num_tokens == 1:
            merged = chances_SE[0]
        else:
            num_S = seen.num_tokens_S if num_tokens is None else seen.next_tokens_S
            spared = 1.0 - chances_SE
            merged = 1.0 - (spared if num_tokens == 1 else spared ** num_S[:, None]).prod(0)
        merged[merged > CERTAIN] = 1.0
        return merged

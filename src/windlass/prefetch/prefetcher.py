"""Tells the weight cache what a pass will want next, as prefetch hints. Knows ids only.

With many tokens every expert is certain and the hints are simply the layers in order; with few they
are the experts that the forecast thinks worth a read. Nothing switches mode.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from windlass.forecast.interface import CERTAIN, ExpertForecast, Floats
from windlass.ids import Part, WeightKey
from windlass.prefetch.guard import WindowGuard
from windlass.schedule.batch import Batch
from windlass.schedule.expert_homes import host_experts
from windlass.schedule.passes import PassShape
from windlass.weights.cache import WeightCache
from windlass.weights.hints import Hint

# Hints kept ahead of the pass, and those of the layer that the last of them is in: more than the
# link can read during one layer. In the tier below further ahead: its link is the slower one.
_HORIZON, _HORIZON_BELOW = 64, 256
# Where the link has five times a pass's computation to move, a wrong read displaces a demanded one:
# only what is likelier than this is read ahead (by simulation, docs/forecast.md).
_FAR_BEHIND = 5 / 6  # of a pass is waiting
_SURE = 0.7
_SOME_DAY = 1 << 60  # a turn that never passes
_NEW_SHARE = 1 / 16  # of the average that a pass is


class Tier:
    """A tier that parts are hinted at in, and what is known of it."""

    def __init__(
        self, cache: WeightCache, keys: list[WeightKey], horizon: int, above: "Tier | None" = None
    ) -> None:
        self.cache = cache
        self.horizon = horizon
        self.hinted: dict[WeightKey, Hint] = {}
        self.is_complete = False  # everything has a slot for good and is there
        self.to_fill = np.zeros(0, np.int64)  # places of experts that may fill free slots
        self._held = cache.track(keys)
        self._above = above
        self.there = self._held if above is None else self._held.copy()  # of `keys`, here or above
        self._not_wanted: NDArray[np.bool_] | None = None

    def look(self) -> None:
        """What is there now."""
        besides = self._not_wanted if self._above is None else self._above._held
        if besides is not None:
            np.logical_or(self._held, besides, out=self.there)
            if self._above is not None and self._above._not_wanted is not None:
                theirs = self._above._not_wanted
                self.there[theirs] = self._held[theirs]

    def leave(self, keys: NDArray[np.bool_] | None) -> None:
        """From now on those of `keys` (a bitmap) count as there, whatever is said of them, and in
        the tier below as missing unless they are in that."""
        assert self._above is None, "only the tier that passes take weights from"
        self._not_wanted = keys
        self.there = self._held if keys is None else self._held.copy()

    def hint(self, now: int, wanted: dict[WeightKey, Hint]) -> None:
        """Tells the cache what is wanted, as far as it does not know."""
        old = self.hinted
        added = [hint for key, hint in wanted.items() if old.get(key) != hint]
        dropped = [key for key in old if key not in wanted]
        self.hinted = wanted
        self.cache.hint(now, added, dropped)
        self.is_complete = not wanted and self.cache.keeps_all and bool(self._held.all())


class Prefetcher:
    """Walks the parts in the order of use, from the current layer around the pass: what is certain
    to be used, then what the forecast proposes, by its value.

    A layer costs a few vector operations over all parts of the model, and Python only for hints
    that are new or no longer hold: 10 to 50 us at 48 layers of 128 experts
    (`bench/prefetcher.py`). A certain part's rank is its place among all uses since the first pass
    began.
    """

    def __init__(
        self,
        shape: PassShape,
        weights: WeightCache,
        forecast: ExpertForecast,
        *,
        usage: Floats | None = None,
        guard: WindowGuard | None = None,
        below: WeightCache | None = None,
    ) -> None:
        """`usage`: how often each expert was used in earlier runs: those used most fill slots that
        are free. `guard`: says whether what is not certain is hinted at; always without. `below`:
        the tier that parts come from; it is hinted at what neither has, further ahead."""
        self._weights = weights
        self._forecast = forecast
        self._table = table = forecast.outlook.table
        self._num_stops = len(shape.layers) + 1  # the layers, and the head
        stops = [list(_parts(shape, table.num_experts, i)) for i in range(self._num_stops)]
        self._keys = [key for stop in stops for key in stop]
        self._stop_of = [i for i, stop in enumerate(stops) for _ in stop]
        self._first = np.cumsum([0, *map(len, stops)])  # place of the first part of each stop
        is_expert = np.array([key.part is Part.EXPERT for key in self._keys])
        self._experts, self._others = np.flatnonzero(is_expert), np.flatnonzero(~is_expert)
        self._first_expert = [*table.first, len(table)]  # of each layer's, and the head's
        keys = [self._keys[i] for i in (*self._experts, *self._others)]
        self._tiers = [Tier(weights, keys, _HORIZON)]
        if below is not None:
            self._tiers.append(Tier(below, keys, _HORIZON_BELOW, self._tiers[0]))
        self._missing = np.empty(len(keys), bool)
        self._pass = -1
        self._layer = 0
        self._guard = guard
        self._at_host: NDArray[np.bool_] | None = None
        self._batch: Batch | None = None  # of the pass under way
        self._began = self._waited = 0.0
        self._waiting = 0.0  # share of decoding passes that waits for weights, lately
        self._threshold = forecast.threshold
        if usage is not None:
            used = usage.nonzero()[0]
            for tier in self._tiers:
                tier.to_fill = used[np.argsort(-usage[used], kind="stable")]

    def leave_to_host(self, share: float) -> None:
        """In passes of generated rows alone the tier below computes that share of the experts: they
        are wanted there."""
        self._at_host = np.zeros(len(self._keys), bool)
        flags = [
            is_so
            for layer, count in enumerate(self._table.num_experts)
            for is_so in host_experts(layer, count, share)
        ]
        self._at_host[: self._experts.size] = flags

    def words(self) -> str:
        """What the guard has found, for people."""
        return self._guard.words() if self._guard is not None else ""

    def begin(self, batch: Batch, now: float) -> None:
        """A pass over `batch` begins; seconds."""
        self._batch = batch
        if self._at_host is not None:
            has_prompts = any(one.is_prompt for one in batch.segments)
            self._tiers[0].leave(None if has_prompts else self._at_host)
        self._began, self._waited = now, self._weights.waited_s
        if self._guard is not None:
            self._forecast.speculates = self._guard.is_on

    def end(self, now: float) -> None:
        """The pass has ended. Passes that only decode, as many sequences, are
        compared."""
        batch = self._batch
        if batch is None or now <= self._began or any(one.is_prompt for one in batch.segments):
            return
        if self._guard is not None:
            has_guesses = batch.num_tokens > len(batch.segments)
            self._guard.add((len(batch.segments), has_guesses), now - self._began)
        share = (self._weights.waited_s - self._waited) / (now - self._began)
        self._waiting += _NEW_SHARE * (share - self._waiting)
        if self._threshold is not None:
            is_behind = self._waiting > _FAR_BEHIND
            self._forecast.threshold = max(self._threshold, _SURE if is_behind else 0.0)

    def enter(self, layer: int) -> None:
        """The pass enters `layer`; the head counts as one more layer. Layers come in order."""
        if all([tier.is_complete for tier in self._tiers]):
            return
        self._pass += layer == 0
        self._layer = layer
        self.update()

    def update(self) -> None:
        """The forecast has changed within a layer."""
        for tier in self._tiers:
            tier.look()
            # of hints at the same key the last one holds
            hints = (*self._warm(tier), *self._speculative(tier), *self._certain(tier))
            wanted = {hint.key: hint for hint in hints}
            tier.hint(self._pass * self._num_stops + self._layer, wanted)

    def fill(self) -> None:
        """Before the first pass: what earlier runs used most may be read."""
        if self._tiers[0].to_fill.size:
            self.update()

    def _warm(self, tier: Tier) -> list[Hint]:
        """The most used missing experts, as many as there are free slots: behind everything else,
        and at no time given up."""
        if not tier.to_fill.size:
            return []
        free = tier.cache.num_free(Part.EXPERT)
        if not free:
            tier.to_fill = tier.to_fill[:0]
            return []
        tier.to_fill = tier.to_fill[~tier.there[tier.to_fill]]
        most = free if self._pass < 0 else min(free, tier.horizon)
        places = tier.to_fill[:most].tolist()
        return [
            # doubles of this size are 256 apart
            Hint(2e18 + 1024 * i, self._table.keys[place], _SOME_DAY, is_certain=False)
            for i, place in enumerate(places)
        ]

    def _certain(self, tier: Tier) -> list[Hint]:
        """Parts that are missing and certain, in the order of their use, to the horizon."""
        many = self._experts.size
        missing, held, outlook = self._missing, tier.there, self._forecast.outlook
        first = self._first_expert[self._layer]
        np.greater_equal(outlook.next[:first], CERTAIN, out=missing[:first])
        np.greater_equal(outlook.now[first:], CERTAIN, out=missing[first:many])
        np.greater(missing[:many], held[:many], out=missing[:many])
        places = self._experts[missing[:many].nonzero()[0]]
        others = self._others[(~held[many:]).nonzero()[0]]
        if others.size:
            places = np.concatenate((places, others))
        if not places.size:
            return []
        length = len(self._keys)
        places[places < self._first[self._layer]] += length  # their turn comes in the next pass
        places.sort()
        if places.size > tier.horizon:
            last = int(places[tier.horizon - 1])
            end = self._first[self._stop_of[last % length] + 1] + last // length * length
            places = places[: places.searchsorted(end)]
        return [self._hint(rank) for rank in (places + self._pass * length).tolist()]

    def _hint(self, rank: int) -> Hint:
        which, place = divmod(rank, len(self._keys))
        return Hint(rank, self._keys[place], which * self._num_stops + self._stop_of[place])

    def _speculative(self, tier: Tier) -> list[Hint]:
        """What the forecast proposes and is missing, by its value, behind all that is certain."""
        if self._guard is not None and not self._guard.is_on:
            return []
        places, values = self._forecast.candidates(self._layer)
        missing = ~tier.there[places]
        places, values = places[missing], values[missing]
        if places.size > tier.horizon:
            best = np.argpartition(-values, tier.horizon)[: tier.horizon]
            places, values = places[best], values[best]
        # ranks of certain parts are counted from 0, so that these come last
        ranks = 1e18 * (1.0 - values / (1.0 + values))
        return [
            Hint(rank, key, self._turn(key.layer), is_certain=False)
            for rank, key in zip(
                ranks.tolist(), map(self._table.keys.__getitem__, places.tolist()), strict=True
            )
        ]

    def _turn(self, layer: int) -> int:
        which = self._pass + (layer < self._layer)
        return which * self._num_stops + layer


def _parts(shape: PassShape, num_experts: tuple[int, ...], layer: int) -> Iterator[WeightKey]:
    if layer == len(shape.layers):
        for chunk in range(shape.num_head_chunks):
            yield WeightKey(Part.HEAD, -1, chunk)
        return
    yield WeightKey(Part.BLOCK, layer)
    if shape.layers[layer].network == "dense":
        yield WeightKey(Part.FFN, layer)
    for expert in range(num_experts[layer]):
        yield WeightKey(Part.EXPERT, layer, expert)

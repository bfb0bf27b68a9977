"""What is resident, what callers wait for, and what is read next: all decisions about weights, and
no weights. The store that moves bytes and the clock that only counts them share it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from windlass.ids import Part, WeightKey
from windlass.weights.demand import Demand
from windlass.weights.eviction import EvictionPolicy
from windlass.weights.feed import Feed
from windlass.weights.hints import Hint
from windlass.weights.io_queue import IoQueue
from windlass.weights.residency import Below, Entry, Mover, Residency, nearest_first
from windlass.weights.slots import Slots
from windlass.weights.stats import PartPlaces, StoreStats


class _Asked:
    """Parts by kind that were demanded, those that were here, and of the others those that were in
    the tier below."""

    def __init__(self) -> None:
        self.requests, self.hits, self.hits_below = (
            Counter[Part](),
            Counter[Part](),
            Counter[Part](),
        )

    def note(self, key: WeightKey, entry: Entry | None, below: Below | None) -> None:
        """`key`, which has `entry` here, is demanded."""
        self.requests[key.part] += 1
        if entry is not None and entry.ticket is None:
            self.hits[key.part] += 1
        elif below is not None and below.has(key):
            self.hits_below[key.part] += 1


class WeightCache:
    """Reads go on by themselves as others arrive, so that the link stays busy while the caller
    computes: first what is demanded, then the hints, in order (`feed.py`). One thread calls; all
    methods take the queue's lock, which may be held."""

    def __init__(
        self,
        num_keys: Mapping[Part, int],
        slots: Mapping[Part, Slots],
        queue: IoQueue[Any],
        mover: Mover,
        *,
        policy: EvictionPolicy,
        one_by_one: bool = False,
    ) -> None:
        """`num_keys`: parts of each kind; `slots`: of the kinds that have any. `one_by_one`: no
        two experts are to be leased at once."""
        self._resident = Residency(num_keys, slots, mover, policy=policy)
        self.feed = Feed(self._resident, queue, mover)
        self._queue = queue
        queue.listen(self.feed)
        self._changed = queue.changed
        self._mover = mover
        num_experts = num_keys.get(Part.EXPERT, 0)
        if not self._resident.fits(Part.EXPERT):
            num_experts = max(1, self._resident.num_slots(Part.EXPERT) // 4)
        # experts to lease at once: a quarter of the slots, so that the link has others to fill
        self.group_size = 1 if one_by_one else num_experts
        self._asked = _Asked()
        self._wait_s = 0.0

    # --- state ------------------------------------------------------------------------------------

    def fits(self, part: Part) -> bool:
        """Whether all parts of this kind have slots: then they stay resident once read."""
        return self._resident.fits(part)

    @property
    def keeps_all(self) -> bool:
        """Whether all kinds of parts have slots for all their keys (the embedding aside)."""
        return self._resident.fits_all

    def holds(self, key: WeightKey) -> bool:
        """Whether `key` is resident or under way. A hint: it may change at any moment."""
        return key in self._resident.entries

    def num_slots(self, part: Part) -> int:
        """Of this kind."""
        return self._resident.num_slots(part)

    def num_free(self, part: Part) -> int:
        """Slots of this kind that nothing has. A hint: it may change at any moment."""
        return self._resident.num_free(part)

    @property
    def waited_s(self) -> float:
        """Seconds that callers have waited."""
        return self._wait_s

    def stats(self) -> StoreStats:
        with self._changed:
            return StoreStats(
                bytes_read=self._queue.bytes_read,
                reads=self._queue.num_reads,
                link_bytes=self._queue.link_bytes,
                requests=dict(self._asked.requests),
                hits=dict(self._asked.hits),
                hits_below=None if self._mover.below is None else dict(self._asked.hits_below),
                wait_s=self._wait_s,
                **self.feed.counters(),
                evictions=self._resident.evictions,
            )

    def look(self, part: Part) -> tuple[dict[Part, int], PartPlaces]:
        """Slots that are taken by kind, and where parts of one kind are."""
        with self._changed:
            return self._resident.num_held(), self._resident.places(part)

    def track(self, keys: Sequence[WeightKey]) -> NDArray[np.bool_]:
        """A live bitmap of `keys`: true where one is resident or loading."""
        with self._changed:
            return self._resident.track(keys)

    def hint(self, now: int, added: Sequence[Hint], dropped: Sequence[WeightKey]) -> None:
        """See `Feed.hint`. Hints are followed by rank when the link has nothing more urgent, into
        slots that are free or hold something needed later."""
        with self._changed:
            self.feed.hint(now, added, dropped)

    def check(self) -> None:
        """Slots, entries, leases, demands, the queue and the policy agree."""
        with self._changed:
            self._queue.check()
            self._resident.check()
            self.feed.check()

    def pinned(self, keys: Sequence[WeightKey]) -> list[Entry] | None:
        """Of `keys`, if all are in memory for good: no part of their kinds is ever evicted."""
        with self._changed:
            return self._resident.pinned(keys)

    def use_pinned(self, key: WeightKey) -> None:
        """`key`, there for good, is used without a lease."""
        with self._changed:
            self.count_hits(key.part, 1)
            self._resident.note_use(key)

    def count_hits(self, part: Part, count: int) -> None:
        """Parts that were used without a lease, because they are there for good."""
        with self._changed:
            self._asked.requests[part] += count
            self._asked.hits[part] += count

    # --- one caller's demands ---------------------------------------------------------------------

    def take_resident(self, key: WeightKey, *, to_copy: bool = False) -> Entry | None:
        """`key`, leased, if it is there; `to_copy`: to another tier, which is no use of it."""
        with self._changed:
            entry = self._resident.entries.get(key)
            if entry is None or entry.ticket is not None:
                return None
            self._queue.raise_error()
            self.count_hits(key.part, 1)
            self._resident.set_busy(entry)
            return self._take(entry, to_copy=to_copy)

    def begin(self, keys: Iterable[WeightKey], *, settles: bool = True) -> Demand:
        """Demands `keys` (distinct, and where it `settles`, of experts, all that their layer needs
        in this turn); reading begins at once, as far as slots and link allow."""
        with self._changed:
            demand, keys = Demand(), tuple(keys)
            self.feed.settle(keys if settles else ())
            for key in nearest_first(keys, self._mover.below):
                entry = self._resident.entries.get(key)
                self._asked.note(key, entry, self._mover.below)
                if entry is None:
                    demand.waiting.append(key)
                else:
                    self.feed.watch(entry, demand)
            self.feed.demands.append(demand)
            self.feed.pump()
            return demand

    def next(self, demand: Demand) -> Entry | None:
        """The next part of `demand`, leased, waiting for it; None when the demand is over."""
        return next(iter(self.group(demand, 1)), None)

    def group(self, demand: Demand, limit: int) -> list[Entry]:
        """What `demand` need not wait for, at most `limit`, and at least one, waiting for it;
        leased. Empty when the demand is over."""
        with self._changed:
            while True:
                self._queue.raise_error()
                if demand.ready:
                    return self.ready(demand, limit)
                if demand.is_over:
                    self.abandon(demand)
                    return []
                if demand.waiting:
                    self.feed.pump()
                    if demand.ready or (not demand.under_way and self.feed.unblock(demand)):
                        continue
                begin = self._mover.now()
                self._changed.wait()
                self._wait_s += self._mover.now() - begin

    def ready(self, demand: Demand, limit: int, *, to_copy: bool = False) -> list[Entry]:
        """What `demand` need not wait for, at most `limit`, leased; `to_copy` as above."""
        with self._changed:
            entries: list[Entry] = []
            while demand.ready and len(entries) < limit:
                entry = self._resident.entries[demand.ready.popleft()]
                entry.demands.remove(demand)
                entries.append(self._take(entry, to_copy=to_copy))
            return entries

    def release(self, entries: Sequence[Entry]) -> None:
        """Gives one lease of each back."""
        with self._changed:
            is_any_idle = False
            for entry in entries:
                entry.leases -= 1
                if not entry.leases and not entry.demands and entry.ticket is None:
                    self._resident.set_idle(entry)
                    is_any_idle = True
            if is_any_idle:
                self.feed.pump()
                self._changed.notify_all()

    def abandon(self, demand: Demand) -> None:
        """Ends `demand`; what it has not taken may be evicted, what has not begun is not read.
        Idempotent."""
        with self._changed:
            self.feed.abandon(demand)

    def _take(self, entry: Entry, *, to_copy: bool) -> Entry:
        self._resident.note_use(entry.key, is_copied=to_copy)
        entry.leases += 1
        self.feed.take(entry)
        return entry

"""Weights on demand: leases of resident parts, over bytes in slots. Knows keys and slots; not what
weights are for, nor which of them matter (the policy and the hints say that)."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import NamedTuple, Self

import torch

from windlass.checkpoint.layout import ITEM_BYTES
from windlass.checkpoint.part_reads import PartReads, Placement
from windlass.checkpoint.views import make_views
from windlass.device.base import Copy, DeviceMemory
from windlass.ids import Part, Route, WeightKey
from windlass.tensors import StoredTensors, Tensors
from windlass.weights.cache import WeightCache
from windlass.weights.demand import Demand
from windlass.weights.eviction import EvictionPolicy
from windlass.weights.io_queue import Priority, Ticket
from windlass.weights.residency import Entry, num_slots
from windlass.weights.slots import Arena
from windlass.weights.stats import PartPlaces, StoreStats
from windlass.weights.supply import Rows, Supply

_NONE: Tensors = {}
_LARGEST_ITEM = max(ITEM_BYTES.values())


@dataclass(slots=True)
class _Geometry:
    """Of parts whose tensors lie alike: those of one of them, and where they begin in the arena.
    Nobody reads them; those of the others are made of them."""

    tensors: StoredTensors | None = None
    begin: int = 0


class _Known(NamedTuple):
    """What a part is, wherever it lies."""

    part_reads: PartReads
    geometry: _Geometry


@dataclass(slots=True)
class _Content:
    """What lies in an entry's slot."""

    known: _Known
    tensors: StoredTensors | None = None  # made at the first lease


class WeightStore:
    """Leases parts of a checkpoint, brought into `slots` equal slots per kind of part.

    What is kept and what is brought next is decided by `cache`. One thread calls; completions come
    from devices' threads. The caller owns the files and devices of `supply` and closes them after
    the store. A kind of part needs at least one slot, except the embedding: without, its rows are
    read singly.
    """

    def __init__(
        self, supply: Supply, slots: Mapping[Part, int], *, policy: EvictionPolicy
    ) -> None:
        self.supply = supply
        self.below = None if supply.below is None else supply.below.feed
        num_keys = Counter(key.part for key in supply.layout.parts)
        sizes = supply.slot_bytes
        given = num_slots({part: num_keys[part] for part in sizes}, slots)
        self._arenas = {
            part: Arena(supply.device.allocate(sizes[part] * count), sizes[part], count)
            for part, count in given.items()
        }
        self._queue = supply.queue
        self._changed = self._queue.changed
        self._streams = streams = supply.device.streams
        self._compute = streams.compute
        self.cache = WeightCache(
            num_keys,
            self._arenas,
            self._queue,
            self,
            policy=policy,
            one_by_one=supply.one_by_one,
        )
        embeddings = supply.layout.keys(Part.EMBED) if Part.EMBED not in given else ()
        self._rows: dict[WeightKey, Rows] = {key: supply.rows(key) for key in embeddings}
        self._known: dict[WeightKey, _Known] = {}
        self._geometries: dict[tuple[Part, tuple[Placement, ...]], _Geometry] = {}
        self._seen: set[WeightKey] = set()  # parts whose tensors were made, and checked, before
        self._dropped: deque[tuple[Demand, list[Lease]]] = deque()
        self._rows_wait_s = 0.0

    # --- what callers use -------------------------------------------------------------------------

    def pinned(self, keys: Sequence[WeightKey]) -> list[StoredTensors] | None:
        """Tensors of `keys`, valid as long as the store, if all are in memory for good (their kinds
        have slots for all) and views of their slots."""
        with self._changed:
            entries = self.cache.pinned(keys)
            if entries is None:
                return None
            tensors = [self._tensors_of(entry) for entry in entries]
            has_copies = any(entry.content.tensors is None for entry in entries)
            return None if has_copies else tensors

    def lease(self, key: WeightKey) -> "Lease":
        """Waits until `key` is resident. Raises CheckpointError if it cannot be read, BudgetError
        if all slots of its kind are leased."""
        with self._changed:
            entry = self.cache.take_resident(key)
            if entry is not None:
                return self._lease(entry)
            self._tidy()
            demand = self.cache.begin((key,))
            try:
                lease = self._next(demand)
            finally:
                self.cache.abandon(demand)
            assert lease is not None, f"{key} did not arrive"
            return lease

    def arrivals(self, keys: Iterable[WeightKey], *, settles: bool = True) -> "Arrivals":
        """Leases of all `keys` (distinct): resident ones first, then as they arrive. Reading begins
        at once, for as many as slots and link allow; works with a single slot. `settles`: as
        `WeightCache.begin` has it."""
        with self._changed:
            self._tidy()
            return Arrivals(self, self.cache.begin(keys, settles=settles))

    def read_rows(self, key: WeightKey, rows: Sequence[int]) -> torch.Tensor:
        """Rows of the (V, D) `weight` of `key`, an embedding without slots -> (len(rows), D)."""
        begin = time.perf_counter()
        result = self._rows[key].read(rows)
        self._rows_wait_s += time.perf_counter() - begin
        return result

    def stats(self) -> StoreStats:
        stats = self.cache.stats()
        return replace(stats, wait_s=stats.wait_s + self._rows_wait_s)

    def look(self, part: Part) -> dict[str, tuple[dict[Part, int], PartPlaces]]:
        """Slots that are taken, and where parts of one kind are, by the memory; this one's first.
        On any thread."""
        found = {self.route.destination: self.cache.look(part)}
        below = self.supply.below
        return found if below is None else {**found, self.route.source: below.look(part)}

    def check(self) -> None:
        """Slots, entries, leases, demands, the queue and the policy agree."""
        with self._changed:
            self._tidy()
            self.cache.check()
            self.supply.check()

    def close(self) -> None:
        """Waits for the blocks in flight, in all tiers, and starts no more. Idempotent."""
        self._queue.close()

    # --- what leases and arrivals use -------------------------------------------------------------

    def _next(self, demand: Demand) -> "Lease | None":
        """The next part of `demand`, waiting for it; None when it is over."""
        with self._changed:
            if self._dropped:
                self._tidy()
            entry = self.cache.next(demand)
            return None if entry is None else self._lease(entry)

    def _ready(self, demand: Demand, limit: int) -> "list[Lease]":
        """Leases of what `demand` need not wait for, at most `limit`."""
        return [self._lease(entry) for entry in self.cache.ready(demand, limit)]

    def _lease(self, entry: Entry) -> "Lease":
        tensors: StoredTensors | None = entry.content.tensors
        return Lease(self, entry, self._tensors_of(entry) if tensors is None else tensors)

    def _tensors_of(self, entry: Entry) -> StoredTensors:
        content: _Content = entry.content
        if content.tensors is not None:
            return content.tensors
        part_reads, alike = content.known
        memory = self.memory_of(entry)
        moved_by = memory.begin + part_reads.begin - alike.begin
        if entry.key in self._seen and alike.tensors is not None and not moved_by % _LARGEST_ITEM:
            content.tensors = alike.tensors.moved(moved_by)
            return content.tensors
        is_known = entry.key in self._seen
        views = make_views(part_reads, memory.data, is_known=is_known, streams=self._streams)
        self._seen.add(entry.key)
        if not views.has_copies:  # copies are outside the budget's slots: they end with the lease
            content.tensors = views.tensors
            if alike.tensors is None:
                alike.tensors, alike.begin = views.tensors.moved(0), memory.begin + part_reads.begin
        return views.tensors

    def fetch(
        self, entry: Entry, *, priority: Priority, on_done: Callable[[], None]
    ) -> Ticket[Copy]:
        known = self._known.get(entry.key) or self._learn(entry.key)
        entry.content = _Content(known)
        into = self.memory_of(entry)
        return self.supply.fetch(entry.key, into, priority=priority, on_done=on_done)

    def _release(self, entries: Sequence[Entry]) -> None:
        """Gives one lease of each back. What reads them has been asked for, and need not have
        ended: copies into their slots wait for it."""
        end = self._compute.record()
        for entry in entries:
            self.memory_of(entry).last_use = end
        self.cache.release(entries)

    def _learn(self, key: WeightKey) -> _Known:
        part_reads = self.supply.part_reads(key)
        geometry = self._geometries.setdefault((key.part, part_reads.placements), _Geometry())
        known = self._known[key] = _Known(part_reads, geometry)
        return known

    @property
    def route(self) -> Route:
        """The way by which parts come into the slots."""
        return self.supply.route

    def now(self) -> float:
        """Seconds, for the time that callers wait."""
        return time.perf_counter()

    def memory_of(self, entry: Entry) -> DeviceMemory:
        """The slot of `entry`."""
        return self._arenas[entry.key.part].memory_of(entry.slot)

    def _tidy(self) -> None:
        while self._dropped:
            demand, leases = self._dropped.popleft()
            for lease in leases:
                lease.release()
            self.cache.abandon(demand)


class Lease:
    """The right to read one resident part until `release`. A context manager."""

    __slots__ = ("key", "_store", "_entry", "_tensors")

    def __init__(self, store: "WeightStore", entry: Entry, tensors: Tensors) -> None:
        self.key = entry.key
        self._store = store
        self._entry: Entry | None = entry
        self._tensors = tensors

    @property
    def tensors(self) -> Tensors:
        """Canonical tensors by name, in their stored type or packed, over the slot's memory."""
        assert self._entry is not None, f"{self.key} is read after its lease was released"
        return self._tensors

    def release(self) -> None:
        """Lets the part be evicted. Idempotent."""
        entry = self._end()
        if entry is not None:
            self._store._release((entry,))

    def _end(self) -> Entry | None:
        """What is to be released, once."""
        entry, self._entry = self._entry, None
        self._tensors = _NONE
        return entry

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Arrivals:
    """Iterator of leases in the order in which their parts become resident. The lease given out is
    released when the next is asked for; `close`, or dropping the iterator, gives up the rest.
    `ready` takes more at once."""

    def __init__(self, store: "WeightStore", demand: Demand) -> None:
        self._store = store
        self._demand = demand
        self._leases: list[Lease] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> "Lease":
        self.release()
        lease = self._store._next(self._demand)
        if lease is None:
            raise StopIteration
        self._leases.append(lease)
        return lease

    def ready(self, limit: int) -> "list[Lease]":
        """Up to `limit` further leases, of parts that need no waiting; released with the one that
        `next` gave."""
        more = self._store._ready(self._demand, limit)
        self._leases += more
        return more

    def group(self, limit: int) -> "list[Lease]":
        """Leases of all parts that need no waiting, at most `limit`, and at least of one, waiting
        for it; the last group is released. Empty when no part is left."""
        store = self._store
        with store._changed:
            self.release()
            if store._dropped:
                store._tidy()
            self._leases = [store._lease(one) for one in store.cache.group(self._demand, limit)]
        return self._leases

    def all(self) -> "list[Lease]":
        """Leases of all that are left, waiting for them: each keeps its slot, so there must be
        enough. Released with the next call of `next` or `close`."""
        while (lease := self._store._next(self._demand)) is not None:
            self._leases.append(lease)
        return list(self._leases)

    @property
    def must_wait(self) -> bool:
        """Whether parts are still to come, and none is there."""
        return not self._demand.ready and not self._demand.is_over

    @property
    def has_ready(self) -> bool:
        """Whether the next part needs no waiting. It may change at any moment, for the better."""
        return bool(self._demand.ready)

    def release(self) -> None:
        """Releases the current leases."""
        if not self._leases:
            return
        entries = []
        for lease in self._leases:
            entry, lease._entry, lease._tensors = lease._entry, None, _NONE
            if entry is not None:
                entries.append(entry)
        self._leases = []
        self._store._release(entries)

    def close(self) -> None:
        """Releases the current leases and demands the rest no more. Idempotent."""
        with self._store._changed:
            self.release()
            self._store.cache.abandon(self._demand)

    def __del__(self) -> None:
        # The collector may run inside the store itself, so the store cleans up when it next can.
        self._store._dropped.append((self._demand, self._leases))

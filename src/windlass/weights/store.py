"""Weights on demand: leases of resident parts, over bytes in slots. Knows keys and slots; not what
weights are for, nor which of them matter (the policy and the hints say that)."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch

from windlass.checkpoint.part_reads import PartReads, make_part_reads, slot_bytes
from windlass.checkpoint.reader import WeightSource
from windlass.checkpoint.views import copied_bytes, make_views
from windlass.device.base import Copy, DeviceMemory
from windlass.ids import DISK, Part, Route, WeightKey
from windlass.models.names import Layout
from windlass.tensors import StoredTensors, Tensors
from windlass.trace import Tracer
from windlass.weights.cache import WeightCache
from windlass.weights.demand import Demand
from windlass.weights.eviction import EvictionPolicy
from windlass.weights.io_queue import Priority, Ticket
from windlass.weights.residency import Entry, num_slots
from windlass.weights.row_reader import RowReader
from windlass.weights.slots import Arena
from windlass.weights.stats import StoreStats
from windlass.weights.transfer import Carrier, TransferQueue, file_copies


@dataclass(slots=True)
class _Content:
    """What lies in an entry's slot."""

    part_reads: PartReads
    tensors: StoredTensors | None = None  # made at the first lease


class WeightStore:
    """Leases parts of a checkpoint, read into `slots` equal slots per kind of part.

    What is kept and what is read next is decided by `cache`. One thread calls; completions come
    from the device's threads. The caller owns `source` and `device` and closes them after the
    store. A kind of part needs at least one slot, except the embedding: without, its rows are read
    singly.
    """

    def __init__(
        self,
        layout: Layout,
        source: WeightSource,
        disk: Carrier,
        slots: Mapping[Part, int],
        *,
        policy: EvictionPolicy,
        tracer: Tracer | None = None,
    ) -> None:
        """`disk`: who carries parts from disk into memory of its device."""
        device = disk.device
        self._layout = layout
        self._source = source
        num_keys = Counter(key.part for key in layout.parts)
        sizes = slot_bytes(layout, source.tensors)
        given = num_slots({part: num_keys[part] for part in sizes}, slots)
        self._arenas = {
            part: Arena(device.allocate(sizes[part] * count), sizes[part], count)
            for part, count in given.items()
        }
        carriers = {Route(DISK, device.name): disk}
        self._queue = TransferQueue(carriers, tracer=tracer)
        self._changed = self._queue.changed
        self.cache = WeightCache(
            num_keys,
            self._arenas,
            self._queue,
            self,
            policy=policy,
            # copies are outside the slots, and planned for one part
            one_by_one=bool(copied_bytes(layout, source.tensors)),
        )
        self._rows: dict[WeightKey, RowReader] = {}
        if Part.EMBED not in given:
            for key in layout.keys(Part.EMBED):
                (piece,) = layout.parts[key]
                info = source.tensors[piece.tensor]
                assert not piece.ops and piece.shape == info.shape, f"{key}: rows of {piece}"
                self._rows[key] = RowReader(info, source, self._queue, device)
        self._known: set[WeightKey] = set()  # that were in a slot before
        self._dropped: deque[tuple[Demand, list[Lease]]] = deque()
        self._rows_wait_s = 0.0

    # --- what callers use -------------------------------------------------------------------------

    def pinned(self, keys: Iterable[WeightKey]) -> list[StoredTensors] | None:
        """Tensors of `keys`, valid as long as the store, if all are in memory for good and views of
        their slots."""
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

    def arrivals(self, keys: Iterable[WeightKey]) -> "Arrivals":
        """Leases of all `keys` (distinct): resident ones first, then as they arrive. Reading begins
        at once, for as many as slots and link allow; works with a single slot."""
        with self._changed:
            self._tidy()
            return Arrivals(self, self.cache.begin(keys))

    def read_rows(self, key: WeightKey, rows: Sequence[int]) -> torch.Tensor:
        """Rows of the (V, D) `weight` of `key`, an embedding without slots -> (len(rows), D)."""
        begin = time.perf_counter()
        result = self._rows[key].read(rows)
        self._rows_wait_s += time.perf_counter() - begin
        return result

    def stats(self) -> StoreStats:
        stats = self.cache.stats()
        return replace(stats, wait_s=stats.wait_s + self._rows_wait_s)

    def check(self) -> None:
        """Slots, entries, leases, demands, the queue and the policy agree."""
        with self._changed:
            self._tidy()
            self.cache.check()

    def close(self) -> None:
        """Waits for the blocks in flight and starts no more. Idempotent."""
        self._queue.close()

    # --- what leases and arrivals use -------------------------------------------------------------

    def _next(self, demand: Demand) -> "Lease | None":
        """The next part of `demand`, waiting for it; None when it is over."""
        with self._changed:
            self._tidy()
            entry = self.cache.next(demand)
            return None if entry is None else self._lease(entry)

    def _ready(self, demand: Demand, limit: int) -> "list[Lease]":
        """Leases of what `demand` need not wait for, at most `limit`."""
        with self._changed:
            return [self._lease(entry) for entry in self.cache.ready(demand, limit)]

    def _lease(self, entry: Entry) -> "Lease":
        return Lease(self, entry, self._tensors_of(entry))

    def _tensors_of(self, entry: Entry) -> StoredTensors:
        content: _Content = entry.content
        if content.tensors is not None:
            return content.tensors
        memory = self._memory_of(entry).data
        is_known = entry.key in self._known
        tensors, has_copies = make_views(content.part_reads, memory, is_known=is_known)
        self._known.add(entry.key)
        if not has_copies:  # copies are outside the budget's slots: they end with the lease
            content.tensors = tensors
        return tensors

    def fetch(
        self, entry: Entry, *, priority: Priority, on_done: Callable[[], None]
    ) -> Ticket[Copy]:
        part_reads = make_part_reads(entry.key, self._layout, self._source.tensors)
        entry.content = _Content(part_reads)
        into = self._memory_of(entry)
        copies = file_copies(self._source, part_reads.reads, into, str(entry.key))
        return self._queue.submit(copies, priority=priority, on_done=on_done)

    def now(self) -> float:
        """Seconds, for the time that callers wait."""
        return time.perf_counter()

    def _memory_of(self, entry: Entry) -> DeviceMemory:
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
            self._store.cache.release((entry,))

    def _end(self) -> Entry | None:
        """What is to be released, once."""
        entry, self._entry = self._entry, None
        self._tensors = {}
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
        self._release()
        lease = self._store._next(self._demand)
        if lease is None:
            raise StopIteration
        self._leases.append(lease)
        return lease

    def next_ready(self, limit: int) -> "list[Lease]":
        """Up to `limit` leases of parts that need no waiting, perhaps none; what was leased before
        is released."""
        self._release()
        return self.ready(limit)

    def ready(self, limit: int) -> "list[Lease]":
        """Up to `limit` further leases, of parts that need no waiting; released with the one that
        `next` gave."""
        more = self._store._ready(self._demand, limit)
        self._leases += more
        return more

    def all(self) -> "list[Lease]":
        """Leases of all that are left, waiting for them: each keeps its slot, so there must be
        enough. Released with the next call of `next` or `close`."""
        while (lease := self._store._next(self._demand)) is not None:
            self._leases.append(lease)
        return list(self._leases)

    def close(self) -> None:
        """Releases the current leases and demands the rest no more. Idempotent."""
        self._release()
        self._store.cache.abandon(self._demand)

    def _release(self) -> None:
        entries = [entry for lease in self._leases if (entry := lease._end()) is not None]
        self._leases.clear()
        if entries:
            self._store.cache.release(entries)

    def __del__(self) -> None:
        # The collector may run inside the store itself, so the store cleans up when it next can.
        self._store._dropped.append((self._demand, self._leases))

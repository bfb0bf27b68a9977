"""Weights on demand: leases of resident parts, over bytes in slots. Knows keys and slots; not what
weights are for, nor which of them matter (the policy and the wishes say that)."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from windlass.device.base import Device
from windlass.ids import Part, WeightKey
from windlass.memory.arena import Arena
from windlass.memory.cache import WeightCache
from windlass.memory.checkpoint import WeightSource
from windlass.memory.eviction import EvictionPolicy
from windlass.memory.leases import Arrivals as Arrivals
from windlass.memory.leases import Lease as Lease
from windlass.memory.link import Priority, Ticket
from windlass.memory.recipe import Recipe, make_recipe
from windlass.memory.recipe import slot_bytes as slot_bytes
from windlass.memory.residency import Entry, num_slots
from windlass.memory.rows import RowReader
from windlass.memory.stats import StoreStats as StoreStats
from windlass.memory.transfer import BLOCK_BYTES, TransferQueue
from windlass.memory.views import copied_bytes, make_views
from windlass.memory.visit import Visit
from windlass.memory.wishes import Wish as Wish
from windlass.packed import StoredTensors
from windlass.spec.names import Layout
from windlass.trace import Tracer


@dataclass(slots=True)
class _Content:
    """What lies in an entry's slot."""

    recipe: Recipe
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
        device: Device,
        slots: Mapping[Part, int],
        *,
        policy: EvictionPolicy,
        tracer: Tracer | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._layout = layout
        self._source = source
        num_keys = Counter(key.part for key in layout.parts)
        sizes = slot_bytes(layout, source.tensors)
        given = num_slots({part: num_keys[part] for part in sizes}, slots)
        self._arenas = {
            part: Arena(device.allocate(sizes[part] * count), sizes[part], count)
            for part, count in given.items()
        }
        self._queue = TransferQueue(
            source,
            device,
            block_bytes=block_bytes,
            on_room=lambda: self.cache.pump(),
            tracer=tracer,
        )
        self._changed = self._queue.changed
        self.cache = WeightCache(
            num_keys,
            self._arenas,
            self._queue,
            self._fetch,
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
                self._rows[key] = RowReader(info, self._queue, device)
        self._dropped: deque[tuple[Visit, list[Lease]]] = deque()
        self._rows_wait_s = 0.0

    # --- what callers use -------------------------------------------------------------------------

    def fits(self, part: Part) -> bool:
        """Whether all parts of this kind have slots: then they stay resident once read."""
        return self.cache.fits(part)

    @property
    def group_size(self) -> int:
        """Experts to lease at once."""
        return self.cache.group_size

    @property
    def keeps_all(self) -> bool:
        """Whether all kinds of parts have slots for all their keys (the embedding aside)."""
        return self.cache.keeps_all

    def holds(self, key: WeightKey) -> bool:
        """Whether `key` is resident or under way. A hint: it may change at any moment."""
        return self.cache.holds(key)

    def settled(self, keys: Iterable[WeightKey]) -> list[StoredTensors] | None:
        """Tensors of `keys`, valid as long as the store, if all are in memory for good and views of
        their slots."""
        with self._changed:
            entries = self.cache.settled(keys)
            if entries is None:
                return None
            tensors = [self._tensors_of(entry) for entry in entries]
            has_copies = any(entry.content.tensors is None for entry in entries)
            return None if has_copies else tensors

    def count_hits(self, part: Part, count: int) -> None:
        """Settled parts that were used, for the statistics."""
        self.cache.count_hits(part, count)

    def lease(self, key: WeightKey) -> Lease:
        """Waits until `key` is resident. Raises CheckpointError if it cannot be read, BudgetError
        if all slots of its kind are leased."""
        with self._changed:
            entry = self.cache.take_resident(key)
            if entry is not None:
                return self._lease(entry)
            self._tidy()
            visit = self.cache.begin((key,))
            try:
                lease = self._next(visit)
            finally:
                self._abandon(visit)
            assert lease is not None, f"{key} did not arrive"
            return lease

    def arrivals(self, keys: Iterable[WeightKey]) -> Arrivals:
        """Leases of all `keys` (distinct): resident ones first, then as they arrive. Reading begins
        at once, for as many as slots and link allow; works with a single slot."""
        with self._changed:
            self._tidy()
            return Arrivals(self, self.cache.begin(keys))

    def prefetch(self, wishes: Sequence[Wish]) -> None:
        """Replaces the wishes. They are read in this order when the link has nothing more urgent,
        into slots that are free or hold something needed later. Speculation under way that is
        wished no more is given up."""
        self.cache.prefetch(wishes)

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
        """Slots, entries, leases, visits, the queue and the policy agree."""
        with self._changed:
            self._tidy()
            self.cache.check()

    def close(self) -> None:
        """Waits for the blocks in flight and starts no more. Idempotent."""
        self._queue.close()

    # --- what leases and arrivals use -------------------------------------------------------------

    def _next(self, visit: Visit) -> Lease | None:
        """The next part of `visit`, waiting for it; None when it is over."""
        with self._changed:
            self._tidy()
            entry = self.cache.next(visit)
            return None if entry is None else self._lease(entry)

    def _ready(self, visit: Visit, limit: int) -> list[Lease]:
        """Leases of what `visit` need not wait for, at most `limit`."""
        with self._changed:
            return [self._lease(entry) for entry in self.cache.ready(visit, limit)]

    def _release(self, entries: Sequence[Entry]) -> None:
        self.cache.release(entries)

    def _abandon(self, visit: Visit) -> None:
        self.cache.abandon(visit)

    def _lease(self, entry: Entry) -> Lease:
        return Lease(self, entry, self._tensors_of(entry))

    def _tensors_of(self, entry: Entry) -> StoredTensors:
        content: _Content = entry.content
        if content.tensors is not None:
            return content.tensors
        tensors, has_copies = make_views(content.recipe, self._memory_of(entry))
        if not has_copies:  # copies are outside the budget's slots: they end with the lease
            content.tensors = tensors
        return tensors

    def _fetch(self, entry: Entry, *, priority: Priority, on_done: Callable[[], None]) -> Ticket:
        recipe = make_recipe(entry.key, self._layout, self._source.tensors)
        entry.content = _Content(recipe)
        return self._queue.submit(
            recipe.reads,
            self._memory_of(entry),
            priority=priority,
            label=str(entry.key),
            on_done=on_done,
        )

    def _memory_of(self, entry: Entry) -> torch.Tensor:
        """The slot of `entry`: uint8."""
        return self._arenas[entry.key.part].bytes_of(entry.slot)

    def _tidy(self) -> None:
        while self._dropped:
            visit, leases = self._dropped.popleft()
            for lease in leases:
                lease.release()
            self._abandon(visit)

"""Weights on demand: leases of resident parts, and what is read next. Knows keys and slots; not
what weights are for, nor which of them matter (the policy and the wishes say that)."""

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

import torch

from windlass.device.base import Device
from windlass.errors import BudgetError
from windlass.ids import Part, WeightKey
from windlass.memory.checkpoint import WeightSource
from windlass.memory.eviction import EvictionPolicy
from windlass.memory.leases import Arrivals as Arrivals
from windlass.memory.leases import Lease as Lease
from windlass.memory.recipe import slot_bytes as slot_bytes
from windlass.memory.residency import Entry, Residency
from windlass.memory.rows import RowReader
from windlass.memory.stats import StoreStats as StoreStats
from windlass.memory.transfer import BLOCK_BYTES, Priority, State, TransferQueue
from windlass.memory.views import copied_bytes, make_views
from windlass.memory.visit import Visit
from windlass.memory.wishes import Wish as Wish
from windlass.memory.wishes import WishList
from windlass.spec.names import Layout
from windlass.trace import Tracer


class WeightStore:
    """Leases parts of a checkpoint, read into `slots` equal slots per kind of part.

    Reads go on by themselves as others arrive, so that the link stays busy while the caller
    computes: first what is demanded, then the wishes, in order. One thread calls; completions come
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
        self._policy = policy
        self._resident = Residency(layout, source, device, slots, policy=policy)
        self._queue = TransferQueue(
            source, device, block_bytes=block_bytes, on_room=self._pump, tracer=tracer
        )
        self._changed = self._queue.changed
        num_experts = len(layout.keys(Part.EXPERT))
        if not self._resident.fits(Part.EXPERT):
            num_experts = max(1, slots.get(Part.EXPERT, 0) // 4)
        # copies are outside the slots, and planned for one part
        self._group_size = 1 if copied_bytes(layout, source.tensors) else num_experts
        self._rows: dict[WeightKey, RowReader] = {}
        if Part.EMBED not in self._resident:
            for key in layout.keys(Part.EMBED):
                (piece,) = layout.parts[key]
                info = source.tensors[piece.tensor]
                assert not piece.ops and piece.shape == info.shape, f"{key}: rows of {piece}"
                self._rows[key] = RowReader(info, self._queue, device)
        self._visits: list[Visit] = []
        self._dropped: deque[tuple[Visit, list[Lease]]] = deque()
        self._wishes = WishList()
        self._requests: Counter[Part] = Counter()
        self._hits: Counter[Part] = Counter()
        self._wait_s = 0.0
        self._prefetch_issued = self._prefetch_used = self._prefetch_cancelled = 0

    # --- what callers use -------------------------------------------------------------------------

    def fits(self, part: Part) -> bool:
        """Whether all parts of this kind have slots: then they stay resident once read."""
        return self._resident.fits(part)

    @property
    def group_size(self) -> int:
        """Experts to lease at once: a quarter of the slots, so that the link has others to fill."""
        return self._group_size

    @property
    def keeps_all(self) -> bool:
        """Whether all kinds of parts have slots for all their keys (the embedding aside)."""
        return all(self.fits(part) for part in self._resident.parts)

    def holds(self, key: WeightKey) -> bool:
        """Whether `key` is resident or under way. A hint: it may change at any moment."""
        return key in self._resident.entries

    def lease(self, key: WeightKey) -> Lease:
        """Waits until `key` is resident. Raises CheckpointError if it cannot be read, BudgetError
        if all slots of its kind are leased."""
        with self._changed:
            entry = self._resident.entries.get(key)
            if entry is not None and entry.ticket is None:
                self._queue.raise_error()
                self._requests[key.part] += 1
                self._hits[key.part] += 1
                return self._take(entry)
            visit = self._begin((key,))
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
            return Arrivals(self, self._begin(keys))

    def prefetch(self, wishes: Sequence[Wish]) -> None:
        """Replaces the wishes. They are read in this order when the link has nothing more urgent,
        into slots that are free or hold something needed later. Speculation under way that is
        wished no more is given up."""
        with self._changed:
            wanted = {wish.key: wish for wish in wishes if wish.key.part in self._resident}
            self._wishes = WishList(tuple(wanted.values()))
            for entry, ticket in self._resident.loading():
                if entry.visits or ticket.priority == Priority.DEMAND:
                    continue
                if entry.key in wanted:
                    self._queue.promote(ticket, _priority_of(wanted[entry.key]))
                elif self._queue.cancel(ticket):
                    self._prefetch_cancelled += 1
            self._pump()

    def read_rows(self, key: WeightKey, rows: Sequence[int]) -> torch.Tensor:
        """Rows of the (V, D) `weight` of `key`, an embedding without slots -> (len(rows), D)."""
        begin = time.perf_counter()
        result = self._rows[key].read(rows)
        self._wait_s += time.perf_counter() - begin
        return result

    def stats(self) -> StoreStats:
        with self._changed:
            return StoreStats(
                bytes_read=self._queue.bytes_read,
                reads=self._queue.num_reads,
                requests=dict(self._requests),
                hits=dict(self._hits),
                wait_s=self._wait_s,
                prefetch_issued=self._prefetch_issued,
                prefetch_used=self._prefetch_used,
                prefetch_cancelled=self._prefetch_cancelled,
                evictions=self._resident.evictions,
            )

    def check(self) -> None:
        """Slots, entries, leases, visits, the queue and the policy agree."""
        with self._changed:
            self._tidy()
            self._queue.check()
            self._resident.check()
            for visit in self._visits:
                watched = [e for e in self._resident.entries.values() if visit in e.visits]
                assert len(watched) == visit.under_way + len(visit.ready), "a visit lost a part"

    def close(self) -> None:
        """Waits for the blocks in flight and starts no more. Idempotent."""
        self._queue.close()

    # --- one caller's demands ---------------------------------------------------------------------

    def _begin(self, keys: Iterable[WeightKey]) -> Visit:
        self._tidy()
        visit = Visit()
        for key in keys:
            self._requests[key.part] += 1
            entry = self._resident.entries.get(key)
            if entry is None:
                visit.waiting.append(key)
            else:
                self._hits[key.part] += entry.ticket is None
                self._watch(entry, visit)
        self._visits.append(visit)
        self._pump()
        return visit

    def _watch(self, entry: Entry, visit: Visit) -> None:
        """`entry` is kept for `visit` until that takes it."""
        entry.visits.append(visit)
        if entry.ticket is None:
            self._resident.set_busy(entry)
            visit.ready.append(entry.key)
        else:
            self._queue.promote(entry.ticket, Priority.DEMAND)
            visit.under_way += 1

    def _next(self, visit: Visit) -> Lease | None:
        """The next part of `visit`, waiting for it; None when it is over."""
        with self._changed:
            self._tidy()
            while True:
                self._queue.raise_error()
                if visit.ready:
                    entry = self._resident.entries[visit.ready.popleft()]
                    entry.visits.remove(visit)
                    return self._take(entry)
                if visit.is_over:
                    self._abandon(visit)
                    return None
                self._pump()
                if visit.ready or (not visit.under_way and self._unblock(visit)):
                    continue
                begin = time.perf_counter()
                self._changed.wait()
                self._wait_s += time.perf_counter() - begin

    def _ready(self, visit: Visit, limit: int) -> list[Lease]:
        """Leases of what `visit` need not wait for, at most `limit`."""
        with self._changed:
            leases: list[Lease] = []
            while visit.ready and len(leases) < limit:
                entry = self._resident.entries[visit.ready.popleft()]
                entry.visits.remove(visit)
                leases.append(self._take(entry))
            return leases

    def _unblock(self, visit: Visit) -> bool:
        """For a visit that has nothing under way: takes a slot that another visit keeps but does
        not use. False: something is loading, and waiting for it helps."""
        key = visit.waiting[0]
        entries = self._resident.of(key.part)
        for entry in entries:
            if entry.ticket is None and not entry.leases:
                for other in entry.visits:
                    other.lost(entry.key)
                entry.visits.clear()
                self._resident.set_idle(entry)
                return self._demand(visit)
        if any(entry.ticket is not None for entry in entries):
            return False
        raise BudgetError(
            f"{key}: got no slot, all {len(entries)} of {key.part.value} are leased: allow more"
        )

    def _take(self, entry: Entry) -> Lease:
        self._resident.set_busy(entry)
        self._policy.note_use(entry.key)
        entry.leases += 1
        self._prefetch_used += entry.is_prefetched
        entry.is_prefetched = False
        if entry.tensors is not None:
            return Lease(self, entry, entry.tensors)
        tensors, has_copies = make_views(entry.recipe, self._resident.memory_of(entry))
        if not has_copies:  # copies are outside the budget's slots: they end with the lease
            entry.tensors = tensors
        return Lease(self, entry, tensors)

    def _release(self, entry: Entry) -> None:
        with self._changed:
            entry.leases -= 1
            if entry.is_idle:
                self._resident.set_idle(entry)
                self._pump()
                self._changed.notify_all()

    def _abandon(self, visit: Visit) -> None:
        """Ends `visit`; what it has not taken may be evicted, what has not begun is not read."""
        with self._changed:
            if visit not in self._visits:
                return
            self._visits.remove(visit)
            if visit.is_over:
                return
            visit.waiting.clear()
            visit.ready.clear()
            visit.under_way = 0
            for entry in [e for e in self._resident.entries.values() if visit in e.visits]:
                entry.visits.remove(visit)
                if entry.is_idle:
                    self._resident.set_idle(entry)
                elif entry.ticket is not None and not entry.visits:
                    self._queue.cancel(entry.ticket)
            self._pump()

    def _tidy(self) -> None:
        while self._dropped:
            visit, leases = self._dropped.popleft()
            for lease in leases:
                lease.release()
            self._abandon(visit)

    # --- what is read next ------------------------------------------------------------------------

    def _pump(self) -> None:
        """Starts whatever slots and link have room for. Called after every change of either."""
        for visit in self._visits:
            while visit.waiting and self._queue.has_room(Priority.DEMAND):
                if not self._demand(visit):
                    break
        blocked: set[Part] = set()
        while (wish := self._wishes.first(blocked)) is not None:
            part, priority = wish.key.part, _priority_of(wish)
            if wish.key not in self._resident.entries:
                if not self._queue.has_room(priority):
                    return
                entry = self._resident.start(
                    wish.key, self._queue, wish, priority=priority, on_done=self._arrived
                )
                if entry is None:
                    blocked.add(part)
                    continue
                entry.is_prefetched = True
                self._prefetch_issued += 1
            self._wishes.pop(part)

    def _demand(self, visit: Visit) -> bool:
        """Begins to read the first waiting key of `visit`; False if there is no slot for it."""
        key = visit.waiting[0]
        entry = self._resident.entries.get(key) or self._resident.start(
            key, self._queue, None, priority=Priority.DEMAND, on_done=self._arrived
        )
        if entry is None:
            return False
        visit.waiting.popleft()
        self._watch(entry, visit)
        return True

    def _arrived(self, entry: Entry) -> None:
        ticket, entry.ticket = entry.ticket, None
        if ticket is not None and ticket.state is State.CANCELLED:
            self._resident.remove(entry)
            for visit in entry.visits:  # demanded again while its last blocks arrived
                visit.failed(entry.key)
            return
        for visit in entry.visits:
            visit.arrived(entry.key)
        if entry.is_idle:
            self._resident.set_idle(entry)


def _priority_of(wish: Wish) -> Priority:
    return Priority.SOON if wish.probability >= 1 else Priority.SPECULATIVE

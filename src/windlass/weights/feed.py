"""What is read next, as slots and the link allow: first what callers demand, then what is hinted
at. Knows keys, no bytes; counts what hints brought."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from windlass.errors import BudgetError
from windlass.ids import Part, WeightKey
from windlass.weights.demand import Demand
from windlass.weights.hints import Hint, HintQueue
from windlass.weights.io_queue import IoQueue, Priority, TicketState
from windlass.weights.residency import Entry, Residency


@dataclass(slots=True)
class PrefetchCounts:
    """Parts, and their bytes."""

    parts: int = 0
    num_bytes: int = 0

    def add(self, num_bytes: int) -> None:
        self.parts += 1
        self.num_bytes += num_bytes


class Feed:
    """Keeps the link busy: `pump` starts whatever there is room for, and must be called whenever a
    slot is free or the queue has room. All calls under the queue's lock."""

    def __init__(self, resident: Residency, queue: IoQueue[Any]) -> None:
        self._resident = resident
        self._queue = queue
        self._hints = HintQueue()
        self._now = 0  # layers since the first pass began
        self._speculative: dict[WeightKey, Hint] = {}  # loading because of a hint alone
        self.demands: list[Demand] = []
        self.issued = PrefetchCounts()
        self.used = PrefetchCounts()
        self.late = PrefetchCounts()  # demanded before they had arrived
        self.cancelled = PrefetchCounts()

    def hint(self, now: int, added: Sequence[Hint], dropped: Sequence[WeightKey]) -> None:
        """The pass is at layer `now`, counted over all passes. Hints that are new, and keys that
        are hinted at no more. Speculation whose turn has passed is given up."""
        self._now = now
        for key in dropped:
            self._hints.drop(key)
        for hint in added:
            self._hints.add(hint)
        if self._speculative:
            for hint in [hint for hint in self._speculative.values() if hint.turn < now]:
                self._give_up(hint.key)
        self.pump()

    def settle(self, keys: Sequence[WeightKey]) -> None:
        """`keys` are demanded: of experts, all that their layer needs in this turn. What was
        guessed of that layer besides is given up, at the border of a block."""
        if not keys or keys[0].part is not Part.EXPERT:
            return
        layer, needed = keys[0].layer, frozenset(keys)
        self._hints.settle(layer, needed, self._now)
        for hint in list(self._speculative.values()):
            is_guess = hint.key.layer == layer and hint.turn <= self._now and not hint.is_certain
            if is_guess and hint.key not in needed:
                self._give_up(hint.key)

    def pump(self) -> None:
        """Starts whatever slots and link have room for."""
        for demand in self.demands:
            while demand.waiting and self._queue.has_room(Priority.DEMAND):
                if not self.begin_first(demand):
                    break
        blocked: set[Part] = set()
        while (hint := self._hints.first(blocked)) is not None:
            key, priority = hint.key, _priority_of(hint)
            if key not in self._resident.entries:
                if not self._queue.has_room(priority):
                    return
                if not self._begin_hinted(hint, priority):
                    blocked.add(key.part)
                    continue
            self._hints.drop(key)

    def begin_first(self, demand: Demand) -> bool:
        """Begins to read the first waiting key of `demand`; False if there is no slot for it."""
        key = demand.waiting[0]
        entry = self._resident.entries.get(key)
        if entry is None:
            entry = self._resident.start(key, None, priority=Priority.DEMAND, on_done=self._arrived)
            if entry is None:
                return False
        demand.waiting.popleft()
        self.watch(entry, demand)
        return True

    def unblock(self, demand: Demand) -> bool:
        """For a demand that has nothing under way: takes a slot that another demand keeps but does
        not use. False: something is loading, or others' reads come first: waiting helps."""
        key = demand.waiting[0]
        entries = self._resident.of(key.part)
        for entry in entries:
            if entry.ticket is None and not entry.leases:
                for other in entry.demands:
                    other.lost(entry.key)
                entry.demands.clear()
                self._resident.set_idle(entry)
                return self.begin_first(demand)
        is_loading = any(entry.ticket is not None for entry in entries)
        if is_loading or not self._queue.has_room(Priority.DEMAND):
            return False
        raise BudgetError(
            f"{key}: got no slot, all {len(entries)} of {key.part.value} are leased: allow more"
        )

    def watch(self, entry: Entry, demand: Demand) -> None:
        """`entry` is kept for `demand` until that takes it; if it is loading, it is urgent now."""
        entry.demands.append(demand)
        if entry.ticket is None:
            self._resident.set_busy(entry)
            demand.ready.append(entry.key)
            return
        if entry.key in self._speculative:
            del self._speculative[entry.key]
            self.late.add(entry.ticket.num_bytes)
        if entry.ticket.priority:
            self._queue.promote(entry.ticket, Priority.DEMAND)
        demand.under_way += 1

    def abandon(self, demand: Demand) -> None:
        """Ends `demand`: what it has not taken is kept for it no more. Idempotent."""
        if demand not in self.demands:
            return
        self.demands.remove(demand)
        if demand.is_over:
            return
        demand.waiting.clear()
        demand.ready.clear()
        demand.under_way = 0
        for entry in [e for e in self._resident.entries.values() if demand in e.demands]:
            entry.demands.remove(demand)
            if entry.is_idle:
                self._resident.set_idle(entry)
            elif entry.ticket is not None and not entry.demands:
                self._queue.cancel(entry.ticket)
        self.pump()

    def take(self, entry: Entry) -> None:
        """`entry` is used."""
        if entry.prefetched_bytes:
            self.used.add(entry.prefetched_bytes)
            entry.prefetched_bytes = 0

    def counters(self) -> dict[str, int]:
        """What hints brought, as `StoreStats` has it."""
        kinds = {
            "issued": self.issued, "used": self.used, "cancelled": self.cancelled, "late": self.late
        }  # fmt: skip
        parts = {f"prefetch_{name}": own.parts for name, own in kinds.items()}
        return parts | {f"prefetch_{name}_bytes": own.num_bytes for name, own in kinds.items()}

    def check(self) -> None:
        """No demand has lost a part."""
        for demand in self.demands:
            watched = [e for e in self._resident.entries.values() if demand in e.demands]
            assert len(watched) == demand.under_way + len(demand.ready), "a demand lost a part"

    def _begin_hinted(self, hint: Hint, priority: Priority) -> bool:
        entry = self._resident.start(
            hint.key, hint.turn - self._now, priority=priority, on_done=self._arrived
        )
        if entry is None:
            return False
        if entry.ticket is not None:
            entry.prefetched_bytes = entry.ticket.num_bytes
            self.issued.add(entry.prefetched_bytes)
            self._speculative[hint.key] = hint
        return True

    def _give_up(self, key: WeightKey) -> None:
        del self._speculative[key]
        entry = self._resident.entries[key]
        num_bytes = entry.prefetched_bytes
        if entry.ticket is not None and self._queue.cancel(entry.ticket):
            self.cancelled.add(num_bytes)

    def _arrived(self, entry: Entry) -> None:
        ticket, entry.ticket = entry.ticket, None
        self._speculative.pop(entry.key, None)
        if ticket is not None and ticket.state is TicketState.CANCELLED:
            self._resident.remove(entry)
            for demand in entry.demands:  # demanded again while its last blocks arrived
                demand.failed(entry.key)
            return
        for demand in entry.demands:
            demand.arrived(entry.key)
        if entry.is_idle:
            self._resident.set_idle(entry)


def _priority_of(hint: Hint) -> Priority:
    return Priority.SOON if hint.is_certain else Priority.SPECULATIVE

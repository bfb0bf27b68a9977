"""Which part is in which slot. Starts reads into slots and evicts; knows nothing of who waits, nor
of bytes."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from windlass.errors import BudgetError
from windlass.ids import Part, WeightKey
from windlass.weights.demand import Demand
from windlass.weights.eviction import EvictionPolicy
from windlass.weights.hints import Hint
from windlass.weights.io_queue import Priority, Ticket
from windlass.weights.slots import Slots


class Entry:
    """A part that has a slot: loading while `ticket` is there, then resident. `content`: what the
    store that moves bytes keeps of it."""

    __slots__ = ("key", "slot", "ticket", "leases", "demands", "is_prefetched", "content")

    def __init__(self, key: WeightKey, slot: int) -> None:
        self.key = key
        self.slot = slot
        self.ticket: Ticket[Any] | None = None
        self.leases = 0
        self.demands: list[Demand] = []  # that still want it
        self.is_prefetched = False
        self.content: Any = None

    @property
    def is_idle(self) -> bool:
        return self.ticket is None and not self.leases and not self.demands


class Fetch(Protocol):
    """Begins to read a part into its slot; `on_done` follows under the queue's lock."""

    def __call__(
        self, entry: Entry, *, priority: Priority, on_done: Callable[[], None]
    ) -> Ticket[Any]: ...


def num_slots(num_keys: Mapping[Part, int], wanted: Mapping[Part, int]) -> dict[Part, int]:
    """Slots of each kind of part: as many as wanted, no more than there are keys. BudgetError where
    a kind has none, except the embedding, whose rows can be read singly: it is left out then."""
    given = {part: min(wanted.get(part, 0), keys) for part, keys in num_keys.items()}
    for part, count in given.items():
        if not count and part != Part.EMBED:
            raise BudgetError(f"slots for {part.value}: got 0, allowed at least 1")
    return {part: count for part, count in given.items() if count}


class Residency:
    """Slots, and the entries that occupy them. All calls under the queue's lock."""

    def __init__(
        self,
        num_keys: Mapping[Part, int],
        slots: Mapping[Part, Slots],
        fetch: Fetch,
        *,
        policy: EvictionPolicy,
    ) -> None:
        self.entries: dict[WeightKey, Entry] = {}
        self.evictions = 0
        self._slots = slots
        self._fetch = fetch
        self._policy = policy
        self._fitting = {part for part, own in slots.items() if own.num_slots == num_keys[part]}

    def __contains__(self, part: Part) -> bool:
        """Whether this kind of part has slots at all."""
        return part in self._slots

    @property
    def parts(self) -> Iterable[Part]:
        """Kinds of parts that have slots."""
        return self._slots.keys()

    def num_slots(self, part: Part) -> int:
        return self._slots[part].num_slots if part in self._slots else 0

    def fits(self, part: Part) -> bool:
        """Whether every part of this kind has a slot."""
        return part in self._fitting

    def of(self, part: Part) -> list[Entry]:
        """Entries of one kind."""
        return [entry for entry in self.entries.values() if entry.key.part == part]

    def loading(self) -> list[tuple[Entry, Ticket[Any]]]:
        """Entries under way, in the order in which they were begun."""
        return [(e, e.ticket) for e in self.entries.values() if e.ticket is not None]

    def start(
        self,
        key: WeightKey,
        hint: Hint | None,
        *,
        priority: Priority,
        on_done: Callable[[Entry], None],
    ) -> Entry | None:
        """Begins to read `key` into a free slot or a victim's; None where there is neither."""
        slot = self._take_slot(key.part, hint)
        if slot is None:
            return None
        entry = self.entries[key] = Entry(key, slot)
        entry.ticket = self._fetch(entry, priority=priority, on_done=lambda: on_done(entry))
        return entry

    def remove(self, entry: Entry) -> None:
        """Frees the slot of `entry`."""
        del self.entries[entry.key]
        self._slots[entry.key.part].free(entry.slot)

    def set_idle(self, entry: Entry) -> None:
        """`entry` may be evicted, unless its kind fits: then nothing ever has to go."""
        if not self.fits(entry.key.part):
            self._policy.add(entry.key)

    def set_busy(self, entry: Entry) -> None:
        """`entry` may not be evicted."""
        if not self.fits(entry.key.part):
            self._policy.discard(entry.key)

    def check(self) -> None:
        """Slots, entries and the policy agree."""
        for part, own in self._slots.items():
            own.check()
            slots = [entry.slot for entry in self.of(part)]
            assert len(set(slots)) == len(slots), f"two parts in one slot of {part}"
            assert set(slots) == own.held(), f"{part}: slots {slots}, held {own.held()}"
        for key, entry in self.entries.items():
            assert entry.leases >= 0, f"{key}: {entry.leases} leases"
            may_go = entry.is_idle and not self.fits(key.part)
            assert (key in self._policy) == may_go, f"{key}: the policy disagrees"

    def _take_slot(self, part: Part, hint: Hint | None) -> int | None:
        own = self._slots[part]
        slot = own.allocate()
        if slot is None and (victim := self._policy.victim(part, hint)) is not None:
            self._policy.discard(victim)
            self.remove(self.entries[victim])
            self.evictions += 1
            slot = own.allocate()
        return slot

"""Which part is in which slot. Starts reads into slots and evicts; knows nothing of who waits, nor
of bytes."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from windlass.errors import BudgetError
from windlass.ids import Part, Route, WeightKey
from windlass.weights.demand import Demand
from windlass.weights.eviction import EvictionPolicy
from windlass.weights.io_queue import Priority, Ticket
from windlass.weights.slots import Slots
from windlass.weights.stats import PartPlaces, Place


class Entry:
    """A part that has a slot: loading while `ticket` is there, then resident. `content`: what the
    store that moves bytes keeps of it."""

    __slots__ = (
        "key", "slot", "ticket", "leases", "lent", "demands", "prefetched_bytes", "content",
    )  # fmt: skip

    def __init__(self, key: WeightKey, slot: int) -> None:
        self.key = key
        self.slot = slot
        self.ticket: Ticket[Any] | None = None
        self.leases = 0
        self.lent = 0  # of the leases, those of copies to the tier above, which end by themselves
        self.demands: list[Demand] = []  # that still want it
        self.prefetched_bytes = 0  # read because of a hint, and not used yet
        self.content: Any = None

    @property
    def is_idle(self) -> bool:
        return self.ticket is None and not self.leases and not self.demands


class Below(Protocol):
    """The tier that parts come from. All calls under the queue's lock."""

    def has(self, key: WeightKey) -> bool:
        """Whether `key` is resident, so that it can be copied."""
        ...

    def settle(self, keys: Sequence[WeightKey]) -> None:
        """`keys` are all that the layer of the first needs, where that is an expert."""
        ...

    def tell(self, arrived: Callable[[WeightKey], None]) -> None:
        """`arrived` is called with each part that becomes resident."""
        ...


class Mover(Protocol):
    """Whoever brings parts into slots: a store moves their bytes, a clock counts their seconds."""

    @property
    def route(self) -> Route:
        """The way by which they come here."""
        ...

    @property
    def below(self) -> Below | None:
        """The tier that they come from; None for files."""
        ...

    def fetch(
        self, entry: Entry, *, priority: Priority, on_done: Callable[[], None]
    ) -> Ticket[Any]:
        """Begins to read a part into its slot; `on_done` follows under the queue's lock."""
        ...

    def now(self) -> float:
        """Seconds, from any beginning."""
        ...


def nearest_first(keys: Sequence[WeightKey], below: Below | None) -> Sequence[WeightKey]:
    """`keys` as they are to be given slots: first those that can be copied at once."""
    return keys if below is None else sorted(keys, key=lambda key: not below.has(key))


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
        mover: Mover,
        *,
        policy: EvictionPolicy,
    ) -> None:
        self.entries: dict[WeightKey, Entry] = {}
        self.evictions = 0
        self.uses: Counter[WeightKey] = Counter()
        self.gone_at: dict[WeightKey, float] = {}  # when it was evicted last, by the mover's clock
        self._slots = slots
        self._mover = mover
        self._policy = policy
        self._places: dict[WeightKey, int] = {}
        self._held = np.zeros(0, bool)
        self._fitting = {part for part, own in slots.items() if own.num_slots == num_keys[part]}
        self.fits_all = len(self._fitting) == len(slots)

    def __contains__(self, part: Part) -> bool:
        """Whether this kind of part has slots at all."""
        return part in self._slots

    def track(self, keys: Sequence[WeightKey]) -> NDArray[np.bool_]:
        """A bitmap of `keys`, true where one has a slot, resident or loading. It changes with every
        read and eviction from now on; the next call ends that."""
        self._places = {key: place for place, key in enumerate(keys)}
        self._held = np.array([key in self.entries for key in keys], bool)
        return self._held

    @property
    def parts(self) -> Iterable[Part]:
        """Kinds of parts that have slots."""
        return self._slots.keys()

    def num_slots(self, part: Part) -> int:
        return self._slots[part].num_slots if part in self._slots else 0

    def num_held(self) -> dict[Part, int]:
        """Slots by kind that are taken."""
        return {part: own.num_slots - own.num_free for part, own in self._slots.items()}

    def num_free(self, part: Part) -> int:
        return self._slots[part].num_free if part in self._slots else 0

    def fits(self, part: Part) -> bool:
        """Whether every part of this kind has a slot."""
        return part in self._fitting

    def of(self, part: Part) -> list[Entry]:
        """Entries of one kind."""
        return [entry for entry in self.entries.values() if entry.key.part == part]

    def pinned(self, keys: Sequence[WeightKey]) -> list[Entry] | None:
        """Of `keys`, if all are resident and of kinds that fit."""
        if not all(self.fits(key.part) for key in keys):
            return None
        entries = [self.entries.get(key) for key in keys]
        there = [entry for entry in entries if entry is not None and entry.ticket is None]
        return there if len(there) == len(entries) else None

    def loading(self) -> list[tuple[Entry, Ticket[Any]]]:
        """Entries under way, in the order in which they were begun."""
        return [(e, e.ticket) for e in self.entries.values() if e.ticket is not None]

    def start(
        self,
        key: WeightKey,
        layers: int | None,
        *,
        priority: Priority,
        on_done: Callable[[Entry], None],
    ) -> Entry | None:
        """Begins to read `key` into a free slot or a victim's; None where there is neither.
        `layers`: until its turn, where a hint brings it, or None where it is demanded."""
        slot = self._take_slot(key, layers)
        if slot is None:
            return None
        entry = self.entries[key] = Entry(key, slot)
        self._note(key, is_held=True)
        entry.ticket = self._mover.fetch(entry, priority=priority, on_done=partial(on_done, entry))
        return entry

    def note_use(self, key: WeightKey, *, is_copied: bool = False) -> None:
        """`key` is used now; `is_copied`: only by being copied, which the policy does not count."""
        if not is_copied:
            self._policy.note_use(key)
        self.uses[key] += 1

    def places(self, part: Part) -> PartPlaces:
        """Where parts of one kind are."""
        now = self._mover.now()
        return PartPlaces(
            {entry.key: _place(entry) for entry in self.of(part)},
            {key: count for key, count in self.uses.items() if key.part == part},
            {key: now - then for key, then in self.gone_at.items() if key.part == part},
        )

    def remove(self, entry: Entry) -> None:
        """Frees the slot of `entry`."""
        del self.entries[entry.key]
        self._note(entry.key, is_held=False)
        self._slots[entry.key.part].free(entry.slot)

    def set_idle(self, entry: Entry) -> None:
        """`entry` may be evicted, unless its kind fits: then nothing ever has to go."""
        if entry.key.part not in self._fitting:
            self._policy.add(entry.key)

    def set_busy(self, entry: Entry) -> None:
        """`entry` may not be evicted."""
        if entry.key.part not in self._fitting:
            self._policy.discard(entry.key)

    def check(self) -> None:
        """Slots, entries and the policy agree."""
        for part, own in self._slots.items():
            own.check()
            slots = [entry.slot for entry in self.of(part)]
            assert len(set(slots)) == len(slots), f"two parts in one slot of {part}"
            assert set(slots) == own.held(), f"{part}: slots {slots}, held {own.held()}"
        for key, place in self._places.items():
            assert self._held[place] == (key in self.entries), f"{key}: the bitmap disagrees"
        for key, entry in self.entries.items():
            assert entry.leases >= 0, f"{key}: {entry.leases} leases"
            may_go = entry.is_idle and not self.fits(key.part)
            assert (key in self._policy) == may_go, f"{key}: the policy disagrees"

    def _note(self, key: WeightKey, *, is_held: bool) -> None:
        place = self._places.get(key)
        if place is not None:
            self._held[place] = is_held

    def _take_slot(self, key: WeightKey, layers: int | None) -> int | None:
        own = self._slots[key.part]
        slot = own.allocate()
        if slot is None and (victim := self._policy.victim(key, layers)) is not None:
            self._policy.discard(victim)
            slot = self.entries.pop(victim).slot
            self._note(victim, is_held=False)
            self.evictions += 1
            self.gone_at[victim] = self._mover.now()
        return slot


def _place(entry: Entry) -> Place:
    is_ahead = entry.prefetched_bytes > 0 and not entry.demands
    if entry.ticket is not None:
        return Place.COMING_AHEAD if is_ahead else Place.COMING
    return Place.HELD_AHEAD if is_ahead else Place.HELD

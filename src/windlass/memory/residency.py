"""Which part is in which slot. Starts reads into slots and evicts; knows nothing of who waits."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch

from windlass.device.base import Device
from windlass.errors import BudgetError
from windlass.ids import Part, WeightKey
from windlass.memory.arena import Arena
from windlass.memory.checkpoint import WeightSource
from windlass.memory.eviction import EvictionPolicy
from windlass.memory.recipe import Recipe, make_recipe, slot_bytes
from windlass.memory.transfer import Priority, Ticket, TransferQueue
from windlass.memory.visit import Visit
from windlass.memory.wishes import Wish
from windlass.packed import StoredTensors
from windlass.spec.names import Layout


class Entry:
    """A part that has a slot: loading while `ticket` is there, then resident."""

    __slots__ = ("key", "slot", "recipe", "ticket", "leases", "visits", "tensors", "is_prefetched")

    def __init__(self, key: WeightKey, slot: int, recipe: Recipe) -> None:
        self.key = key
        self.slot = slot
        self.recipe = recipe
        self.ticket: Ticket | None = None
        self.leases = 0
        self.visits: list[Visit] = []  # that still want it
        self.tensors: StoredTensors | None = None  # made at the first lease
        self.is_prefetched = False

    @property
    def is_idle(self) -> bool:
        return self.ticket is None and not self.leases and not self.visits


class Residency:
    """Arenas, and the entries that occupy their slots. All calls under the queue's lock."""

    def __init__(
        self,
        layout: Layout,
        source: WeightSource,
        device: Device,
        slots: Mapping[Part, int],
        *,
        policy: EvictionPolicy,
    ) -> None:
        self.entries: dict[WeightKey, Entry] = {}
        self.evictions = 0
        self._layout = layout
        self._source = source
        self._policy = policy
        self._arenas: dict[Part, Arena] = {}
        self._fitting: set[Part] = set()
        num_keys = Counter(key.part for key in layout.parts)
        for part, num_bytes in slot_bytes(layout, source.tensors).items():
            num_slots = min(slots.get(part, 0), num_keys[part])
            if num_slots:
                memory = device.allocate(num_bytes * num_slots)
                self._arenas[part] = Arena(memory, num_bytes, num_slots)
                if num_slots == num_keys[part]:
                    self._fitting.add(part)
            elif part != Part.EMBED:  # its rows can be read singly
                raise BudgetError(f"slots for {part.value}: got 0, allowed at least 1")

    def __contains__(self, part: Part) -> bool:
        """Whether this kind of part has slots at all."""
        return part in self._arenas

    @property
    def parts(self) -> Iterable[Part]:
        """Kinds of parts that have slots."""
        return self._arenas.keys()

    def fits(self, part: Part) -> bool:
        """Whether every part of this kind has a slot."""
        return part in self._fitting

    def of(self, part: Part) -> list[Entry]:
        """Entries of one kind."""
        return [entry for entry in self.entries.values() if entry.key.part == part]

    def loading(self) -> list[tuple[Entry, Ticket]]:
        """Entries under way."""
        return [(e, e.ticket) for e in self.entries.values() if e.ticket is not None]

    def memory_of(self, entry: Entry) -> torch.Tensor:
        """The slot of `entry`: uint8."""
        return self._arenas[entry.key.part].bytes_of(entry.slot)

    def start(
        self,
        key: WeightKey,
        queue: TransferQueue,
        wish: Wish | None,
        *,
        priority: Priority,
        on_done: Callable[[Entry], None],
    ) -> Entry | None:
        """Begins to read `key` into a free slot or a victim's; None where there is neither."""
        slot = self._take_slot(key.part, wish)
        if slot is None:
            return None
        recipe = make_recipe(key, self._layout, self._source.tensors)
        entry = self.entries[key] = Entry(key, slot, recipe)
        entry.ticket = queue.submit(
            recipe.reads,
            self.memory_of(entry),
            priority=priority,
            label=str(key),
            on_done=lambda: on_done(entry),
        )
        return entry

    def remove(self, entry: Entry) -> None:
        """Frees the slot of `entry`."""
        del self.entries[entry.key]
        self._arenas[entry.key.part].free(entry.slot)

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
        for part, arena in self._arenas.items():
            arena.check()
            slots = [entry.slot for entry in self.of(part)]
            assert len(set(slots)) == len(slots), f"two parts in one slot of {part}"
            assert set(slots) == arena.held(), f"{part}: slots {slots}, held {arena.held()}"
        for key, entry in self.entries.items():
            assert entry.leases >= 0, f"{key}: {entry.leases} leases"
            may_go = entry.is_idle and not self.fits(key.part)
            assert (key in self._policy) == may_go, f"{key}: the policy disagrees"

    def _take_slot(self, part: Part, wish: Wish | None) -> int | None:
        arena = self._arenas[part]
        slot = arena.allocate()
        if slot is None and (victim := self._policy.victim(part, wish)) is not None:
            self._policy.discard(victim)
            self.remove(self.entries[victim])
            self.evictions += 1
            slot = arena.allocate()
        return slot

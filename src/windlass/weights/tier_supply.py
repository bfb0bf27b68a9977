"""Parts that a weight store has copied from the store of the tier below, into a layout of their
own. Knows slots of both, not who wants what."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from windlass.checkpoint.part_reads import PartReads
from windlass.checkpoint.placement import DeviceLayout, Placed
from windlass.device.base import Copy, Device, DeviceMemory
from windlass.ids import Part, Route, WeightKey
from windlass.tensors import plain
from windlass.weights.cache import WeightCache
from windlass.weights.chain import Chain
from windlass.weights.io_queue import Priority, Ticket
from windlass.weights.residency import Entry
from windlass.weights.store import WeightStore
from windlass.weights.supply import Rows
from windlass.weights.transfer import Carrier


class TierSupply:
    """Implements `Supply` from the slots of `below`. Its queue carries one more route from now on:
    both tiers have one lock, and one first error. `check` and `close` of the store above are those
    of `below` too."""

    def __init__(self, below: WeightStore, link: Carrier) -> None:
        """`link`: who carries parts from below into memory of its device."""
        supply = below.supply
        self.layout = supply.layout
        self.device = link.device
        self.queue = supply.queue
        self.route = Route(supply.device.name, link.device.name)
        self.queue.carry(self.route, link)
        self.below: WeightCache | None = below.cache
        self.one_by_one = False
        self.store = below
        self._chain = Chain(below.cache, self.queue, self.route)
        self._device_layout = DeviceLayout()
        self._known: dict[WeightKey, tuple[Placed, str]] = {}
        parts = ((key.part, supply.part_reads(key)) for key in self.layout.parts)
        self.slot_bytes: Mapping[Part, int] = self._device_layout.slot_bytes(parts)

    def part_reads(self, key: WeightKey) -> PartReads:
        return self._learn(key)[0].part_reads

    def fetch(
        self, key: WeightKey, into: DeviceMemory, *, priority: Priority, on_done: Callable[[], None]
    ) -> Ticket[Copy]:
        pieces = partial(self._copies, into)
        return self._chain.fetch(key, pieces, priority=priority, on_done=on_done)

    def rows(self, key: WeightKey) -> Rows:
        return _RowsBelow(self.store, key, self.device)

    def check(self) -> None:
        self._chain.check()
        self.store.check()

    def _copies(self, into: DeviceMemory, entry: Entry) -> list[Copy]:
        """The part of `entry`, a part below, into its slot here."""
        placed, label = self._learn(entry.key)
        source = self.store.memory_of(entry)
        return [
            Copy(source.part(begin, num_bytes), into.part(at, num_bytes), label)
            for begin, at, num_bytes in placed.moves
        ]

    def _learn(self, key: WeightKey) -> tuple[Placed, str]:
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._place(key), str(key)
        return known

    def _place(self, key: WeightKey) -> Placed:
        return self._device_layout.place(self.store.supply.part_reads(key))


class _RowsBelow:
    """Implements `Rows`: the table is in a slot below, or its rows are read from there."""

    def __init__(self, below: WeightStore, key: WeightKey, device: Device) -> None:
        self._below = below
        self._key = key
        self._device = device

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        found = self._read(rows)
        return self._device.tensor(found, dtype=found.dtype)

    def _read(self, rows: Sequence[int]) -> torch.Tensor:
        if not self._below.cache.fits(self._key.part):
            return self._below.read_rows(self._key, rows)
        with self._below.lease(self._key) as lease:
            return plain(lease.tensors, "weight")[torch.as_tensor(rows, dtype=torch.int64)]

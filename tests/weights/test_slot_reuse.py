"""Slots of a device that computes by itself: what is asked for is not over, so whoever writes a
slot waits for the last work that reads it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fake_cuda import FakeCuda
from fake_streams import Race
from fakes import FakeSource, expert_layout, expert_tensors, experts
from windlass.device.streams import OVER
from windlass.ids import Part, WeightKey
from windlass.models.names import Layout, Piece
from windlass.prefetch.policies import FarthestNextUse
from windlass.weights.hints import Hint
from windlass.weights.store import Lease, WeightStore
from windlass.weights.supply import FileSupply
from windlass.weights.transfer import Carrier

TENSORS = expert_tensors(1, 6, rows=64, columns=160)  # 5 pages each
EXPERTS = experts(0, range(6))


@contextmanager
def store_on(device: FakeCuda, slots: int) -> Iterator[WeightStore]:
    """Experts in blocks of a page, while torch is watched."""
    supply = FileSupply(expert_layout(TENSORS), FakeSource(TENSORS), Carrier(device, 4096))
    store = WeightStore(supply, {Part.EXPERT: slots}, policy=FarthestNextUse(1))
    store._queue.changed.wait = device.wait  # type: ignore[method-assign]
    with device.watched(), device.streams.on(device.streams.compute):
        yield store
        store.close()


def use(device: FakeCuda, lease: Lease) -> torch.Tensor:
    """A kernel that reads what is leased, and nothing waits for."""
    gate = lease.tensors["gate"]
    assert isinstance(gate, torch.Tensor)
    return gate.float().sum()


@pytest.mark.parametrize("seed", range(10))
def test_experts_through_two_slots(seed):
    device = FakeCuda(seed=seed)
    with store_on(device, 2) as store:
        with_one = [store.lease(key) for key in EXPERTS[:1]]
        sums = [use(device, lease) for lease in with_one]
        for lease in with_one:
            lease.release()
        for lease in store.arrivals(EXPERTS[1:]):
            sums.append(use(device, lease))
        found = device.streams.on_host(*sums)
    assert not device.memory.races
    expected = sorted(float(TENSORS[f"0.{i}.gate"].float().sum()) for i in range(6))
    assert sorted(map(float, found)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("forgets", [True, False])
def test_a_fetch_that_is_given_up_before_its_first_block_leaves_the_wait_to_the_next(forgets):
    device = FakeCuda(late=1.0)  # nothing arrives unless somebody waits
    with store_on(device, 2) as store:
        with store.lease(EXPERTS[0]) as lease:
            use(device, lease)
        (slot,) = (entry.slot for entry in store.cache._resident.entries.values())
        store.cache.hint(0, [Hint(0, EXPERTS[1], 1, True)], [])  # has the link
        given_up = store.arrivals(EXPERTS[2:3])  # has the slot, and not a block under way
        entry = store.cache._resident.entries[EXPERTS[2]]
        assert entry.slot == slot and entry.ticket is not None and entry.ticket.num_bytes > 0
        given_up.close()
        assert EXPERTS[2] not in store.cache._resident.entries
        if forgets:
            store._arenas[Part.EXPERT]._slots[slot].last_use = OVER
            with pytest.raises(Race, match="a copy on down writes"):
                store.lease(EXPERTS[3])
        else:
            store.lease(EXPERTS[3]).release()


@pytest.mark.parametrize("point", ["", "record of compute in RowReader._read_batch"])
def test_rows_of_a_table_by_way_of_one_buffer(point):
    table = torch.randn(700, 16).bfloat16()
    key = WeightKey(Part.EMBED)
    layout = Layout({key: (Piece("weight", "table", 0, table.numel(), (700, 16)),)}, ())
    device = FakeCuda(without=point)
    supply = FileSupply(layout, FakeSource({"table": table}), Carrier(device))
    store = WeightStore(supply, {}, policy=FarthestNextUse(1))
    store._queue.changed.wait = device.wait  # type: ignore[method-assign]
    rows = list(range(0, 700, 2))  # more than the buffer holds
    with device.watched(), device.streams.on(device.streams.compute):
        if point:
            with pytest.raises(Race, match="a copy on down writes"):
                store.read_rows(key, rows)
        else:
            (found,) = device.streams.on_host(store.read_rows(key, rows))
            assert torch.equal(found, table[rows])
        store.close()

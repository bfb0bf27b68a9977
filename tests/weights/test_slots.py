"""Slots: every one is free or held, and they do not overlap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeDevice
from windlass.device.base import DeviceMemory
from windlass.weights.slots import Arena


def _memory(num_bytes: int) -> DeviceMemory:
    return FakeDevice(manual=True).allocate(num_bytes)


def make_arena(num_slots: int) -> Arena:
    return Arena(_memory(num_slots * 4096), 4096, num_slots)


@given(num_slots=st.integers(1, 6), choices=st.lists(st.integers(0, 11), max_size=60))
def test_random_allocation_keeps_slots_apart(num_slots: int, choices: list[int]):
    arena = make_arena(num_slots)
    held: dict[int, int] = {}  # slot -> what was written
    for step, choice in enumerate(choices):
        if choice < 6:
            slot = arena.allocate()
            assert (slot is None) == (len(held) == num_slots)
            if slot is not None:
                assert slot not in held
                held[slot] = step % 256
                arena.memory_of(slot).data.fill_(step % 256)
        elif held:
            slot = sorted(held)[choice % len(held)]
            arena.free(slot)
            del held[slot]
        arena.check()
        assert arena.num_free == num_slots - len(held)
        assert arena.held() == held.keys()
        for slot, value in held.items():
            assert bool((arena.memory_of(slot).data == value).all())


def test_a_slot_that_is_not_held_can_be_neither_freed_nor_read():
    arena = make_arena(2)
    slot = arena.allocate()
    assert slot is not None
    arena.free(slot)
    for use in (arena.free, arena.memory_of):
        with pytest.raises(AssertionError, match=f"slot {slot} is not held"):
            use(slot)


def test_check_sees_a_lost_and_a_doubled_slot():
    arena = make_arena(3)
    slot = arena.allocate()
    assert slot is not None
    arena._is_held[slot] = False
    with pytest.raises(AssertionError, match="lost"):
        arena.check()
    arena._free.append(slot)
    arena._free.append(slot)
    with pytest.raises(AssertionError, match="free twice"):
        arena.check()


def test_sizes_that_direct_reads_cannot_fill_are_refused():
    with pytest.raises(AssertionError, match="slot_bytes: got 100"):
        Arena(_memory(4096), 100, 1)
    with pytest.raises(AssertionError, match=r"4096, 4096, 2"):
        Arena(_memory(4096), 4096, 2)

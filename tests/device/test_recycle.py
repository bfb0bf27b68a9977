"""Memory of results is used again, and never more of it than was in use at once."""

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.device.host_memory import HUGE_PAGE_BYTES, LARGE_BYTES
from windlass.device.process_memory import resident_bytes
from windlass.device.recycle import Recycler
from windlass.units import MIB, round_up

SIZES = (LARGE_BYTES // 4, LARGE_BYTES // 4 + 1, 3 * LARGE_BYTES // 4)


def test_the_memory_of_a_freed_tensor_is_used_again():
    memory = Recycler()
    first = memory.empty(3, SIZES[0])
    address = first.data_ptr()
    assert address % HUGE_PAGE_BYTES == 0 and first.shape == (3, SIZES[0])
    row = first[1]
    del first
    assert memory.empty(3, SIZES[0]).data_ptr() != address, "a row of it is still in use"
    row.fill_(1)
    del row
    assert memory.empty(3, SIZES[0]).data_ptr() == address


def test_results_of_some_megabytes_leave_no_holes_in_the_heap():
    memory = Recycler()
    x = memory.empty(3 * MIB // 4)
    assert memory.held_bytes == 3 * MIB
    address = x.data_ptr()
    del x
    assert memory.empty(3 * MIB // 4).data_ptr() == address, "used again"
    assert memory.held_bytes == 3 * MIB


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(SIZES)), max_size=40))
def test_no_two_tensors_share_memory_and_the_peak_stays(steps):
    memory, peak = Recycler(), 0
    held: dict[int, tuple[torch.Tensor, int]] = {}
    for i, (place, numel) in enumerate(steps):
        held.pop(place, None)
        held[place] = memory.empty(numel).fill_(i), i
        in_use = sum(round_up(4 * x.numel(), HUGE_PAGE_BYTES) for x, _ in held.values())
        peak = max(peak, in_use)
        assert in_use <= memory.held_bytes <= peak
        assert all(bool((x[:: len(x) - 1] == value).all()) for x, value in held.values())


def test_small_results_are_not_kept_and_all_ends_with_the_recycler():
    memory = Recycler()
    memory.empty(10)
    assert memory.held_bytes == 0
    before = resident_bytes()
    x = memory.empty(64 * MIB // 4).fill_(1)
    assert resident_bytes() > before + 60 * MIB
    del x
    assert resident_bytes() > before + 60 * MIB, "kept for the next"
    del memory
    gc.collect()
    assert resident_bytes() < before + 8 * MIB

"""A weight store over another: parts go from files to the host and on to a device, in layouts of
their own, whatever there is room for, in whatever order copies arrive."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeDevice, experts
from lru import LeastRecentlyUsed
from stores import OPERATIONS, assert_is_expert, hint, make_chain, make_store, operate
from windlass.checkpoint.placement import PLACE_BYTES
from windlass.device.cpu import CpuDevice
from windlass.errors import BudgetError, CheckpointError
from windlass.ids import DISK_TO_HOST, HOST, Part, Route, WeightKey
from windlass.tensors import plain
from windlass.weights.cache import WeightCache
from windlass.weights.hints import Hint
from windlass.weights.io_queue import Priority
from windlass.weights.store import Lease, WeightStore
from windlass.weights.tier_supply import TierSupply
from windlass.weights.transfer import Carrier

TO_DEVICE = Route(HOST, "device")
PART = 3 * 64 * 160 * 2  # bytes of an expert
FILE_PART = PART + 4096  # of its aligned reads


@pytest.fixture
def devices() -> Iterator[tuple[FakeDevice, FakeDevice]]:
    """Of a host and above it, whose copies arrive when the test says so."""
    host, device = (FakeDevice(name=name, manual=True) for name in (HOST, "device"))
    yield host, device
    host.complete_all()
    device.complete_all()


def wait_for(is_true: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.0005)


def in_thread(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("host_slots", [1, 2, 5, 12])
@pytest.mark.parametrize("slots", [1, 3, 12])
def test_leases_hold_the_bytes_of_the_file_whatever_the_slots_of_both_tiers(host_slots, slots):
    host, device = (FakeDevice(name=n, seed=host_slots, delay_s=5e-5) for n in (HOST, "device"))
    store, tensors = make_chain(host, device, host_slots=host_slots, slots=slots)
    for _ in range(2):
        for layer in range(3):
            seen = []
            for lease in store.arrivals(experts(layer, range(4))):
                assert_is_expert(lease, tensors)
                for name in lease.tensors:
                    assert plain(lease.tensors, name).data_ptr() % PLACE_BYTES == 0
                seen.append(lease.key.index)
            store.check()
            assert sorted(seen) == [0, 1, 2, 3]
    moved = store.stats().link_bytes
    assert moved[TO_DEVICE] % PART == 0
    if host_slots == 12:
        assert moved[DISK_TO_HOST] == store.stats().bytes_read == 12 * FILE_PART
    if slots == 12:
        assert moved == {DISK_TO_HOST: 12 * FILE_PART, TO_DEVICE: 12 * PART}
    else:
        assert moved[TO_DEVICE] >= (24 - slots) * PART, "parts of the last pass are found"
        assert moved[DISK_TO_HOST] <= moved[TO_DEVICE] * FILE_PART / PART
    store.close()
    for one in (host, device):
        one.close()


@settings(max_examples=40, deadline=None)
@given(
    operations=OPERATIONS, slots=st.integers(1, 12), host_slots=st.integers(1, 12),
    seed=st.integers(0, 9), lru=st.booleans(),
)  # fmt: skip
def test_random_operations_keep_the_invariants_and_the_bytes(
    operations, slots, host_slots, seed, lru
):
    host, device = (
        FakeDevice(name=name, seed=seed + i, num_lanes=1 + (seed + i) % 3, delay_s=0.00005)
        for i, name in enumerate((HOST, "device"))
    )
    policy = LeastRecentlyUsed() if lru else None
    store, tensors = make_chain(host, device, host_slots=host_slots, slots=slots, policy=policy)
    try:
        operate(operations, store, tensors, slots)
        for _ in range(8):  # what has arrived in one tier goes on in the other
            host.synchronize()
            device.synchronize()
        store.check()
    finally:
        store.close()
        host.close()
        device.close()


def read_below(store: WeightStore, host: FakeDevice, keys: list[WeightKey]) -> WeightCache:
    """Brings `keys` into the lower tier alone."""
    assert store.supply.below is not None
    store.supply.below.hint(0, [Hint(i, key, 1) for i, key in enumerate(keys)], [])
    host.complete_all()
    assert all(map(store.supply.below.holds, keys))
    return store.supply.below


def test_a_demand_goes_through_both_tiers_and_what_is_in_ram_comes_first(devices):
    host, device = devices
    store, tensors = make_chain(host, device, host_slots=4, slots=1)
    below = read_below(store, host, experts(0, [1]))
    arriving = store.arrivals(experts(0, [3, 1]))
    assert not host.pending and set(device.pending) == {"expert[0][1]"}
    device.complete_all()
    assert_is_expert(next(arriving), tensors)
    arriving.release()
    assert set(host.pending) == {"expert[0][3]"} and not device.pending
    host.complete_all()
    assert set(device.pending) == {"expert[0][3]"} and arriving.must_wait
    device.complete_all()
    assert_is_expert(next(arriving), tensors)
    arriving.close()
    assert not below.feed.demands, "what was served is forgotten"
    store.check()
    store.close()


def test_a_guess_waits_for_its_part_below_and_others_do_not_wait_for_it(devices):
    host, device = devices
    store, _ = make_chain(host, device, host_slots=6, slots=6)
    absent, there = experts(1, [0, 1])
    read_below(store, host, [there])
    hint(store, [absent, there], 1, 0.5)
    assert set(host.pending) == {"expert[1][0]"} and set(device.pending) == {"expert[1][1]"}
    assert not store.cache.holds(absent)
    device.complete_all()
    assert not device.pending and not store.cache.holds(absent)
    host.complete_all()
    assert set(device.pending) == {"expert[1][0]"}, "it goes on by itself"
    device.complete_all()
    assert store.stats().prefetch_issued == 2 and store.stats().prefetch_issued_bytes == 2 * PART
    store.check()
    store.close()


def test_a_guess_whose_part_is_evicted_below_waits_again(devices):
    host, device = devices
    store, _ = make_chain(host, device, host_slots=1, slots=1)
    leased = store.arrivals(experts(0, [0]))
    host.complete_all()
    device.complete_all()
    next(leased)  # the only slot above
    (guess,) = experts(1, [0])
    below = read_below(store, host, [guess])
    hint(store, [guess], 1, 0.5)
    assert not device.pending
    demand = below.begin(experts(0, [1]))  # a caller of the lower tier takes its only slot
    host.complete_all()
    assert below.next(demand) is not None and not below.holds(guess)
    leased.close()
    assert not device.pending and not host.pending
    store.check()
    store.close()


def test_a_demand_above_makes_a_read_below_urgent(devices):
    host, device = devices
    store, tensors = make_chain(host, device, host_slots=6, slots=2)
    guessed = experts(1, [0])[0]
    hint(store, [guessed], 1, 0.5)
    hint(store, experts(1, [1]), 1, 1.0)
    got: list[Lease] = []
    thread = in_thread(lambda: got.append(store.lease(guessed)))
    wait_for(lambda: store.stats().requests)
    assert store.supply.below is not None
    below = {entry.key: ticket for entry, ticket in store.supply.below._resident.loading()}
    assert below[guessed].priority is Priority.DEMAND
    host.complete_all()
    device.complete_all()
    thread.join(60)
    assert_is_expert(got[0], tensors)
    assert store.supply.below.stats().prefetch_late == 1
    got[0].release()
    store.check()
    store.close()


def test_guesses_below_end_when_the_layer_has_routed_and_only_then(devices):
    host, device = devices
    store, _ = make_chain(host, device, host_slots=6, slots=1)
    below = store.supply.below
    assert below is not None
    guesses = [Hint(i, key, 0, False) for i, key in enumerate(experts(0, range(3)))]
    below.hint(0, guesses, [])
    assert set(host.pending) == {"expert[0][0]"}, "two blocks of a guess are in flight"
    for _ in range(3):
        host.complete(0)
    assert below.holds(guesses[1].key)
    arriving = store.arrivals(experts(0, [0, 1]))  # expert 0 takes the only slot above
    assert not below.stats().prefetch_cancelled, "both are needed"
    host.complete_all()
    assert [below.feed.has(hint.key) for hint in guesses] == [True, True, False]
    device.complete_all()
    arriving.close()
    guess = Hint(9, experts(1, [2])[0], 1, False)
    below.hint(1, [guess], [])
    store.cache.hint(1, [], [])
    assert below.holds(guess.key)
    arriving = store.arrivals(experts(1, [0, 1]))
    assert below.stats().prefetch_cancelled == 1
    host.complete_all()
    device.complete_all()
    arriving.close()
    host.complete_all()
    device.complete_all()
    store.check()
    store.close()


def test_a_caller_of_the_lower_tier_waits_for_what_is_lent(devices):
    host, device = devices
    store, _ = make_chain(host, device, host_slots=1, slots=1)
    arriving = store.arrivals(experts(0, [0]))
    host.complete_all()
    assert device.pending, "the only slot below is lent"
    below = store.supply.below
    assert below is not None
    demand = below.begin(experts(0, [1]))
    got: list[WeightKey] = []

    def wait() -> None:
        entry = below.next(demand)
        assert entry is not None
        got.append(entry.key)
        below.release((entry,))

    thread = in_thread(wait)
    time.sleep(0.01)
    device.complete_all()
    wait_for(lambda: host.pending)
    host.complete_all()
    thread.join(60)
    assert got == experts(0, [1])
    arriving.close()
    store.check()
    store.close()


def test_a_busy_disk_does_not_hold_up_the_link_to_the_device(devices):
    host, device = devices
    store, _ = make_chain(host, device, host_slots=12, slots=4)
    demanded, hinted = experts(0, [0, 1])
    below = read_below(store, host, [demanded, hinted])
    reading = below.begin(experts(1, range(4)))
    assert below.feed.has(hinted) and len(host.pending) == 5, "the link is full, and more waits"
    store.cache.hint(0, [Hint(0, hinted, 1, False)], [])
    assert set(device.pending) == {str(hinted)}
    arriving = store.arrivals([demanded])
    assert set(device.pending) == {str(hinted), str(demanded)}
    host.complete_all()
    device.complete_all()
    arriving.close()
    below.abandon(reading)
    store.check()
    store.close()


def test_leaving_a_visit_ends_the_demands_below(devices):
    host, device = devices
    store, _ = make_chain(host, device, host_slots=8, slots=4)
    arriving = store.arrivals(experts(0, range(4)))
    assert len(host.pending) == 4 + 1
    arriving.close()
    assert not any(store.cache.holds(key) for key in experts(0, range(4)))
    host.complete_all()
    assert len(host.submitted) == 5, "only what was in flight"
    assert not device.submitted
    store.check()
    again = store.arrivals(experts(0, [3]))
    host.complete_all()
    device.complete_all()
    assert next(again).key.index == 3
    again.close()
    store.check()
    store.close()


def test_what_stays_on_the_device_for_good_goes_first_below():
    host, device = (FakeDevice(name=name, delay_s=5e-5) for name in (HOST, "device"))
    store, _ = make_chain(host, device, host_slots=2, slots=12)
    with store.lease(experts(0, [0])[0]), store.lease(experts(2, [0])[0]):
        pass
    below = store.supply.below
    assert below is not None
    below.hint(0, [], [])
    demand = below.begin(experts(2, [3]))  # needed later than layer 0, by the order of use
    assert below.next(demand) is not None
    assert not below.holds(experts(0, [0])[0]) and below.holds(experts(2, [0])[0])
    demand = below.begin(experts(1, [0]))
    assert below.next(demand) is not None
    assert not below.holds(experts(2, [0])[0]), "it is above for good"
    store.check()
    store.close()
    for one in (host, device):
        one.close()


@pytest.mark.parametrize("tier", ["host", "device"])
def test_an_error_of_either_tier_reaches_every_waiter_as_the_same_exception(devices, tier):
    host, device = devices
    store, _ = make_chain(host, device, host_slots=4, slots=4)
    caught: list[Exception] = []

    def wait(key: WeightKey) -> None:
        try:
            store.lease(key)
        except CheckpointError as error:
            caught.append(error)

    threads = [in_thread(partial(wait, key)) for key in experts(0, [0, 1, 2])]
    wait_for(lambda: store.stats().requests.get(Part.EXPERT, 0) == 3)
    failure = CheckpointError("lost")
    if tier == "device":
        host.complete_all()
        device.complete(error=failure)
        device.complete(error=CheckpointError("a later one"))
    else:
        host.complete(error=failure)
    for thread in threads:
        thread.join(60)
    assert [error is failure for error in caught] == [True] * 3
    for again in (store.cache, store.supply.below):
        assert again is not None
        with pytest.raises(CheckpointError) as later:
            again.next(again.begin(experts(0, [3])))
        assert later.value is failure
    host.complete_all()
    device.complete_all()
    store.close()


def test_a_bug_in_a_callback_of_the_upper_tier_reaches_the_waiter():
    class Broken(LeastRecentlyUsed):
        def add(self, key: WeightKey) -> None:
            raise ZeroDivisionError("policy")

    host, device = (FakeDevice(name=name) for name in (HOST, "device"))
    store, _ = make_chain(host, device, host_slots=2, slots=2, policy=Broken())
    with pytest.raises(ZeroDivisionError, match="policy"):
        store.lease(experts(0, [1])[0]).release()
        store.lease(experts(0, [2])[0])
    store.close()
    for one in (host, device):
        one.close()


@pytest.mark.parametrize("seed", range(4))
def test_closing_with_leases_and_copies_under_way_ends_every_waiter(seed):
    host, device = (FakeDevice(name=n, seed=seed, delay_s=0.003) for n in (HOST, "device"))
    store, tensors = make_chain(host, device, host_slots=2, slots=3)
    held = store.lease(experts(0, [0])[0])
    hint(store, experts(2, range(4)), 2)
    ends: list[str] = []

    def wait() -> None:
        try:
            for _ in range(50):
                for lease in store.arrivals(experts(1, range(4))):
                    assert_is_expert(lease, tensors)
        except RuntimeError as error:
            ends.append(str(error))

    thread = in_thread(wait)
    time.sleep(0.004 * seed)
    store.close()
    store.close()
    thread.join(60)
    assert ends == ["the transfer queue is closed"]
    assert store.supply.queue.bytes_in_flight == 0
    assert_is_expert(held, tensors)
    held.release()
    for one in (device, host):
        one.close()


def test_all_slots_leased_is_one_error_not_a_hang():
    host, device = (FakeDevice(name=name, delay_s=5e-5) for name in (HOST, "device"))
    store, _ = make_chain(host, device, host_slots=1, slots=2)
    first, second = (store.lease(key) for key in experts(0, [0, 1]))
    with pytest.raises(BudgetError, match=r"expert\[0\]\[2\].*all 2 of expert"):
        store.lease(experts(0, [2])[0])
    second.release()
    store.lease(experts(0, [2])[0]).release()
    first.release()
    store.check()
    store.close()
    for one in (host, device):
        one.close()


def test_visits_inside_visits_on_few_slots_do_not_hang():
    host, device = (FakeDevice(name=name, delay_s=5e-5) for name in (HOST, "device"))
    store, tensors = make_chain(host, device, host_slots=1, slots=2)
    seen = []
    for outer in store.arrivals(experts(0, range(4))):
        for inner in store.arrivals(experts(1, range(4))):
            assert_is_expert(outer, tensors)
            assert_is_expert(inner, tensors)
            seen.append((outer.key.index, inner.key.index))
    assert sorted(seen) == [(i, j) for i in range(4) for j in range(4)]
    store.check()
    store.close()
    for one in (host, device):
        one.close()


def test_two_devices_take_their_shares_from_one_store_of_the_host():
    host, *devices = (CpuDevice(1, name=name) for name in (HOST, "first", "second"))
    below, tensors = make_store(host, slots=12, policy=LeastRecentlyUsed())
    stores = [
        WeightStore(
            TierSupply(below, Carrier(device)), {Part.EXPERT: 2}, policy=LeastRecentlyUsed()
        )
        for device in devices
    ]
    for layer in range(3):
        for index in range(4):
            with stores[index % 2].lease(WeightKey(Part.EXPERT, layer, index)) as lease:
                assert_is_expert(lease, tensors)
    with stores[0].lease(WeightKey(Part.EXPERT, 0, 1)) as lease:  # the other's, in RAM already
        assert_is_expert(lease, tensors)
    moved = stores[0].stats().link_bytes
    assert moved[Route(HOST, "first")] == 7 * PART and moved[Route(HOST, "second")] == 6 * PART
    assert moved[DISK_TO_HOST] == 12 * FILE_PART
    for store in stores:
        store.check()
        store.close()
    for one in (*devices, host):
        one.close()


def test_no_thread_of_either_device_is_left():
    host, device = CpuDevice(2), CpuDevice(1, name="device")
    store, tensors = make_chain(host, device, host_slots=3, slots=4)
    for layer in range(3):
        for lease in store.arrivals(experts(layer, range(4))):
            assert_is_expert(lease, tensors)
    store.check()
    assert isinstance(store, WeightStore)
    store.close()
    device.close()
    host.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(("disk", "to device"))]

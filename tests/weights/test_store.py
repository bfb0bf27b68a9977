"""The weight store: leases, arrivals, prefetch, errors, on a device that completes late and out of
order, and over real files."""

import gc
import json
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fakes import FakeDevice, FakeSource, expert_layout, expert_tensors, experts
from lru import LeastRecentlyUsed
from stores import OPERATIONS, assert_is_expert, hint, is_equal, make_store, operate
from windlass.checkpoint.part_reads import ByteRange, merge_ranges, slot_bytes
from windlass.checkpoint.reader import Checkpoint
from windlass.device.cpu import CpuDevice
from windlass.errors import BudgetError, CheckpointError
from windlass.ids import Part, WeightKey
from windlass.models.names import Layout, Piece, Reshape, Take, Transpose
from windlass.prefetch.policies import FarthestNextUse
from windlass.trace import Tracer
from windlass.weights.store import Lease, WeightStore
from windlass.weights.supply import FileSupply
from windlass.weights.transfer import Carrier


def test_leases_hold_the_bytes_of_the_file_whatever_the_number_of_slots():
    for slots in (1, 2, 5, 12):
        device = FakeDevice(seed=slots)
        store, tensors = make_store(device, slots=slots)
        for _ in range(2):
            for layer in range(3):
                seen = []
                for lease in store.arrivals(experts(layer, range(4))):
                    assert_is_expert(lease, tensors)
                    seen.append(lease.key.index)
                store.check()
                assert sorted(seen) == [0, 1, 2, 3]
        stats = store.stats()
        assert stats.requests[Part.EXPERT] == 24
        assert store.cache.fits(Part.EXPERT) == (slots == 12)
        if slots == 12:
            assert stats.hits[Part.EXPERT] == 12 and stats.evictions == 0
        store.close()
        device.close()


def test_resident_parts_come_first_then_in_arrival_order():
    device = FakeDevice(manual=True, num_lanes=40)
    store, _ = make_store(device, slots=8)
    waiting = threading.Thread(target=lambda: store.lease(experts(0, [2])[0]).release())
    waiting.start()
    while not device.pending:
        time.sleep(0.001)
    device.complete_all()
    waiting.join()
    arriving = store.arrivals(experts(0, [0, 1, 2, 3]))
    assert next(arriving).key.index == 2
    while "expert[0][3]" in device.pending:
        device.complete(device.pending.index("expert[0][3]"))
    assert next(arriving).key.index == 3
    device.complete_all()
    assert {next(arriving).key.index, next(arriving).key.index} == {0, 1}
    with pytest.raises(StopIteration):
        next(arriving)
    store.check()
    store.close()


def test_what_is_there_comes_at_once_and_what_arrives_together_too():
    device = FakeDevice(manual=True, num_lanes=40)
    store, tensors = make_store(device, slots=8)
    first = store.arrivals(experts(0, [1, 3]))
    device.complete_all()
    assert len(first.all()) == 2
    first.close()
    arriving = store.arrivals(experts(0, [0, 1, 2, 3]))
    assert arriving.has_ready
    assert [lease.key.index for lease in arriving.group(8)] == [1, 3]
    assert not arriving.has_ready
    device.complete_all()
    late = arriving.group(8)
    assert {lease.key.index for lease in late} == {0, 2}
    for lease in late:
        assert_is_expert(lease, tensors)
    assert arriving.group(8) == []
    again = store.arrivals(experts(0, [0, 1, 2, 3]))
    assert [len(again.group(3)) for _ in range(3)] == [3, 1, 0]
    store.check()
    store.close()


def test_nothing_is_visible_before_it_arrived():
    device = FakeDevice(manual=True)
    store, tensors = make_store(device)
    got: list[Lease] = []
    thread = threading.Thread(target=lambda: got.append(store.lease(experts(1, [1])[0])))
    thread.start()
    while not device.pending:
        time.sleep(0.001)
    while len(device.pending) > 1 or len(device.submitted) < 4:  # 61 KiB in blocks of 16
        device.complete(len(device.pending) - 1)
    assert not got
    device.complete_all()
    thread.join()
    assert_is_expert(got[0], tensors)
    store.close()


def test_a_released_lease_cannot_be_read():
    device = FakeDevice()
    store, _ = make_store(device)
    with store.lease(experts(0, [0])[0]) as lease:
        assert set(lease.tensors) == {"gate", "up", "down"}
    with pytest.raises(AssertionError, match="after its lease was released"):
        _ = lease.tensors
    store.close()
    device.close()


def test_a_leased_slot_is_never_taken():
    device = FakeDevice()
    store, tensors = make_store(device, slots=2)
    with store.lease(experts(0, [0])[0]) as held:
        for layer in range(3):
            for lease in store.arrivals(experts(layer, range(4))):
                assert_is_expert(lease, tensors)
                assert_is_expert(held, tensors)
        store.check()
    store.close()
    device.close()


def test_all_slots_leased_is_one_error_not_a_hang():
    device = FakeDevice()
    store, _ = make_store(device, slots=2)
    first, second = (store.lease(key) for key in experts(0, [0, 1]))
    with pytest.raises(BudgetError, match=r"expert\[0\]\[2\].*all 2 of expert"):
        store.lease(experts(0, [2])[0])
    second.release()
    store.lease(experts(0, [2])[0]).release()
    first.release()
    store.check()
    store.close()
    device.close()


def test_visits_inside_visits_on_few_slots_do_not_hang():
    device = FakeDevice()
    store, tensors = make_store(device, slots=2)
    seen = []
    for outer in store.arrivals(experts(0, range(4))):
        for inner in store.arrivals(experts(1, range(4))):
            assert_is_expert(outer, tensors)
            assert_is_expert(inner, tensors)
            seen.append((outer.key.index, inner.key.index))
    assert sorted(seen) == [(i, j) for i in range(4) for j in range(4)]
    store.check()
    store.close()
    device.close()


def test_leaving_a_visit_early_frees_everything():
    device = FakeDevice()
    store, tensors = make_store(device, slots=2)
    for lease in store.arrivals(experts(0, range(4))):
        assert_is_expert(lease, tensors)
        break
    del lease
    gc.collect()
    both = [store.lease(key) for key in experts(0, [1, 2])]  # the slot of the lost lease is back
    for held in both:
        held.release()
    arriving = store.arrivals(experts(1, range(4)))
    next(arriving)
    arriving.close()
    for key in experts(2, range(4)):
        store.lease(key).release()
    device.synchronize()
    store.check()
    store.close()
    device.close()


def test_prefetch_goes_on_by_itself_and_is_used():
    device = FakeDevice()
    store, tensors = make_store(device, slots=8)
    with store.lease(experts(0, [0])[0]):
        hint(store, experts(1, range(4)), 1)
        deadline = time.monotonic() + 120
        while store.stats().bytes_read < 5 * 61440 and time.monotonic() < deadline:
            time.sleep(0.001)  # the owner does nothing for the store
        device.synchronize()
        assert store.stats().prefetch_issued == 4
    for lease in store.arrivals(experts(1, range(4))):
        assert_is_expert(lease, tensors)
    assert store.stats().prefetch_used == 4
    assert store.stats().hits[Part.EXPERT] == 4
    store.close()
    device.close()


def test_prefetch_never_evicts_what_is_needed_sooner_or_held():
    device = FakeDevice()
    store, _ = make_store(device, slots=4)
    assert len(list(store.arrivals(experts(0, range(4))))) == 4
    # All slots hold layer 0, just used: three layers away. Layer 1 is sooner, so it may come in.
    hint(store, experts(1, [0, 1]), 1)
    device.synchronize()
    assert store.stats().evictions == 2
    # Layer 2 would have to push out layer 1; only what is left of layer 0 may go.
    hint(store, experts(2, range(4)), 2)
    device.synchronize()
    assert store.stats().evictions == 4
    hits = store.stats().hits[Part.EXPERT] if Part.EXPERT in store.stats().hits else 0
    for lease in store.arrivals(experts(1, [0, 1])):
        store.check()
        assert lease.key.layer == 1
    assert store.stats().hits[Part.EXPERT] == hits + 2
    store.close()
    device.close()


def test_a_demand_overtakes_speculation():
    device = FakeDevice(manual=True, num_lanes=3)  # four blocks in flight, two of speculation
    store, tensors = make_store(device, slots=6)
    hint(store, experts(1, range(4)), 1, 0.5)
    assert len(device.pending) == 2
    got: list[Lease] = []
    thread = threading.Thread(target=lambda: got.append(store.lease(experts(0, [0])[0])))
    thread.start()
    while not store.stats().requests:
        time.sleep(0.001)
    order = []
    while not got:
        if device.pending:
            order.append(device.complete(0))
        else:
            time.sleep(0.001)
    assert order[:2] == ["expert[1][0]"] * 2  # in flight already
    assert order[2:6] == ["expert[0][0]"] * 4
    device.complete_all()
    assert_is_expert(got[0], tensors)
    thread.join()
    store.check()
    store.close()


def test_speculation_whose_turn_has_passed_is_given_up_and_can_be_demanded_again():
    device = FakeDevice(manual=True, num_lanes=3)
    store, tensors = make_store(device, slots=2)
    hint(store, experts(1, [0, 1]), 1, 0.5)
    assert device.pending == ["expert[1][0]"] * 2
    assert store.cache.holds(experts(1, [0])[0]) and not store.cache.holds(experts(1, [1])[0])
    store.cache.hint(1, [], [])
    assert store.stats().prefetch_cancelled == 0, "its turn is now"
    store.cache.hint(2, [], experts(1, [1]))
    assert store.stats().prefetch_cancelled == 1
    got: list[Lease] = []
    thread = threading.Thread(target=lambda: got.append(store.lease(experts(1, [0])[0])))
    thread.start()
    while not store.stats().requests:
        time.sleep(0.001)
    while not got:
        if device.pending:
            device.complete(0)
        else:
            time.sleep(0.001)
    thread.join()
    assert_is_expert(got[0], tensors)
    got[0].release()
    store.check()
    store.close()


def test_a_visit_left_early_does_not_read_on():
    device = FakeDevice(manual=True, num_lanes=1)
    store, _ = make_store(device, slots=4)
    store.arrivals(experts(0, range(4))).close()
    device.complete_all()
    assert len(device.submitted) == 2, "only what was in flight"
    store.check()
    store.close()


def test_speculation_that_is_demanded_is_finished_before_later_demands():
    device = FakeDevice(manual=True, num_lanes=1)
    store, _ = make_store(device, slots=4)
    first, second = experts(0, [0, 1])
    hint(store, [first], 1, 0.5)
    demand = store.arrivals([first, second])
    device.complete_all()
    labels = [copy.label for copy in device.submitted]
    assert labels == ["expert[0][0]"] * 4 + ["expert[0][1]"] * 4
    demand.close()
    store.check()
    store.close()


def test_an_error_of_a_read_reaches_every_waiter_as_the_same_exception():
    device = FakeDevice(manual=True)
    store, _ = make_store(device)
    caught: list[Exception] = []

    def wait(key: WeightKey) -> None:
        try:
            store.lease(key)
        except CheckpointError as error:
            caught.append(error)

    threads = [threading.Thread(target=wait, args=(key,)) for key in experts(0, [0, 1, 2])]
    for thread in threads:
        thread.start()
    while store.stats().requests.get(Part.EXPERT, 0) < 3:
        time.sleep(0.001)
    failure = CheckpointError("shard: gone")
    device.complete(error=failure)
    for thread in threads:
        thread.join(120)
    assert [error is failure for error in caught] == [True] * 3
    with pytest.raises(CheckpointError) as later:
        store.lease(experts(0, [3])[0])
    assert later.value is failure
    device.complete_all()
    store.close()


def test_a_bug_in_a_callback_reaches_the_waiter():
    class Broken(FarthestNextUse):
        def add(self, key: WeightKey) -> None:
            raise ZeroDivisionError("policy")

    device = FakeDevice()
    store, _ = make_store(device, policy=Broken(3))
    hint(store, experts(0, [0]), 1)
    with pytest.raises(ZeroDivisionError, match="policy"):
        for _ in range(1000):
            store.lease(experts(0, [1])[0])
            time.sleep(0.001)
    store.close()
    device.close()


def test_parts_without_slots_are_refused():
    device = FakeDevice()
    with pytest.raises(BudgetError, match="slots for expert: got 0"):
        make_store(device, slots=0)
    device.close()


@settings(max_examples=60, deadline=None)
@given(operations=OPERATIONS, slots=st.integers(1, 12), seed=st.integers(0, 9), lru=st.booleans())
def test_random_operations_keep_the_invariants_and_the_bytes(operations, slots, seed, lru):
    device = FakeDevice(seed=seed, num_lanes=1 + seed % 3, delay_s=0.00005)
    policy = LeastRecentlyUsed() if lru else FarthestNextUse(3)
    store, tensors = make_store(device, slots=slots, policy=policy)
    try:
        operate(operations, store, tensors, slots)
        device.synchronize()
        store.check()
    finally:
        store.close()
        device.close()


# --- over real files ------------------------------------------------------------------------------


def test_real_files_views_and_rows(tmp_path: Path):
    torch.manual_seed(0)
    fused = torch.randn(2, 6, 8).to(torch.float16)
    norm = torch.randn(8)
    table = torch.randn(3000, 64).bfloat16()
    save_file({"fused": fused, "norm": norm, "table": table}, tmp_path / "model.safetensors")
    parts = {
        WeightKey(Part.EXPERT, 0, 1): (
            Piece("gate", "fused", 48, 96, (6, 8), (Take(0, 0, 6, 2),)),
            Piece("up", "fused", 48, 96, (6, 8), (Take(0, 1, 6, 2), Transpose())),
            Piece("wide", "fused", 48, 96, (6, 8), (Reshape((3, 2, 8)),)),
        ),
        WeightKey(Part.FINAL): (Piece("norm.weight", "norm", 0, 8, (8,)),),
        WeightKey(Part.EMBED): (Piece("weight", "table", 0, 3000 * 64, (3000, 64)),),
    }
    source = Checkpoint(tmp_path)
    device = CpuDevice(3)
    supply = FileSupply(Layout(parts, ()), source, Carrier(device))
    store = WeightStore(supply, {Part.EXPERT: 1, Part.FINAL: 1}, policy=FarthestNextUse(1))
    with store.lease(WeightKey(Part.EXPERT, 0, 1)) as lease:
        assert is_equal(lease.tensors["gate"], fused[1][0::2])
        assert is_equal(lease.tensors["up"], fused[1][1::2].T)
        assert is_equal(lease.tensors["wide"], fused[1].view(3, 2, 8))
    with store.lease(WeightKey(Part.FINAL)) as lease:
        assert is_equal(lease.tensors["norm.weight"], norm)
    before = store.stats()
    for rows in ([7, 2999, 0, 7, 1500], [3], list(range(0, 3000, 5)), []):
        assert torch.equal(store.read_rows(WeightKey(Part.EMBED), rows), table[rows])
    assert store.stats().bytes_read - before.bytes_read < 450_000, "a page is read once"
    store.check()
    store.close()
    device.close()
    source.close()


def test_odd_offsets_are_copied_once_per_lease(tmp_path: Path):
    weight = torch.randn(5, 7)
    data = weight.numpy().tobytes()
    header = b'{"pad":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
    header += b'"w":{"dtype":"F32","shape":[5,7],"data_offsets":[3,143]}}'
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"abc" + data
    )
    key = WeightKey(Part.BLOCK, 0)
    layout = Layout({key: (Piece("w", "w", 0, 35, (5, 7)),)}, ("pad",))
    source = Checkpoint(tmp_path)
    assert (source.tensors["w"].begin) % 4
    device = CpuDevice(1)
    supply = FileSupply(layout, source, Carrier(device))
    store = WeightStore(supply, {Part.BLOCK: 1}, policy=FarthestNextUse(1))
    for _ in range(2):
        with store.lease(key) as lease:
            assert is_equal(lease.tensors["w"], weight)
            copied = weakref.ref(lease.tensors["w"])
        assert copied() is None, "copies are not in the budget: they end with the lease"
    store.close()
    device.close()
    source.close()


def test_neighbours_are_one_read_and_strangers_are_not():
    tensors = {name: torch.randn(10) for name in "ab"}
    tensors |= {"big": torch.zeros(100_000), "c": torch.randn(10)}  # 400 kB between b and c
    source = FakeSource(tensors)
    key = WeightKey(Part.BLOCK, 0)
    pieces = [Piece(name, name, 0, 10, (10,)) for name in ("a", "b")]
    assert slot_bytes(Layout({key: tuple(pieces)}, ()), source.tensors) == {Part.BLOCK: 4096}
    pieces.append(Piece("c", "c", 0, 10, (10,)))
    layout = Layout({key: tuple(pieces)}, ())
    assert slot_bytes(layout, source.tensors) == {Part.BLOCK: 8192}
    device = FakeDevice()
    supply = FileSupply(layout, source, Carrier(device))
    store = WeightStore(supply, {Part.BLOCK: 1}, policy=FarthestNextUse(1))
    with store.lease(key) as lease:
        for name in "abc":
            assert is_equal(lease.tensors[name], tensors[name])
    store.close()
    device.close()


def test_ranges_are_merged_by_their_gap():
    def merge(gap_bytes: int, *pages: int) -> list[tuple[int, int, int]]:
        spans = [ByteRange("f", page * 4096 + 5, page * 4096 + 9) for page in pages]
        return [(r[1], r[2], r[3]) for r in merge_ranges(spans, gap_bytes=gap_bytes)]

    assert merge(0, 3, 1, 2) == [(4096, 3 * 4096, 0)], "touching pages"
    assert merge(0, 1, 3) == [(4096, 4096, 0), (3 * 4096, 4096, 4096)]
    assert merge(4097, 1, 3) == [(4096, 3 * 4096, 0)]


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (
            Piece("w", "absent", 0, 4, (4,)),
            r"tensor absent: expected for w of block\[0\], found no",
        ),
        (
            Piece("w", "a", 0, 11, (11,)),
            r"tensor a: expected elements 0 to 11 .*found shape \[10\]",
        ),
    ],
)
def test_what_the_checkpoint_lacks_is_named_before_any_read(piece: Piece, expected: str):
    source = FakeSource({"a": torch.ones(10)})
    with pytest.raises(CheckpointError, match=expected):
        slot_bytes(Layout({WeightKey(Part.BLOCK, 0): (piece,)}, ()), source.tensors)


def test_a_file_that_shrinks_or_vanishes_during_the_run_is_one_error(tmp_path: Path):
    tensors = expert_tensors(2, 4, rows=64, columns=160)
    for spoil in ("shrink", "delete", "overwrite"):
        folder = tmp_path / spoil
        folder.mkdir()
        path = folder / "model.safetensors"
        save_file(tensors, path)
        source, device = Checkpoint(folder), CpuDevice(2)
        supply = FileSupply(expert_layout(tensors), source, Carrier(device))
        store = WeightStore(supply, {Part.EXPERT: 1}, policy=FarthestNextUse(2))
        store.lease(experts(0, [0])[0]).release()
        if spoil == "shrink":
            with path.open("r+b") as stream:
                stream.truncate(100_000)
        elif spoil == "delete":
            path.unlink()
        else:
            time.sleep(0.01)  # clocks of file systems tick slowly
            with path.open("r+b") as stream:
                stream.write(b"\0")
        expected = {
            "shrink": r"model\.safetensors: expected \d+ bytes, found 100000",
            "delete": r"model\.safetensors: expected to stay, found deleted",
            "overwrite": r"model\.safetensors: .*written to",
        }
        with pytest.raises(CheckpointError, match=expected[spoil]):
            for key in experts(1, range(4)):
                store.lease(key).release()
        store.close()
        device.close()
        source.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("disk")]


def test_the_trace_shows_every_block_on_its_lane(tmp_path: Path):
    tensors = expert_tensors(1, 2, rows=64, columns=160)
    save_file(tensors, tmp_path / "model.safetensors")
    tracer = Tracer(tmp_path / "trace.json")
    source, device = Checkpoint(tmp_path), CpuDevice(2, tracer=tracer)
    supply = FileSupply(expert_layout(tensors), source, Carrier(device, 16384), tracer=tracer)
    store = WeightStore(supply, {Part.EXPERT: 2}, policy=FarthestNextUse(1))
    for lease in store.arrivals(experts(0, [0, 1])):
        assert_is_expert(lease, tensors)
    store.close()
    device.close()
    tracer.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    spans = [event for event in events if event["ph"] == "X"]
    assert {span["name"] for span in spans} == {"expert[0][0]", "expert[0][1]"}
    assert sum(span["args"]["bytes"] for span in spans) == store.stats().bytes_read
    assert len(spans) == store.stats().reads
    lanes = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert lanes <= {"disk 0", "disk 1", "counters"}
    source.close()

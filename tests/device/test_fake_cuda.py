"""The fake GPU finds what a real one would do wrong now and then, whatever the moment: its own
tests."""

import pytest
import torch

from fake_cuda import FakeCuda, on_device
from fake_streams import Deadlock, FakeEvent, Race
from fakes import FakeSource
from windlass.device.base import ALIGN_BYTES, Copy, FileRange
from windlass.kernels.reference import TorchKernels

SEEDS = range(10)
WIDTH = 4


def pin(device: FakeCuda, values: torch.Tensor) -> torch.Tensor:
    return device.streams.pinned(values).copy_(values)


def scene(device: FakeCuda, *, without: str = "") -> torch.Tensor:
    """Eight matrices through two slots, and the sum of what they make of ones, read by the host."""
    s, first = device.streams, None
    used: list[FakeEvent | None] = [None, None]
    matrices = [pin(device, torch.full((WIDTH, WIDTH), float(i))) for i in range(8)]
    slots, back = device.empty(2, WIDTH, WIDTH), s.pinned(torch.empty(1, WIDTH))
    ones = device.tensor(torch.ones(1, WIDTH), dtype=torch.float32)
    total = device.zeros(1, WIDTH)
    for i, matrix in enumerate(matrices):
        slot, last = slots[i % 2], used[i % 2]
        if last is not None and without != "reuse":
            s.down.wait(last)
        with s.on(s.down):
            slot.copy_(matrix, non_blocking=True)
        there = s.down.record()
        first = first or there
        if without != "arrival":
            s.compute.wait(first if without == "the right event" else there)
        with s.on(s.compute):
            total.add_(ones @ slot.t())
        used[i % 2] = s.compute.record()
    if without != "result":
        s.up.wait(s.compute.record())
    with s.on(s.up):
        back.copy_(total, non_blocking=True)
    over = s.up.record()
    if without != "synchronisation":
        over.synchronize()
    return back.clone()


@pytest.mark.parametrize("late", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_ordered_is_no_race_and_gives_the_sum(seed, late):
    device = FakeCuda(seed=seed, late=late)
    with device.watched():
        assert scene(device).tolist() == [[28.0 * WIDTH] * WIDTH]
    assert not device.memory.races and device.num_copies == 10


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("without", "race"),
    [
        ("reuse", "a copy on down writes .* which aten::.* on compute reads"),
        ("arrival", "aten::.* on compute reads .* which a copy on down writes"),
        ("the right event", "aten::.* on compute reads .* which a copy on down writes"),
        ("result", "a copy on up reads .* which aten::add_ on compute writes"),
        ("synchronisation", "aten::clone on host reads .* which a copy on up writes"),
    ],
)
def test_any_wait_left_out_is_a_race_whatever_the_moment(without, race, seed):
    device = FakeCuda(seed=seed)
    with device.watched(), pytest.raises(Race, match=race):
        scene(device, without=without)
    assert len(device.memory.races) == 1


def test_memory_holds_poison_until_a_copy_has_come():
    device = FakeCuda(late=1.0)
    s = device.streams
    with device.watched():
        into = device.empty(WIDTH)
        device.order.run_until(lambda: not s.down.queue)
        with s.on(s.down):
            into.copy_(pin(device, torch.ones(WIDTH)), non_blocking=True)
    assert into.isnan().all()
    device.synchronize()
    assert into.eq(1).all()


def test_the_host_may_not_change_what_a_copy_has_yet_to_read():
    device = FakeCuda()
    s = device.streams
    with device.watched():
        source, into = pin(device, torch.ones(WIDTH)), device.empty(WIDTH)
        with s.on(s.down):
            into.copy_(source, non_blocking=True)
        with pytest.raises(Race, match="aten::zero_ on host writes .* a copy on down reads"):
            source.zero_()
        s.down.record().synchronize()
        source.zero_()


def test_bytes_that_nothing_shares_may_be_used_at_once():
    device = FakeCuda()
    s = device.streams
    with device.watched():
        both = device.empty(2, WIDTH)
        with s.on(s.down):
            both[0].copy_(pin(device, torch.ones(WIDTH)), non_blocking=True)
        with s.on(s.compute):
            both[1].zero_()
            with pytest.raises(Race):
                both.sum()


LOOKS = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0].item(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: x.__array__(),
    "float": lambda x: float(x[0]),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("look", LOOKS)
def test_the_host_may_not_look_into_the_device(look):
    device = FakeCuda()
    s = device.streams
    with device.watched(), s.on(s.compute):
        x = device.zeros(WIDTH)
        with pytest.raises(Race, match="the host looks"):
            LOOKS[look](x)
        with device.in_kernel():
            LOOKS[look](x)
        (copy,) = s.on_host(x)
        LOOKS[look](copy)


def test_kernels_work_on_tensors_of_the_device_on_a_stream():
    device = FakeCuda()
    s, host = device.streams, torch.ones(WIDTH)
    with device.watched():
        x = device.zeros(WIDTH)
        with pytest.raises(Race, match="on no stream"):
            x + x
        with s.on(s.compute):
            with pytest.raises(Race, match="a tensor of the host"):
                x + host
            with pytest.raises(Race, match="a tensor of the host"):
                x[[0, 1]]
            with pytest.raises(Race, match="a tensor of the host"):
                x + torch.arange(WIDTH)
            with pytest.raises(Race, match="not pinned"):
                x.copy_(host)
            with pytest.raises(Race, match="waits for an upload"):
                x.new_tensor([0, 1], dtype=torch.int64)
            x[device.tensor([0, 1], dtype=torch.int64)] = 2.0  # one number is handed over
            with device.in_kernel():
                x += torch.arange(WIDTH)
        assert s.on_host(x)[0].tolist() == [2.0, 3.0, 2.0, 3.0]
        assert (host + host).tolist() == [2.0] * WIDTH, "the host's own is the host's"


def test_kernels_are_made_and_called_on_the_device():
    device = FakeCuda()
    kernels = on_device(device, TorchKernels)
    s = device.streams
    with device.watched(), s.on(s.compute):
        x = device.tensor(torch.ones(2, WIDTH), dtype=torch.float32)
        got = kernels.linear(x, x)
        assert kernels.name == "torch" and device.is_here(got)
        assert s.on_host(got)[0].tolist() == [[WIDTH] * 2] * 2


def test_who_waits_for_what_cannot_come_is_told():
    device = FakeCuda()
    s = device.streams
    never = FakeEvent(device.order, s.down)
    never.is_over = False
    with pytest.raises(Deadlock, match="the host waits"):
        device.wait()
    s.compute.wait(never)
    with pytest.raises(Deadlock, match="waiting: compute"):
        s.compute.record().synchronize()


def test_a_seed_gives_the_same_order_again():
    def moments(seed: int) -> list[int]:
        """What of copies is to be done after each that was asked for."""
        device = FakeCuda(seed=seed, late=0.5)
        s, found = device.streams, []
        with device.watched():
            source, into = pin(device, torch.ones(20)), device.empty(20)
            for i in range(20):
                with s.on(s.down):
                    into[i : i + 1].copy_(source[i : i + 1], non_blocking=True)
                found.append(len(s.down.queue))
        return found

    assert moments(3) == moments(3)
    assert len({tuple(moments(seed)) for seed in SEEDS}) > 5


@pytest.mark.parametrize("waits", [True, False])
def test_memory_of_the_host_may_be_read_into_when_a_copy_has_read_it(waits):
    """A tier of the host below the device: files are read into its slots again."""
    device = FakeCuda(name="device", late=1.0)
    files = FakeSource({"x": torch.arange(2048, dtype=torch.float32)})
    host, there = device.below.allocate(ALIGN_BYTES), device.allocate(ALIGN_BYTES)
    ends: list[Exception | None] = []
    with device.watched():
        device.below.submit(Copy(FileRange(files, "fake", 0, ALIGN_BYTES), host, "1"), ends.append)
        device.wait()
        device.submit(Copy(host, there, "2"), ends.append)
        if waits:
            device.synchronize()
        again = FileRange(files, "fake", ALIGN_BYTES, ALIGN_BYTES)
        device.below.submit(Copy(again, host, "3"), ends.append)
        device.below.synchronize()
        device.synchronize()
    if waits:
        assert ends == [None] * 3 and not device.memory.races
        assert there.data.view(torch.float32)[-1] == 1023
        assert host.data.view(torch.float32)[0] == 1024
    else:
        assert "a read on host writes" in str(ends[1]) and len(device.memory.races) == 1

"""What is asked of torch about GPUs, where there is none and where there are some."""

import threading

import pytest
import torch

from fake_torch_cuda import FakeTorchCuda, fake_cuda
from windlass.device.base import Copy
from windlass.device.cuda import CudaDevice, CudaHost, cuda_index
from windlass.device.cuda_graphs import CudaGraphs
from windlass.device.cuda_rates import find_cuda
from windlass.device.streams import OVER
from windlass.errors import BudgetError, UsageError
from windlass.ids import Route

CPU, META = torch.device("cpu"), torch.device("meta")
__all__ = ["fake_cuda"]  # a fixture


def machine(monkeypatch: pytest.MonkeyPatch, count: int, cuda: str | None = "13.0") -> None:
    """As if torch had `count` GPUs and was built for `cuda`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    ("name", "index"), [("auto", 0), ("cpu", None), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_names_of_gpus(monkeypatch, name, index):
    machine(monkeypatch, 2)
    assert cuda_index(name) == index


def test_a_gpu_that_is_not_there_is_one_error(monkeypatch):
    machine(monkeypatch, 0)
    assert cuda_index("auto") is None and find_cuda("auto") is None
    with pytest.raises(
        UsageError, match=r"device: got 'cuda', allowed auto or cpu: torch .* \(CUDA"
    ):
        cuda_index("cuda")
    machine(monkeypatch, 0, cuda=None)
    with pytest.raises(UsageError, match="device: got 'cuda:1', .* is built without CUDA"):
        find_cuda("cuda:1")
    machine(monkeypatch, 1)
    with pytest.raises(UsageError, match="got 'cuda:1', allowed cuda:0: torch finds 1 of them"):
        cuda_index("cuda:1")
    machine(monkeypatch, 3)
    with pytest.raises(UsageError, match="got 'cuda:3', allowed cuda:0 to cuda:2: torch finds 3"):
        cuda_index("cuda:3")


# --- what is asked of torch.cuda ------------------------------------------------------------------


@pytest.fixture
def device(fake_cuda):
    made = CudaDevice(CPU)
    yield made
    made.close()


def copied(device: CudaDevice, copy: Copy) -> Exception | None:
    told: list[Exception | None] = []
    over = threading.Event()

    def done(error: Exception | None) -> None:
        told.append(error)
        over.set()

    device.submit(copy, done)
    assert over.wait(10)
    device.synchronize()
    return told[0]


def test_a_copy_waits_for_the_slot_and_is_told_by_a_sleeping_thread(fake_cuda, device):
    host = CudaHost(1, CPU)
    source, into = host.allocate(20000), device.allocate(20000)
    source.data.copy_(torch.arange(20000) % 251)
    into.last_use = device.streams.compute.record()
    del fake_cuda.calls[:]
    assert copied(device, Copy(source.part(4096, 9000), into.part(256, 9000), "part")) is None
    assert torch.equal(into.data[256:9256], source.data[4096:13096])
    assert fake_cuda.calls == [("wait", "down", "compute"), ("record", "down", True)]
    assert Copy(source, into, "part").route == Route("host", "device")
    assert device.busy_s > 0
    host.close()


def test_an_error_of_a_copy_is_told_whenever_it_comes(fake_cuda, device, monkeypatch):
    host = CudaHost(1, CPU)
    copy = Copy(host.allocate(4096), device.allocate(4096), "part")
    fake_cuda.failing = "an illegal address"
    assert str(copied(device, copy)) == "an illegal address"
    fake_cuda.failing = ""
    monkeypatch.setattr(device.streams.down, "record", lambda: 1 // 0)
    assert isinstance(copied(device, copy), ZeroDivisionError)
    device.close()
    device.close()
    with pytest.raises(RuntimeError, match="copy of part submitted to a closed device"):
        device.submit(copy, lambda error: None)
    host.close()


def test_memory_of_the_host_is_registered_in_steps_and_given_back(fake_cuda: FakeTorchCuda):
    host = CudaHost(1, CPU)
    memory = host.allocate(20000)
    begin = memory.whole.data_ptr()
    assert fake_cuda.registered == {begin: 8192, begin + 8192: 8192, begin + 16384: 4096}
    host.allocate(100)
    assert len(fake_cuda.registered) == 4
    host.close()
    host.close()
    assert not fake_cuda.registered


def test_refused_pinning_is_said_once_and_memory_is_there_all_the_same(fake_cuda, caplog):
    fake_cuda.lockable = 10000
    host = CudaHost(1, CPU)
    memory = host.allocate(20000)
    assert memory.num_bytes == 20000 and len(fake_cuda.registered) == 1
    host.allocate(4096)
    (said,) = caplog.messages
    assert said.startswith("host memory: the system lets the GPU reach 8.00 KiB and no more (error")
    assert not fake_cuda.pending, "the error was left for the next launch"
    host.close()
    fake_cuda.pins = False
    device = CudaDevice(CPU)
    assert not device.streams.pins and not fake_cuda.pending
    assert caplog.messages[1] == (
        "host memory: copies from the GPU are slower: CUDA error: no pinning"
    )
    device.close()


def test_tensors_are_made_on_a_stream_of_the_device(fake_cuda, device):
    del fake_cuda.calls[:]
    device.zeros(2, 3)
    with device.streams.on(device.streams.up):
        device.empty(4, dtype=torch.int64)
    with device.streams.on(device.streams.compute):
        device.empty(4)
    made = [call for call in fake_cuda.calls if call[0] == "empty"]
    assert made == [("empty", "compute"), ("empty", "up"), ("empty", "compute")]
    assert device.tensor([1, 2], dtype=torch.int64).tolist() == [1, 2]
    there = CudaDevice.tensor(_on(device, META), torch.arange(3), dtype=torch.float32)
    assert there.device == META and there.dtype == torch.float32
    again = CudaDevice.tensor(_on(device, META), there, dtype=torch.float32)
    assert again is there


def _on(device: CudaDevice, place: torch.device) -> CudaDevice:
    device.device = place
    return device


def test_what_is_taken_to_the_host_waits_for_compute(fake_cuda, device):
    x = torch.arange(6.0).view(2, 3).t()
    del fake_cuda.calls[:]
    (found,) = device.streams.on_host(x)
    assert torch.equal(found, x) and found is not x
    assert fake_cuda.calls == [
        ("record", "compute", False), ("wait", "up", "compute"), ("record", "up", False),
    ]  # fmt: skip
    device.streams.up.wait(OVER)
    with pytest.raises(AssertionError, match="an event of no stream"):
        device.streams.up.wait(object())


def test_the_budget_is_a_share_of_the_device_until_it_is_closed(fake_cuda, device):
    assert device.usage() == (8 << 30, 1 << 30, 5 << 20)
    assert ("empty_cache",) in fake_cuda.calls
    device.limit(2 << 30)
    assert fake_cuda.fraction == 0.25
    assert device.peak_bytes() == (1 << 30) - (5 << 20) + (6 << 20)
    device.limit(9 << 30)
    assert fake_cuda.fraction == 1.0
    device.limit(-1)
    assert fake_cuda.fraction == 0.0
    device.close()
    assert fake_cuda.fraction == 1.0


def test_a_gpu_that_computes_nothing_fails_at_once(fake_cuda):
    fake_cuda.pending = "no kernel image"
    with pytest.raises(RuntimeError, match="no kernel image"):
        CudaDevice(CPU)
    assert "down" not in {thread.name for thread in threading.enumerate()}


def test_too_little_memory_is_one_error(device, monkeypatch):
    def refuse(*shape, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 KiB. GPU 0 has...")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(BudgetError, match="no room for 8.00 KiB at once: .* Tried to allocate 8"):
        device.allocate(5000)


def test_a_graph_is_captured_on_the_stream_of_kernels_and_ended_whatever_happens(device, fake_cuda):
    graphs, calls = CudaGraphs(CPU), fake_cuda.calls
    with device.streams.on(device.streams.compute):
        calls.clear()
        graph, result = graphs.capture(lambda: calls.append(("body",)) or 5)
        graph.replay()
        begun = ("capture", "compute", (0, 7), "thread_local")
        assert result == 5
        assert calls == [begun, ("body",), ("captured",), ("replay", "compute")]
        calls.clear()
        with pytest.raises(ZeroDivisionError):
            graphs.capture(lambda: 1 / 0)
        assert calls == [begun, ("captured",)]
        fake_cuda.failing = "CUDA error: operation not permitted"
        with pytest.raises(RuntimeError, match="not permitted"):
            graphs.capture(lambda: None)
        fake_cuda.failing = ""

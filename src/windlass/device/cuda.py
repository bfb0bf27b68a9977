"""A CUDA device as torch has it, and memory of the host that it reaches. As little as can be: what
can be decided elsewhere is, where it is tested without a GPU."""

import logging
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from windlass.device.base import ALIGN_BYTES, Copy, DeviceMemory, Done, room_on_device
from windlass.device.cpu import CpuDevice
from windlass.device.lane import Lane
from windlass.device.streams import OVER, DeviceStreams, Event, Stream
from windlass.errors import UsageError
from windlass.ids import DEVICE
from windlass.options import AUTO, CPU
from windlass.trace import Tracer
from windlass.units import GIB, format_bytes, round_up

# ruff: noqa: TID251  this is the one place that may touch torch.cuda

# The driver takes large ranges only in steps, and no copy may reach from one into the next
STEP_BYTES = GIB
_PORTABLE = 1  # registered for every device, not for one alone: cudaHostRegisterPortable
_logger = logging.getLogger(__name__)


def cuda_index(name: str) -> int | None:
    """Which GPU of torch's the device `name` is; None for "cpu", and for "auto" without one.
    UsageError where it is asked for by its name and is not there."""
    if name == CPU:
        return None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == AUTO:
        return 0 if count else None
    if not count:
        raise UsageError(f"device: got {name!r}, allowed auto or cpu: {why_none()}")
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        allowed = " to ".join(f"cuda:{one}" for one in sorted({0, count - 1}))
        raise UsageError(f"device: got {name!r}, allowed {allowed}: torch finds {count} of them")
    return index


def cuda_name() -> str:
    """The model of the GPU that torch computes on where nothing else is said."""
    return torch.cuda.get_device_name()


def why_none() -> str:
    """What torch has in place of a GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU: no driver, one that"
        " is too old, or none is visible"
    )


class CudaStream:
    """Implements `Stream`. `sleeps`: whoever waits for its events leaves the core to others,
    for a later start."""

    def __init__(self, device: torch.device, *, sleeps: bool) -> None:
        self.of_torch = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._sleeps = sleeps

    def record(self) -> Event:
        event = torch.cuda.Event(blocking=self._sleeps)  # type: ignore[no-untyped-call]
        event.record(self.of_torch)
        return event

    def wait(self, event: Event) -> None:
        if event is not OVER:
            assert isinstance(event, torch.cuda.Event), f"an event of no stream: {event}"
            self.of_torch.wait_event(event)


class CudaStreams(DeviceStreams):
    """Streams of one device. `pins`: whether the system lets copies reach the host's memory by
    themselves; else whoever asks for one waits for it."""

    compute: CudaStream
    down: CudaStream
    up: CudaStream
    back: CudaStream

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.compute = CudaStream(device, sleeps=False)
        self.down = CudaStream(device, sleeps=True)
        self.up = CudaStream(device, sleeps=False)
        self.back = CudaStream(device, sleeps=False)
        with torch.cuda.device(device):
            self.pins = _can_pin()

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        assert isinstance(stream, CudaStream), f"a stream of another device: {stream}"
        return torch.cuda.stream(stream.of_torch)

    def here(self) -> AbstractContextManager[None]:
        """The stream that this thread is on; `compute` where it is on none of these."""
        current = torch.cuda.current_stream(self._device)
        if any(own.of_torch == current for own in (self.compute, self.up, self.back, self.down)):
            return nullcontext()
        return self.on(self.compute)

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self.pins)


class Usage(NamedTuple):
    """Of a device's memory, in bytes: all of it, what is taken by anybody, and the part of that
    which torch has in this process."""

    total: int
    taken: int
    of_torch: int


class CudaDevice:
    """Implements `Device`. Copies come from memory of the host; one thread waits for them."""

    num_lanes = 1

    def __init__(
        self, device: torch.device, *, name: str = DEVICE, tracer: Tracer | None = None
    ) -> None:
        """`name`: of its tier; of several above one host each has its own."""
        self.name = name
        self.device = device
        self.streams = CudaStreams(self.device)
        with self.streams.on(self.streams.compute):
            self.zeros(1).add_(1)
        torch.cuda.synchronize(self.device)  # a GPU that torch has no kernels for fails here
        self.allocated_bytes = self._of_others = 0
        self._lane = Lane(self.streams, step_bytes=STEP_BYTES, tracer=tracer)
        self._thread = threading.Thread(target=self._lane.serve, name="down", daemon=True)
        self._thread.start()

    @property
    def model(self) -> str:
        """What it is, as its maker calls it."""
        return torch.cuda.get_device_name(self.device)

    @property
    def capability(self) -> int:
        """Of its architecture: 90 for sm_90."""
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    @property
    def busy_s(self) -> float:
        return self._lane.busy_s

    # --- memory -----------------------------------------------------------------------------------

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with self.streams.here():
            return torch.empty(shape, dtype=dtype, device=self.device)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with self.streams.here():
            return torch.zeros(shape, dtype=dtype, device=self.device)

    def tensor(
        self, values: Sequence[int] | Sequence[bool] | torch.Tensor, *, dtype: torch.dtype
    ) -> torch.Tensor:
        with self.streams.here():
            if isinstance(values, torch.Tensor) and values.device == self.device:
                return values.to(dtype)
            host = torch.as_tensor(values, dtype=dtype)
            # a copy even of pinned memory, which may be a slot that is written next
            return self.streams.pinned(host).copy_(host).to(self.device, non_blocking=True)

    def allocate(self, num_bytes: int) -> DeviceMemory:
        size = max(round_up(num_bytes, ALIGN_BYTES), ALIGN_BYTES)
        with room_on_device(f"{format_bytes(size)} at once"):
            whole = self.empty(size, dtype=torch.uint8)
        self.allocated_bytes += size
        return DeviceMemory(self, whole[:num_bytes])

    def usage(self) -> Usage:
        """Once all work has ended, and torch has given back what it only keeps."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return Usage(total, total - free, torch.cuda.memory_reserved(self.device))

    def limit(self, num_bytes: int) -> None:
        """Torch takes no more than `num_bytes` of it in this process, until `close`."""
        usage = self.usage()
        self._of_others = usage.taken - usage.of_torch
        share = min(1.0, max(0.0, num_bytes / usage.total))
        torch.cuda.set_per_process_memory_fraction(share, self.device)
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """The most that was taken since `limit`: by torch in this process at once, and what was
        not torch's then."""
        return self._of_others + int(torch.cuda.max_memory_reserved(self.device))

    # --- copies -----------------------------------------------------------------------------------

    def submit(self, copy: Copy, done: Done) -> None:
        self._lane.submit(copy, done)

    def synchronize(self) -> None:
        self._lane.synchronize()

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        self._lane.close()
        self._thread.join()
        torch.cuda.set_per_process_memory_fraction(1.0, self.device)


class CudaHost(CpuDevice):
    """Memory of the host, registered with CUDA: copies of any device reach it by themselves."""

    def __init__(
        self, num_threads: int, device: torch.device, *, tracer: Tracer | None = None
    ) -> None:
        """`device`: one that copies are for; CUDA is asked in its name."""
        super().__init__(num_threads, tracer=tracer)
        self._device = device
        self._registered: list[int] = []  # addresses
        self._registered_bytes = 0
        self._is_refused = False

    def allocate(self, num_bytes: int) -> DeviceMemory:
        """What cannot be registered is memory as any other, from which copies are slower: said
        once."""
        memory = super().allocate(num_bytes)
        begin, size = memory.whole.data_ptr(), round_up(num_bytes, ALIGN_BYTES)
        with torch.cuda.device(self._device):
            for at in range(0, size, STEP_BYTES):
                if not self._is_refused:
                    self._register(begin + at, min(STEP_BYTES, size - at))
        return memory

    def close(self) -> None:
        """Nothing may be copied to a device any more."""
        super().close()
        with torch.cuda.device(self._device):
            for address in self._registered:
                _cudart().cudaHostUnregister(address)
        self._registered.clear()

    def _register(self, address: int, size: int) -> None:
        cudart = _cudart()
        error = cudart.cudaHostRegister(address, size, _PORTABLE)
        if error == cudart.cudaError.success:
            self._registered.append(address)
            self._registered_bytes += size
            return
        self._is_refused = True
        _logger.warning(
            "host memory: the system lets the GPU reach %s and no more (%s): copies from the rest"
            " are several times slower; a higher limit of locked memory (ulimit -l) helps",
            format_bytes(self._registered_bytes), cudart.cudaGetErrorString(error),
        )  # fmt: skip
        _forget_error()


def _cudart() -> Any:
    """CUDA's runtime, as far as torch hands it on."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _can_pin() -> bool:
    try:
        torch.empty(1, pin_memory=True)
    except RuntimeError as error:
        _logger.warning("host memory: copies from the GPU are slower: %s", _first_line(error))
        _forget_error()
        return False
    return True


def _forget_error() -> None:
    """Of a call that was refused: CUDA tells of it once more, whoever asks next."""
    try:
        torch.empty(1, device="cuda").add_(1)
    except RuntimeError as error:
        _logger.debug("forgotten: %s", _first_line(error))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]

"""A device like a GPU on a machine without: its memory, streams and copies, on the CPU and on one
thread. What torch is asked for inside `streams.on(stream)`, on tensors of the device, is seen from
outside and counts as a kernel of that stream: kernels need no annotation.

Stricter than a GPU: a tensor of the host in a kernel, a look of the host into memory of the device,
work outside a stream and copies from memory that is not pinned are errors; memory holds poison
until something has come. Kernels compute at once, after what their stream waits for: only the order
of accesses shows that they were early (`fake_streams.py`). Device and host share one address space,
so native kernels, which torch does not see, must not be used.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fake_streams import Deadlock, FakeStream, Line, Memory, Order, Race, tensors_in
from fakes import POISON
from windlass.device.base import ALIGN_BYTES, Copy, DeviceMemory, Done, FileRange
from windlass.device.host_memory import HostAllocator
from windlass.device.lane import Lane
from windlass.device.streams import DeviceStreams, Stream
from windlass.errors import CheckpointError
from windlass.ids import HOST
from windlass.kernels.interface import Kernels
from windlass.units import round_up

_Result = TypeVar("_Result")
# Look at numbers: on a GPU they would wait for it, or fail.
_LOOKS = {
    *("tolist", "numpy", "item", "cpu", "__array__", "__contains__"),
    *("__bool__", "__int__", "__float__", "__index__"),
}
_LOOKING = {"aten::item", "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}
_BARE = {"aten::detach_", "aten::resolve_conj", "aten::resolve_neg"}  # touch no bytes
_MAY_COPY = {"aten::reshape", "aten::flatten", "aten::to", "aten::contiguous"}  # or are views


@dataclass(frozen=True, slots=True)
class _Operator:
    """What torch's schema says. `writes`: places among the arguments, and names."""

    name: str
    is_view: bool
    writes: tuple[int | str, ...]


def _operator(func: Any) -> _Operator:
    schema = func._schema
    written = [
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    is_view = not written and any(one.alias_info is not None for one in schema.returns)
    return _Operator(schema.name, is_view, tuple(written))


class FakeStreams(DeviceStreams):
    """Streams of a `FakeCuda`."""

    def __init__(self, order: Order, memory: Memory, arrivals: Callable[[], None]) -> None:
        """`arrivals`: lets copies be noticed, perhaps."""
        self._memory = memory
        self._arrivals = arrivals
        self.compute: FakeStream = FakeStream(order, "compute")
        self.down: FakeStream = FakeStream(order, "down")
        self.up: FakeStream = FakeStream(order, "up")
        self.back: FakeStream = FakeStream(order, "back")
        self.current: FakeStream | None = None

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        assert isinstance(stream, FakeStream)
        if stream is not self.down:  # whose copies are submitted under the lock of the weights
            self._arrivals()
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        made = torch.empty(like.shape, dtype=like.dtype)
        _poison(made)
        self._memory.add(made, is_pinned=True)
        return made


class FakeCuda:
    """Implements `Device`. Weights come from files by way of pinned memory. To be used inside
    `watched`; `wait` takes the place of waiting for another thread."""

    num_lanes = 1
    busy_s = 0.0

    def __init__(
        self, *, name: str = HOST, seed: int = 0, late: float = 0.7, without: str = ""
    ) -> None:
        """`name`: of its tier; the host's where it is the only one."""
        self.name = name
        self.order = Order(seed=seed, late=late, without=without)
        self.memory = Memory()
        self.streams = FakeStreams(self.order, self.memory, self._maybe_arrive)
        self.allocated_bytes = 0
        self.num_kernels = self.num_copies = 0
        # of copies, those on other streams than `down`
        self.num_uploads = self.num_downloads = self.downloaded_bytes = 0
        self._lane = Lane(self.streams)
        self._under_way = 0
        self._failed: deque[tuple[Done, Exception]] = deque()
        self.below = FakePinned(self)
        self.worker = FakeWorker(self)
        self._in_kernel = False
        self._is_quiet = False
        self._operators: dict[Any, _Operator] = {}

    # --- memory -----------------------------------------------------------------------------------

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with self._quiet():
            made = torch.empty(shape, dtype=dtype)
            _poison(made)
            self.memory.add(made)
        return made

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        made = self.empty(*shape, dtype=dtype)
        with self._now():
            return made.zero_()

    def tensor(
        self, values: Sequence[int] | Sequence[bool] | torch.Tensor, *, dtype: torch.dtype
    ) -> torch.Tensor:
        if isinstance(values, torch.Tensor) and self.is_here(values):
            return values.to(dtype)
        with self._quiet():
            host = torch.as_tensor(values, dtype=dtype).clone()
            self._touch(self.order.host, host, is_pinned=True)
            made = self.empty(*host.shape, dtype=dtype)
        with self._now():
            return made.copy_(host, non_blocking=True)

    def allocate(self, num_bytes: int) -> DeviceMemory:
        size = round_up(num_bytes, ALIGN_BYTES)
        self.allocated_bytes += size
        with self._quiet():
            whole = _aligned(size)
            self.memory.add(whole)
        return DeviceMemory(self, whole)

    def is_here(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` lies in the device's memory."""
        block = self.memory.find(tensor)
        return block is not None and not block.is_pinned

    def pinned_bytes(self, num_bytes: int) -> torch.Tensor:
        """Memory of the host that copies reach."""
        with self._quiet():
            made = _aligned(num_bytes)
            self.memory.add(made, is_pinned=True)
        return made

    # --- copies -----------------------------------------------------------------------------------

    def submit(self, copy: Copy, done: Done) -> None:
        source = copy.source
        for one in copy.parts:
            assert one.destination.num_bytes == one.num_bytes, f"{copy.label}: other sizes"
        if isinstance(source, FileRange):
            staging = DeviceMemory(self, self.pinned_bytes(copy.num_bytes))
            try:
                self.read(Copy(source, staging, copy.label))
            except CheckpointError as error:
                self._failed.append((done, error))
                return
            copy = Copy(staging, copy.destination, copy.label)
        self._under_way += 1
        self._lane.submit(copy, done)

    def read(self, copy: Copy) -> None:
        """Bytes of a file into memory of the host, by the host."""
        source, into = copy.source, copy.destination
        assert isinstance(source, FileRange)
        with self._quiet():
            self._note(self.order.host, self.order.host.tick(), into.data, "a read", writes=True)
            source.source.read(source.file, source.offset, into.data.numpy().data)

    def wait(self) -> None:
        """Something happens; `Deadlock` where nothing can."""
        able: list[Callable[[], object]] = [self.order.step] * len(self.order.ready())
        able += [end for num, end in self._ends() if num]
        if not able:
            raise Deadlock("the host waits, and nothing is under way")
        self.order.chance.choice(able)()

    def synchronize(self) -> None:
        while self._under_way or self._failed:
            self._arrive()
        self.order.run_until(lambda: not any(stream.queue for stream in self.order.streams))

    def close(self) -> None:
        self._lane.close()

    def _ends(self) -> list[tuple[int, Callable[[], None]]]:
        """How much is under way on each link and with the worker, and how one of it ends."""
        if self.worker.is_busy:  # on this thread: others are not
            return []
        return [
            (self._under_way + len(self._failed), self._arrive),
            (len(self.below.pending), self.below.arrive),
            (len(self.worker.jobs), self.worker.do_next),
        ]

    def _arrive(self) -> None:
        """A copy has ended, and somebody is told."""
        if self._failed:
            done, error = self._failed.popleft()
            done(error)
            return
        self._under_way -= 1
        self._lane.arrive()

    def _maybe_arrive(self) -> None:
        while self.order.chance.random() > self.order.late:
            able = [end for num, end in self._ends() if num]
            if not able:
                return
            self.order.chance.choice(able)()

    # --- what torch is asked for ------------------------------------------------------------------

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Torch's calls are seen inside."""
        with _Functions(self), _Operations(self):
            yield

    @contextmanager
    def in_kernel(self) -> Iterator[None]:
        """What torch makes and looks at inside is a kernel's own."""
        before, self._in_kernel = self._in_kernel, True
        try:
            yield
        finally:
            self._in_kernel = before

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """A kernel of which nobody is to know what it touches."""
        self._stream("a kernel").drain()
        with self._quiet():
            yield

    def function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call of torch's Python functions."""
        name = getattr(func, "__name__", "")
        if self._is_quiet or not args or not isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)
        if name in _LOOKS:
            self._look(args[0], name)
        is_upload = name == "new_tensor" and self.is_here(args[0])
        if is_upload and not self._in_kernel:
            self.memory.fail("the host waits for an upload from memory that is not pinned")
        made = func(*args, **kwargs)
        if is_upload:  # as if with the device of the other
            self._touch(self._stream(name), made, is_pinned=False)
        return made

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call of torch's operators."""
        if self._is_quiet:
            return func(*args, **kwargs)
        operator = self._operators.get(func)
        if operator is None:
            operator = self._operators[func] = _operator(func)
        given = tensors_in((*args, *kwargs.values()))
        if operator.name == "aten::lift_fresh":
            if self._in_kernel:
                self._touch(self._stream(operator.name), given[0], is_pinned=False)
            return func(*args, **kwargs)
        if operator.name in _BARE or (operator.is_view and operator.name not in _MAY_COPY):
            return func(*args, **kwargs)
        here = [self.is_here(one) for one in given]
        if not any(here) and not (self._in_kernel and not given):
            return self._by_host(operator, func, args, kwargs)
        stream = self._stream(operator.name)
        if operator.name == "aten::copy_" and here != [True, True]:
            self._copy(stream, args[0], args[1])
            return args[0]
        for one, is_here in zip(given, here, strict=True):
            if not is_here and one.dim():  # single numbers are handed over
                self.memory.fail(f"{operator.name} on {stream.name} reads a tensor of the host")
        if operator.name in _LOOKING and not self._in_kernel:
            self.memory.fail(f"the host looks at what the device has: {operator.name}")
        self.order.maybe()
        stream.drain()
        self.num_kernels += 1
        return self._account(stream, operator, func, args, kwargs)

    def _by_host(self, operator: _Operator, func: Any, args: Any, kwargs: Any) -> Any:
        if any(self.memory.find(one) for one in tensors_in((*args, *kwargs.values()))):
            return self._account(self.order.host, operator, func, args, kwargs)
        return func(*args, **kwargs)

    def _account(self, line: Line, operator: _Operator, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls `func`, an operation of `line`, and notes what it reads, writes and makes."""
        tick = line.tick()
        given = tensors_in((*args, *kwargs.values()))
        for one in given:
            self._note(line, tick, one, operator.name, writes=False)
        for place in operator.writes:
            found = kwargs.get(place) if isinstance(place, str) else args[place]
            for one in tensors_in((found,)):
                self._note(line, tick, one, operator.name, writes=True)
        result = func(*args, **kwargs)
        if line is not self.order.host:
            known = {one.untyped_storage()._cdata for one in given}
            for one in tensors_in((result,)):
                if one.untyped_storage()._cdata not in known:
                    block = self.memory.add(one)
                    self.memory.access(line, tick, one, block, writes=True, what=operator.name)
        return result

    def _note(
        self, line: Line, tick: int, tensor: torch.Tensor, what: str, *, writes: bool
    ) -> None:
        block = self.memory.find(tensor)
        if block is not None:
            self.memory.access(line, tick, tensor, block, writes=writes, what=what)

    def _touch(self, line: Line, tensor: torch.Tensor, *, is_pinned: bool) -> None:
        """`line` has made `tensor`."""
        block = self.memory.add(tensor, is_pinned=is_pinned)
        self.memory.access(line, line.tick(), tensor, block, writes=True, what="its beginning")

    def _look(self, tensor: torch.Tensor, name: str) -> None:
        block = self.memory.find(tensor)
        if block is None:
            return
        if block.is_pinned:
            line: Line = self.order.host
        else:
            if not self._in_kernel:
                self.memory.fail(f"the host looks at what the device has: {name}")
            line = stream = self._stream(name)
            stream.drain()
        self.memory.access(line, line.tick(), tensor, block, writes=False, what=name)

    def _stream(self, what: str) -> FakeStream:
        if self.streams.current is None:
            self.memory.fail(f"{what} on memory of the device, on no stream")
        assert self.streams.current is not None
        return self.streams.current

    def _copy(self, stream: FakeStream, into: torch.Tensor, source: torch.Tensor) -> None:
        """Of bytes, between device and host: made when its turn comes."""
        for one in (into, source):
            assert one.is_contiguous(), "a copy of bytes that do not lie together"
            if self.memory.find(one) is None:
                self.memory.fail(f"a copy on {stream.name} of memory that is not pinned")
        assert (into.dtype, into.shape) == (source.dtype, source.shape), "a copy that converts"
        tick = stream.tick()
        self._note(stream, tick, source, "a copy", writes=False)
        self._note(stream, tick, into, "a copy", writes=True)
        self.num_copies += 1
        self.num_uploads += stream is self.streams.compute and self.is_here(into)
        if stream is self.streams.up:
            self.num_downloads += 1
            self.downloaded_bytes += source.nbytes
        if into.numel():
            there, here = _bytes_of(into), _bytes_of(source)
            stream.enqueue(lambda: there.fill(POISON))
            stream.enqueue(lambda: there.__setitem__(slice(None), here))
        self.order.maybe()

    @contextmanager
    def _now(self) -> Iterator[None]:
        """On the stream that kernels are on."""
        with self.streams.on(self.streams.current or self.streams.compute):
            yield

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        before, self._is_quiet = self._is_quiet, True
        try:
            yield
        finally:
            self._is_quiet = before


class FakePinned(HostAllocator):
    """Implements `Device`: memory of the host that copies of a `FakeCuda` reach. What is read from
    files is there when chance has it, in any order."""

    name = HOST
    num_lanes = 3
    busy_s = 0.0

    def __init__(self, above: "FakeCuda") -> None:
        self._above = above
        self.allocated_bytes = 0
        self.pending: list[tuple[Copy, Done]] = []

    def allocate(self, num_bytes: int) -> DeviceMemory:
        size = round_up(num_bytes, ALIGN_BYTES)
        self.allocated_bytes += size
        return DeviceMemory(self, self._above.pinned_bytes(size))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Watched too: the engine's thread and the worker work on it."""
        with self._above._quiet():
            made = torch.empty(shape, dtype=dtype)
            self._above.memory.add(made, is_pinned=True)
        return made

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.empty(*shape, dtype=dtype).zero_()

    def submit(self, copy: Copy, done: Done) -> None:
        self.pending.append((copy, done))

    def arrive(self) -> None:
        """Some file has been read."""
        copy, done = self.pending.pop(self._above.order.chance.randrange(len(self.pending)))
        error: Exception | None = None
        try:
            self._above.read(copy)
        except (CheckpointError, Race) as caught:
            error = caught
        done(error)

    def synchronize(self) -> None:
        while self.pending:
            self.arrive()

    def close(self) -> None:
        pass


class FakePending(Generic[_Result]):
    """Implements `Pending` of a `FakeWorker`."""

    def __init__(self, device: FakeCuda, work: Callable[[], _Result]) -> None:
        self._device = device
        self._work = work
        self._result: list[_Result] = []
        self._error: BaseException | None = None
        self.clock = dict(device.order.host.clock)  # of whoever asks; then of the worker

    def run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as error:  # noqa: BLE001  `result` raises it
            self._error = error
        self.clock = dict(self._device.order.host.clock)

    def exception(self) -> BaseException | None:
        while not self._result and self._error is None:
            self._device.wait()
        self._device.order.host.knows(self.clock)
        return self._error

    def result(self) -> _Result:
        if error := self.exception():
            raise error
        return self._result[0]


class FakeWorker:
    """Implements `Worker`: another thread of the host, which does what it is given when chance has
    it, one after the other."""

    def __init__(self, device: FakeCuda) -> None:
        self._device = device
        self._line = Line("worker")
        self.jobs: deque[FakePending[Any]] = deque()
        self.num_jobs = 0
        self.is_busy = False

    def submit(self, work: Callable[[], _Result]) -> FakePending[_Result]:
        self.jobs.append(FakePending(self._device, work))
        self.num_jobs += 1
        return self.jobs[-1]

    def do_next(self) -> None:
        job, order = self.jobs.popleft(), self._device.order
        self._line.knows(job.clock)
        self.is_busy, before, order.host = True, order.host, self._line
        try:
            job.run()
        finally:
            self.is_busy, order.host = False, before

    def shutdown(self, *, cancel_futures: bool) -> None:
        self.jobs.clear()


class _Functions(TorchFunctionMode):
    def __init__(self, device: FakeCuda) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._device.function(func, args, kwargs or {})


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiles: else it is imported, for seconds

    def __init__(self, device: FakeCuda) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._device.operation(func, args, kwargs or {})


class _OnDevice:
    """Kernels each of whose calls is one of the device."""

    def __init__(self, device: FakeCuda, make: Callable[[], Kernels]) -> None:
        self._device = device
        with device.watched(), device.streams.on(device.streams.compute), device.in_kernel():
            self._kernels = make()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernels, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._device.in_kernel():
                return found(*args, **kwargs)

        return call


def on_device(device: FakeCuda, make: Callable[[], Kernels]) -> Kernels:
    """The kernels that `make` gives, as those of `device`: made and called there."""
    return cast(Kernels, _OnDevice(device, make))


def _poison(tensor: torch.Tensor) -> None:
    tensor.view(-1).view(torch.uint8).fill_(POISON)


def _bytes_of(tensor: torch.Tensor) -> Any:
    """As numpy has them: of what torch forbids or sees."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _aligned(num_bytes: int) -> torch.Tensor:
    """Poison, from an address on that direct I/O takes on."""
    whole = torch.full((num_bytes + ALIGN_BYTES,), POISON, dtype=torch.uint8)
    start = -whole.data_ptr() % ALIGN_BYTES
    return torch.frombuffer(whole.numpy().data[start : start + num_bytes], dtype=torch.uint8)

"""Streams and events of a device that is not there, and of who touched its memory when.

Every stream and the host carry a vector clock: of each other, how many of its operations are known
to be over. An access to memory that conflicts with another and is not known to come after it is a
race, whatever happened to come first. Copies are made late, one at a time, in an order that chance
chooses among those that streams and events allow. One thread, no clock on the wall: a seed gives
the same run again.
"""

import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from windlass.device.streams import Event

_SWEEP = 8192  # blocks of memory between two looks at which of them are freed
_LOOK = 1000  # blocks between two looks at how many bytes they have together


class Race(AssertionError):
    """Two accesses that nothing orders, or one from where the memory cannot be reached."""


class Deadlock(AssertionError):
    """Somebody waits, and nothing is under way."""


class Line:
    """Operations one after the other: the host's, or those of a stream."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: dict[str, int] = {name: 0}

    def knows(self, other: dict[str, int]) -> None:
        """What is over for `other` is over for whatever comes here."""
        for name, number in other.items():
            if number > self.clock.get(name, 0):
                self.clock[name] = number

    def tick(self) -> int:
        """The number of a new operation."""
        number = self.clock[self.name] = self.clock[self.name] + 1
        return number


class Order:
    """What may happen next, and what chance makes of it. `points`: records, waits and
    synchronisations so far, by where in the code they are; that of `without` is left out."""

    def __init__(self, *, seed: int = 0, late: float = 0.7, without: str = "") -> None:
        """`late`: the chance that nothing more happens each time that something could."""
        self.chance = random.Random(seed)
        self.late = late
        self.without = without
        self.points: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()  # of the host, for what it did not know to be over
        self.host = Line("host")
        self.streams: list[FakeStream] = []

    def keeps(self, point: str) -> bool:
        """Notes a `point` that the caller's caller asks for; whether it is to be carried out."""
        point = f"{point} in {sys._getframe(2).f_code.co_qualname}"
        self.points[point] += 1
        return point != self.without

    def ready(self) -> list["FakeStream"]:
        """Streams whose next operation may begin."""
        return [stream for stream in self.streams if stream.is_ready]

    def step(self) -> bool:
        """One operation of some stream; False where none may begin."""
        ready = self.ready()
        if ready:
            self.chance.choice(ready).do_next()
        return bool(ready)

    def maybe(self) -> None:
        """Some operations, perhaps."""
        while self.chance.random() > self.late and self.step():
            pass

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """As many operations as it takes."""
        while not is_over():
            if not self.step():
                waiting = ", ".join(stream.name for stream in self.streams if stream.queue)
                raise Deadlock(f"nothing can begin; waiting: {waiting or 'the host alone'}")


class FakeStream(Line):
    """Implements `Stream`. Operations that are not kernels wait in `queue`."""

    def __init__(self, order: Order, name: str) -> None:
        super().__init__(name)
        self._order = order
        self.queue: deque[tuple[FakeEvent | None, Callable[[], object]]] = deque()
        order.streams.append(self)

    def tick(self) -> int:
        self.knows(self._order.host.clock)  # it is asked for after all that the host has seen
        return super().tick()

    def record(self) -> "FakeEvent":
        event = FakeEvent(self._order, self)
        if self._order.keeps(f"record of {self.name}"):
            self.tick()
            event.clock.update(self.clock)
            event.is_over = False
            self.enqueue(event.come)
        return event

    def wait(self, event: Event) -> None:
        if isinstance(event, FakeEvent) and self._order.keeps(f"wait of {self.name}"):
            self.knows(event.clock)
            self.enqueue(lambda: None, after=event)

    def enqueue(self, operation: Callable[[], object], *, after: "FakeEvent | None" = None) -> None:
        self.queue.append((after, operation))

    @property
    def is_ready(self) -> bool:
        if not self.queue:
            return False
        after = self.queue[0][0]
        return after is None or after.is_over

    def do_next(self) -> None:
        self.queue.popleft()[1]()

    def drain(self) -> None:
        """Carries out all that waits here, and what that waits for."""
        self._order.run_until(lambda: not self.queue)


class FakeEvent:
    """Implements `Event`. One that was never recorded is over, as CUDA has it."""

    def __init__(self, order: Order, stream: FakeStream) -> None:
        self._order = order
        self._stream = stream
        self.clock: dict[str, int] = {}
        self.is_over = True

    def come(self) -> None:
        self.is_over = True

    def synchronize(self) -> None:
        if self._order.keeps(f"synchronisation with {self._stream.name}"):
            name, known = self._stream.name, self._order.host.clock
            self._order.waits[name] += self.clock.get(name, 0) > known.get(name, 0)
            self._order.run_until(lambda: self.is_over)
            self._order.host.knows(self.clock)


class _Access(NamedTuple):
    """Bytes of a block, who reads or writes them."""

    begin: int
    end: int
    is_write: bool
    line: str


class Block:
    """One allocation, of the device or, `is_pinned`, of the host where copies reach it. `log`: the
    last access of each kind: its number on its line, and what it was."""

    __slots__ = ("reference", "is_pinned", "log", "lines", "num_bytes")

    def __init__(self, storage: torch.UntypedStorage, *, is_pinned: bool) -> None:
        # while it is held no other storage has the same number
        self.reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.is_pinned = is_pinned
        self.num_bytes = storage.nbytes()
        self.log: dict[_Access, tuple[int, str]] = {}
        self.lines: set[str] = set()

    @property
    def is_alive(self) -> bool:
        return not self.reference.expired()  # type: ignore[no-untyped-call]


class Memory:
    """Blocks that live, and who touched them. `races`: what was found, in words. `peak_bytes`: the
    most that blocks of the device had together, as looked at now and then."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._num_added = 0
        self._blocks: dict[int, Block] = {}
        self._next_sweep = _SWEEP
        self.races: list[str] = []

    def add(self, tensor: torch.Tensor, *, is_pinned: bool = False) -> Block:
        """Tracks the memory of `tensor` from now on."""
        if len(self._blocks) >= self._next_sweep:
            self._blocks = {n: one for n, one in self._blocks.items() if one.is_alive}
            self._next_sweep = len(self._blocks) + _SWEEP
        storage = tensor.untyped_storage()
        block = self._blocks[storage._cdata] = Block(storage, is_pinned=is_pinned)
        self._num_added += 1
        if self._num_added % _LOOK == 0:
            self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        return block

    @property
    def num_bytes(self) -> int:
        """Of the device's blocks that live."""
        here = (one for one in self._blocks.values() if not one.is_pinned and one.is_alive)
        return sum(one.num_bytes for one in here)

    def find(self, tensor: torch.Tensor) -> Block | None:
        """What `tensor` lies in; None where that is ordinary memory of the host."""
        return self._blocks.get(tensor.untyped_storage()._cdata)

    def fail(self, race: str) -> None:
        """Raises `Race`, and keeps it: whoever is called by others' code may see it swallowed."""
        self.races.append(race)
        raise Race(race)

    def access(
        self, line: Line, tick: int, tensor: torch.Tensor, block: Block, *, writes: bool, what: str
    ) -> None:
        """`what`, operation `tick` of `line`, reads or writes `tensor` in `block`."""
        if not tensor.numel():
            return
        begin, end = _span(tensor)
        if block.lines != {line.name}:
            block.lines.add(line.name)
            for other, (number, before) in block.log.items():
                if other.begin >= end or begin >= other.end or not (writes or other.is_write):
                    continue
                if line.clock.get(other.line, 0) < number and other.line != line.name:
                    self.fail(
                        f"{what} on {line.name} {_word(writes)} bytes {begin} to {end}, which"
                        f" {before} on {other.line} {_word(other.is_write)}: nothing orders them"
                    )
        block.log[_Access(begin, end, writes, line.name)] = tick, what


def _word(is_write: bool) -> str:
    return "writes" if is_write else "reads"


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Bytes of its storage from its first to its last."""
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    if tensor.is_contiguous():
        return begin, begin + tensor.numel() * size
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return begin, begin + (sum((n - 1) * stride for n, stride in steps) + 1) * size


def tensors_in(values: Iterable[object]) -> list[torch.Tensor]:
    """Tensors among `values` and in their lists."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found

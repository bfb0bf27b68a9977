"""Routes between files and memories of devices: an `IoQueue` whose blocks are the devices' copies.
Knows files and bytes, not weights."""

import _thread
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, log2

from windlass.checkpoint.part_reads import Read
from windlass.device.base import (
    ALIGN_BYTES,
    ByteSource,
    Copy,
    Device,
    DeviceMemory,
    FileRange,
)
from windlass.ids import Route
from windlass.trace import Tracer
from windlass.units import MIB
from windlass.weights.io_queue import (
    BLOCK_BYTES,
    SPECULATIVE_BYTES,
    IoQueue,
    Link,
    Priority,
    Ticket,
)

_BLOCK_S = 300e-6  # of a link to a device


@dataclass(frozen=True, slots=True)
class Carrier:
    """What moves the blocks of a route. `depth`: blocks in flight; by default one waits behind
    those being moved, so that a lane never idles for our lock."""

    device: Device
    block_bytes: int = BLOCK_BYTES
    depth: int | None = None

    @property
    def link(self) -> Link:
        size = self.block_bytes
        assert size > 0 and size % ALIGN_BYTES == 0, f"block_bytes: {size}"
        speculative = max(SPECULATIVE_BYTES, size // 4)
        return Link(self.depth or self.device.num_lanes + 1, size, speculative)


def block_bytes_of(bytes_per_s: float) -> int:
    """Bytes of a block on a link of this rate: what it moves in 300 us, up to a power of two, from
    1 to 16 MiB. A demand waits for what is in flight, so that blocks are short; each costs the
    interpreter tens of microseconds, which must stay less than the link takes for it."""
    assert bytes_per_s > 0, f"bytes_per_s: got {bytes_per_s}"
    return min(max(MIB, 1 << ceil(log2(bytes_per_s * _BLOCK_S))), 16 * MIB)


class _Changed(_thread.RLock):  # type: ignore[misc]  # final in words only
    """A lock, and the wait for a change, where mostly nobody waits. (Entering a condition calls
    Python, entering its lock does not.)"""

    def __init__(self) -> None:
        super().__init__()
        self._condition = threading.Condition(self)
        self._waiting = 0

    def wait(self) -> None:
        self._waiting += 1
        try:
            self._condition.wait()
        finally:
            self._waiting -= 1

    def notify_all(self) -> None:
        if self._waiting:
            self._condition.notify_all()


class TransferQueue(IoQueue[Copy]):
    """Makes copies along the routes that have a carrier. Callbacks run on the devices' threads."""

    def __init__(self, carriers: Mapping[Route, Carrier], *, tracer: Tracer | None = None) -> None:
        self._carriers = dict(carriers)
        self._tracer = tracer or Tracer()
        super().__init__(_Changed(), {r: one.link for r, one in carriers.items()})

    def carry(self, route: Route, carrier: Carrier) -> None:
        """`carrier` moves the blocks of one more route from now on."""
        with self.changed:
            self._carriers[route] = carrier
            self.add(route, carrier.link)

    def submit(
        self, copies: Sequence[Copy], *, priority: Priority, on_done: Callable[[], None]
    ) -> Ticket[Copy]:
        """Queues `copies`, all of one route, and starts what fits."""
        route = copies[0].route
        assert len(copies) == 1 or all(copy.route == route for copy in copies), "one route"
        return self.enqueue(route, copies, priority=priority, on_done=on_done)

    def close(self) -> None:
        """Issues nothing more and returns when nothing is in flight. Takes the lock; idempotent."""
        with self.changed:
            self._is_over = self._closed = True
            self.changed.notify_all()
            while self.bytes_in_flight:
                self.changed.wait()
            for line in self._lines.values():
                line.clear()

    def _move(self, ticket: Ticket[Copy], block: Copy) -> None:
        done = partial(self.arrived, ticket, block.num_bytes)
        self._carriers[ticket.route].device.submit(block, done)

    def _issued(self) -> None:
        if self._tracer.writes:
            mib = self.bytes_in_flight / MIB
            self._tracer.counter("transfers", queued=self.num_queued, mib_in_flight=mib)


def file_copies(
    source: ByteSource, reads: Iterable[Read], into: DeviceMemory, label: str
) -> list[Copy]:
    """`reads` from the files of `source` to their places in `into`."""
    return [
        Copy(
            FileRange(source, read.file, read.offset, read.num_bytes),
            into.part(read.at, read.num_bytes),
            label,
        )
        for read in reads
    ]

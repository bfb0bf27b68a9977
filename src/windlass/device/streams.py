"""The order of work on one device: streams, whose operations follow each other, and events, by
which they wait for one another and the host for them. What is asked of a device has begun, not
ended; nothing but a stream, an event or the host that waited orders two accesses to memory."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class Event(Protocol):
    """A point in the work of a stream."""

    def synchronize(self) -> None:
        """Returns when the stream has got there: the host may read what was written before, and
        write what was read. Any thread may wait. Raises the error of work that has failed."""
        ...


class Stream(Protocol):
    """Operations that a device carries out one after the other."""

    def record(self) -> Event:
        """The end of all that the stream was given so far."""
        ...

    def wait(self, event: Event) -> None:
        """What the stream is given from now on begins after `event`, of any stream."""
        ...


class Streams(Protocol):
    """Of one device: `compute` has its kernels, and copies to it that they need at once; `down` the
    copies of weights to it, `up` those to the host, `back` those of what the host has made of
    them."""

    @property
    def compute(self) -> Stream: ...

    @property
    def down(self) -> Stream: ...

    @property
    def up(self) -> Stream: ...

    @property
    def back(self) -> Stream: ...

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """What this thread asks of torch inside, on tensors of the device, is work of `stream`."""
        ...

    def on_host(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `compute` has made of `tensors`, once it has, for the host to read. Those that lie
        there are not copied."""
        ...

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        """Host memory that copies of the device reach, of the shape and type of `like`,
        uninitialised."""
        ...


class _Over:
    """An `Event` that has come."""

    def synchronize(self) -> None:
        pass


OVER = _Over()


class _ProgramOrder:
    """The `Stream` of a processor that does what it is asked at once."""

    def record(self) -> Event:
        return OVER

    def wait(self, event: Event) -> None:
        pass


class HostStreams:
    """`Streams` of the host itself, where there is nothing to wait for."""

    compute = down = up = back = _ProgramOrder()
    _here = nullcontext()

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        return self._here

    def on_host(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensors

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype)


class DeviceStreams(ABC):
    """`Streams` of a device that works by itself; of its memory only streams and copies reach."""

    compute: Stream
    down: Stream
    up: Stream
    back: Stream

    @abstractmethod
    def on(self, stream: Stream) -> AbstractContextManager[None]: ...

    @abstractmethod
    def pinned(self, like: torch.Tensor) -> torch.Tensor: ...

    def on_host(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.up.wait(self.compute.record())
        with self.on(self.up):
            copies = tuple(self.pinned(one).copy_(one, non_blocking=True) for one in tensors)
        self.up.record().synchronize()
        return copies

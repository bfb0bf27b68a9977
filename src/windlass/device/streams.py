"""The order of work on one device: streams, whose operations follow each other, and events, by
which they wait for one another and the host for them. What is asked of a device has begun, not
ended; nothing but a stream, an event or the host that waited orders two accesses to memory."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

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


class ToHost(NamedTuple):
    """Tensors on their way to the host. `sources` are kept: who makes memory must not give theirs
    to other work before they are copied."""

    copies: tuple[torch.Tensor, ...]
    sources: tuple[torch.Tensor, ...]
    end: Event

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The copies, once they are there, for the host to read."""
        self.end.synchronize()
        return self.copies


class Streams(Protocol):
    """Of one device: `compute` has its kernels, and copies to it that they need at once; `down` the
    copies of weights to it, `up` those to the host, `back` those of what the host has made of
    them. `runs_ahead`: what is asked of it goes on by itself, so that looking at results costs time
    in which nothing more is asked."""

    runs_ahead: bool

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

    def to_host(self, *tensors: torch.Tensor) -> ToHost:
        """What `compute` has made of `tensors` begins to be copied to the host, once it has. Those
        that lie there are not copied. `compute` must not write them before somebody has waited."""
        ...

    def on_host(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same, waited for."""
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

    runs_ahead = False
    compute = down = up = back = _ProgramOrder()
    _here = nullcontext()

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        return self._here

    def to_host(self, *tensors: torch.Tensor) -> ToHost:
        return ToHost(tensors, tensors, OVER)

    def on_host(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensors

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype)


class DeviceStreams(ABC):
    """`Streams` of a device that works by itself; of its memory only streams and copies reach."""

    runs_ahead = True
    compute: Stream
    down: Stream
    up: Stream
    back: Stream

    @abstractmethod
    def on(self, stream: Stream) -> AbstractContextManager[None]: ...

    @abstractmethod
    def pinned(self, like: torch.Tensor) -> torch.Tensor: ...

    def to_host(self, *tensors: torch.Tensor) -> ToHost:
        self.up.wait(self.compute.record())
        with self.on(self.up):
            copies = tuple(self._copied(one) for one in tensors)
        return ToHost(copies, tensors, self.up.record())

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        made = self.pinned(tensor)
        return made.copy_(tensor, non_blocking=True) if tensor.numel() else made

    def on_host(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.to_host(*tensors).wait()

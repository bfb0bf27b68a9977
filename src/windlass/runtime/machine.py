"""What a runtime is given to compute with."""

from dataclasses import dataclass

from windlass.device.base import Allocator
from windlass.kernels.interface import Kernels
from windlass.runtime.host_attention import HostAttention
from windlass.runtime.host_experts import HostExperts
from windlass.runtime.kv_stream import KvStream
from windlass.trace import Tracer


@dataclass(frozen=True, slots=True)
class Machine:
    """What a pass is computed with: kernels of a device, its memory for what they work on, the
    host's part of attention and of experts, where it has one, and attention over what the host
    keeps. `replays`: layers may be captured and replayed; not where the host has experts, as
    routing says which are left to the device. `by_row`: generated rows go through
    experts each by itself (`Plan.generated_experts`)."""

    kernels: Kernels
    memory: Allocator
    tracer: Tracer
    host: HostAttention | None = None
    stream: KvStream | None = None
    experts: HostExperts | None = None
    replays: bool = True
    by_row: bool = False

    @property
    def below(self) -> tuple[HostAttention | None, KvStream | None]:
        """Attention over keys and values that the host has."""
        return self.host, self.stream

    @property
    def rows_are_alike(self) -> bool:
        """Whether a row of an attention model has the same bits in a prompt and generated."""
        others = self.host, self.stream, self.experts
        return self.kernels.rows_are_alike and all(one is None for one in others)

    def abandon(self) -> None:
        """A pass has failed: returns when nobody works on its keys and values, or reads weights for
        it, any more."""
        for own in (self.host, self.stream, self.experts):
            if own is not None:
                own.drain()

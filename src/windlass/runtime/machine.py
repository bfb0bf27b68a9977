"""What a runtime is given to compute with."""

from dataclasses import dataclass

from windlass.device.base import Allocator
from windlass.kernels.interface import Kernels
from windlass.runtime.host_attention import HostAttention
from windlass.trace import Tracer


@dataclass(frozen=True, slots=True)
class Machine:
    """What a pass is computed with: kernels of a device, its memory for what they work on, and the
    host's part of attention, where it has one. `replays`: layers may be captured and replayed."""

    kernels: Kernels
    memory: Allocator
    tracer: Tracer
    host: HostAttention | None = None
    replays: bool = True

    def abandon(self) -> None:
        """A pass has failed: returns when nobody works on its keys and values any more."""
        if self.host is not None:
            self.host.drain()

"""What of a pass on the clock is computed, or kept, beside the processor that passes work on."""

from collections.abc import Callable, Mapping
from typing import Protocol

from windlass.schedule.batch import Batch, MicroBatch, RowGroup


class HostPart(Protocol):
    """What the host does of experts, beside a device."""

    def begin(
        self, layer: int, group: RowGroup, counts: Mapping[int, int]
    ) -> tuple[Mapping[int, int], Callable[[], None]]:
        """Of rows by expert: what is left to the device, and what waits for the host's."""
        ...


class NoPart:
    """Implements `HostPart` of a machine where passes have all experts from one processor."""

    def begin(
        self, layer: int, group: RowGroup, counts: Mapping[int, int]
    ) -> tuple[Mapping[int, int], Callable[[], None]]:
        return counts, lambda: None


class StreamPart(Protocol):
    """Attention over keys and values that come from the host, beside a device."""

    def begin(self, batch: Batch) -> None: ...

    def attend(self, layer: int, rows: MicroBatch) -> bool:
        """All of it of a layer, if it is such rows'."""
        ...

"""What passes on the clock are given: what operations cost, what routers decide, and what is
computed, or kept, beside the processor that passes work on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from windlass.ids import Route, WeightKey
from windlass.runtime.clock import LaneWork
from windlass.schedule.batch import Batch, MicroBatch, RowGroup
from windlass.schedule.observer import RoutedTokens


class Router(Protocol):
    """What routers decide, and the states that a forecast may read."""

    def begin(self, batch: Batch) -> Any:
        """A pass begins; its embedded rows, or None."""
        ...

    def route(self, layer: int, batch: Batch, group: RowGroup) -> RoutedTokens:
        """Of the rows of a group of the pass."""
        ...

    def end(self) -> Any:
        """The states that leave the last layer, or None."""
        ...


class Costs(Protocol):
    """What operations ask of the lanes, and blocks of their way."""

    def embed(self, batch: Batch) -> LaneWork: ...

    def embedding_rows(self, num_rows: int) -> float:
        """Seconds of the first lane to read rows of the table one by one."""
        ...

    def attention(self, layer: int, rows: MicroBatch) -> LaneWork: ...

    def route(self, layer: int, num_rows: int) -> LaneWork: ...

    def experts(self, layer: int, num_rows: Sequence[int]) -> LaneWork:
        """Experts with so many rows each, in one call."""
        ...

    def combine(self, layer: int, num_rows: int) -> LaneWork: ...

    def dense(self, layer: int, num_rows: int) -> LaneWork: ...

    def head(self, chunk: int, num_rows: int) -> LaneWork: ...

    def block(self, key: WeightKey, num_bytes: int) -> Sequence[tuple[Route, float]]:
        """Routes that a block of a part may pass, and the seconds on each."""
        ...


class HostPart(Protocol):
    """What the host does of experts, beside a device."""

    def begin(
        self, layer: int, group: RowGroup, counts: Mapping[int, int]
    ) -> tuple[Mapping[int, int], Callable[[], None]] | None:
        """Of rows by expert: what is left to the device, and what waits for the host's. None where
        the host has no part of them."""
        ...


class NoPart:
    """Implements `HostPart` of a machine where passes have all experts from one processor."""

    def begin(self, layer: int, group: RowGroup, counts: Mapping[int, int]) -> None:
        return None


class StreamPart(Protocol):
    """Attention over keys and values that come from the host, beside a device."""

    def begin(self, batch: Batch) -> None: ...

    def attend(self, layer: int, rows: MicroBatch) -> bool:
        """All of it of a layer, if it is such rows'."""
        ...

"""What an engine asks of whoever watches its passes. Knows no planner."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from windlass.phases import PhaseStats
from windlass.plan import Plan
from windlass.schedule.batch import Segment
from windlass.workload import Workload

# Of each sequence that has not ended: prompt tokens, tokens to generate, and how many of the prompt
# tokens need not be computed.
Left = Callable[[], Sequence[tuple[int, int, int]]]


class Check(Protocol):
    """A run beside its prediction."""

    def lines(self) -> list[str]: ...

    def to_json(self) -> dict[str, Any]: ...


class Pilot(Protocol):
    """Watches passes, and may change what a plan says of the next ones."""

    def after(self, segments: Sequence[Segment], took: PhaseStats, left: Left) -> Plan | None:
        """A step has ended; another plan to go on with, in the same memory, or None."""
        ...

    def check(self, phases: Mapping[str, PhaseStats]) -> Check: ...


class Compare(Protocol):
    """Puts a job that has ended beside what was to be expected of it."""

    def __call__(
        self, plan: Plan, work: Workload, phases: Mapping[str, PhaseStats], *, is_warm: bool
    ) -> Check: ...

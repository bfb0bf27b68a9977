"""What an engine asks of whoever has predicted its run. Knows no planner."""

from collections.abc import Mapping
from typing import Any, Protocol

from windlass.phases import PhaseStats
from windlass.plan import Plan
from windlass.workload import Workload


class Check(Protocol):
    """A run beside its prediction."""

    def lines(self) -> list[str]: ...

    def to_json(self) -> dict[str, Any]: ...


class Predicted(Protocol):
    """What is expected of the job that an engine was opened for."""

    def check(self, phases: Mapping[str, PhaseStats]) -> Check: ...


class Compare(Protocol):
    """Puts a job that has ended beside what was to be expected of it."""

    def __call__(
        self, plan: Plan, work: Workload, phases: Mapping[str, PhaseStats], *, is_warm: bool
    ) -> Check: ...

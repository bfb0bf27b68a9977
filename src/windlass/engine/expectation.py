"""What an engine says of its speed, seen from below: whoever expects something of a run, and what
comes of comparing the two. Knows no planner."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from windlass.phases import PhaseStats
from windlass.plan import Plan
from windlass.workload import Workload


class Check(Protocol):
    """A run beside its prediction: lines for people, fields for programs."""

    def lines(self) -> list[str]: ...

    def to_json(self) -> dict[str, Any]: ...


class Rates(NamedTuple):
    """What a machine can do. `link_bytes_s`: by the tier that bytes come from."""

    decode_tokens_s: float  # of all sequences together
    link_bytes_s: Mapping[str, float]
    are_assumed: bool  # nobody has measured this machine


class Expectation(Protocol):
    """Predicts jobs of one engine."""

    def rates(self, plan: Plan, sequences: int) -> Rates:
        """While as many sequences decode under `plan`. Takes a moment: passes are simulated."""
        ...

    def compare(
        self, plan: Plan, work: Workload | None, phases: Mapping[str, PhaseStats], *, is_warm: bool
    ) -> Check | None:
        """What `phases` took for the job `work` beside what is to be expected of it under `plan`.
        `work` None: the job that the engine was planned for; None comes of it where there is none.
        `is_warm`: passes had run before, so that weights are in memory."""
        ...

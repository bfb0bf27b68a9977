"""Looks for the plan that ends a job soonest. Proposes values; planner/budget.py says what fits."""

from dataclasses import dataclass

from windlass.hardware.profile import HardwareProfile
from windlass.plan import Plan
from windlass.planner.budget import Sizes, Wanted
from windlass.planner.estimate import Estimate
from windlass.spec.model import ModelSpec
from windlass.workload import Workload


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that fits, and what to expect of it."""

    plan: Plan
    estimate: Estimate


def search(
    spec: ModelSpec,
    sizes: Sizes,
    profile: HardwareProfile,
    workload: Workload,
    host_memory: int,
    wanted: Wanted,
    *,
    device_memory: int | None = None,
) -> list[Candidate]:
    """Plans within the budgets, the soonest to end first; what `wanted` fixes is kept.

    `device_memory`: of a machine with a device; all of its memory if None. Raises BudgetError where
    nothing fits, as `make_plan` does."""
    raise NotImplementedError

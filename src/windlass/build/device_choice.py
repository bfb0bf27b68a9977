"""Whether a GPU that nobody named is worth it: what a job takes with it, and on the CPU alone."""

from collections.abc import Callable

from windlass.errors import BudgetError
from windlass.planner.choose import Chosen
from windlass.units import format_seconds


class CpuIsSooner(Exception):
    """The CPU alone is to compute; says why."""


def beside_cpu(chosen: Chosen, alone: Callable[[], Chosen]) -> tuple[str, ...]:
    """A line that says why the plan of a GPU is kept, beside what `alone` finds for the CPU; none
    where the two cannot be compared: nothing was searched, or rates are assumed. Raises
    `CpuIsSooner`."""
    if chosen.plan.above is None or chosen.estimate is None or chosen.problem.profile.is_assumed:
        return ()
    here = f"{format_seconds(chosen.estimate.total_s)} by measured rates"
    try:
        other = alone().estimate
    except BudgetError:
        return (f"plan: device auto: the GPU computes: about {here}; no plan fits the CPU alone",)
    if other is None:
        return ()
    there = format_seconds(other.total_s)
    if other.total_s < chosen.estimate.total_s:
        raise CpuIsSooner(f"the CPU computes alone: about {there}, with the GPU {here}")
    return (f"plan: device auto: the GPU computes: about {here}, the CPU alone {there}",)

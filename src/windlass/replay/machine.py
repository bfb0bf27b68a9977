"""A machine with a profile, for one model: so that a replay can be compared with the engine."""

from collections.abc import Mapping
from dataclasses import dataclass

from windlass.errors import UsageError
from windlass.forecast.interface import ExpertTable
from windlass.ids import Part
from windlass.perf.op_cost import OpCost
from windlass.perf.pass_cost import contention, kv_numbers
from windlass.perf.sizes import Problem
from windlass.replay.routing_trace import RoutingTrace
from windlass.replay.run import ClockedMachine
from windlass.schedule.passes import PassShape
from windlass.units import counted


@dataclass(frozen=True, slots=True)
class ProfiledMachine(ClockedMachine):
    """Implements what a lane does not know: threads that share cores, and drawing tokens."""

    threads: int
    op_cost: OpCost

    def beside_s(self, seconds: float, busy: Mapping[str, float], num_rows: int) -> float:
        shared = contention(busy["disk"], busy["host"], seconds, self.threads)
        return shared + self.op_cost.sample_s(num_rows)


def check_model(trace: RoutingTrace, problem: Problem, model: str) -> None:
    """UsageError where the trace is of another model."""
    own, table = ExpertTable.of(problem.spec), trace.table()
    if (own.num_experts, own.top_k) != (table.num_experts, table.top_k):
        raise UsageError(
            f"model: got {model} for a trace of {trace.model}: {_words(own)}, the trace has"
            f" {_words(table)}"
        )


def profiled_machine(problem: Problem, slots: int, *, read_threads: int) -> ProfiledMachine:
    """With slots for so many experts, and for all of everything else."""
    spec, sizes, profile = problem.spec, problem.sizes, problem.profile
    keeps_all = slots >= sizes.num_parts[Part.EXPERT]
    costs = OpCost(problem, kv_numbers=kv_numbers(spec), keeps_all=keeps_all)
    shape = PassShape.of(spec, sizes.num_parts.get(Part.HEAD, 0))
    num_bytes = sizes.slot_bytes[Part.EXPERT]
    return ProfiledMachine(costs, shape, slots, num_bytes, read_threads + 1, profile.threads, costs)


def _words(table: ExpertTable) -> str:
    return (
        f"{counted(len(table), 'expert')} in {counted(len(table.layers), 'layer')}, top"
        f" {table.top_k}"
    )

"""How much memory for how many tokens/s, for one answer at a time: a trace of an earlier run,
replayed under several sizes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from windlass.ids import Part
from windlass.perf.sizes import Problem
from windlass.replay.machine import check_model, profiled_machine
from windlass.replay.routing_trace import RoutingTrace
from windlass.replay.study import NamedMachine, StudyWishes, slots_of, study
from windlass.units import counted, format_bytes

_SHARES = (0.1, 0.2, 0.33, 0.5, 0.67, 0.83, 1.0)
# A layer of a replayed pass takes half a millisecond of this process
_MOST_LAYERS, _FEWEST_PASSES = 6000, 300


@dataclass(frozen=True, slots=True)
class SizeReport:
    """`expert_bytes`: of host memory for experts; everything else is in memory beside them."""

    resident: float
    expert_bytes: int
    hits: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class OneSequence:
    """What one answer at a time would take, from a cold start. `passes`: that were replayed."""

    passes: int
    forecast: str
    sizes: tuple[SizeReport, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        return [
            "one answer at a time, by"
            f" {counted(self.passes, 'recorded pass', 'recorded passes')} (forecast:"
            f" {self.forecast}), the first with an empty cache:",
            *(
                f"  {format_bytes(one.expert_bytes)} for {100 * one.resident:.0f} % of the experts:"
                f" {one.tokens_per_s:.3g} tokens/s, {100 * one.hits:.0f} % hits"
                for one in self.sizes
            ),
        ]


def one_sequence(
    trace: RoutingTrace,
    problem: Problem,
    tell: Callable[[str], None],
    *,
    read_threads: int,
    forecast: str,
) -> OneSequence:
    """Of the trace's sequences, one after the other, by `forecast`; by usage where that is the
    default and the trace has no states for it. UsageError where the trace is of another model."""
    # a trace is of passes, which a layer that drafts is no part of
    problem = replace(problem, spec=problem.spec.trunk)
    check_model(trace, problem, problem.spec.family)
    layers = len(trace.table().layers)
    trace = trace.lockstep(1).first(max(_FEWEST_PASSES, _MOST_LAYERS // layers))
    if forecast == "learned" and not trace.has_states:
        forecast = "usage"
    of = partial(profiled_machine, problem, read_threads=read_threads)
    wishes = StudyWishes(
        forecasts=(forecast,), policies=("next-use",), resident=_possible(trace),
        machines=(NamedMachine(problem.profile.name, None, of),), with_recall=False,
    )  # fmt: skip
    found = study(trace, wishes, tell)
    expert_bytes = problem.sizes.slot_bytes[Part.EXPERT]
    return OneSequence(
        len(trace.passes),
        forecast,
        tuple(
            SizeReport(
                run.resident, run.slots * expert_bytes, run.metrics.hits, 1 / run.metrics.token_s
            )
            for run in found.runs
        ),
    )  # fmt: skip


def _possible(trace: RoutingTrace) -> Sequence[float]:
    """Shares with slots for what a token needs of a layer, and one more to read into."""
    return [share for share in _SHARES if slots_of(trace, share) > trace.top_k]

"""A finished run beside what was predicted of it. Pure arithmetic over records; seconds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from windlass.perf.estimate import LANES, Estimate, Phase, predict
from windlass.perf.sizes import Problem
from windlass.phases import PhaseStats
from windlass.plan import Plan
from windlass.units import format_seconds
from windlass.workload import Workload

_EQUAL = 0.02  # shares of a job that are close enough to all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseCheck:
    """Passes of one kind. `bound`: the least seconds of each resource, as in `Phase`; `error`: 0.1
    where 10 % more was predicted than it took, None where nothing ran or rates are assumed."""

    predicted_s: float
    measured_s: float
    predicted_busy: Mapping[str, float]
    measured_busy: Mapping[str, float]
    bound: Mapping[str, float]
    error: float | None

    @property
    def shares_of_bound(self) -> dict[str, float]:
        """Of each resource's least seconds in those that it took: 1 is the bound itself."""
        if not self.measured_s:
            return {}
        return {lane: self.bound[lane] / self.measured_s for lane in LANES if self.bound[lane]}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shares_of_bound": self.shares_of_bound}


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """All phases that were predicted or ran, and "total". What was predicted of a job that ended
    otherwise, by length or by interruption, counts with the share `done` of its tokens. Where
    `rates_assumed`, nobody has measured the machine: how far a prediction is off says nothing."""

    phases: Mapping[str, PhaseCheck]
    done: float
    rates_assumed: bool

    @property
    def total(self) -> PhaseCheck:
        return self.phases["total"]

    @property
    def share_of_bound(self) -> float:
        """How near the run came to the bottleneck of each phase."""
        bound = sum(
            max(phase.bound.values()) for name, phase in self.phases.items() if name != "total"
        )
        return bound / self.total.measured_s if self.total.measured_s else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "share_of_bound": self.share_of_bound,
            "rates_assumed": self.rates_assumed,
            "phases": {name: phase.to_json() for name, phase in self.phases.items()},
        }

    def lines(self) -> list[str]:
        """For people; nothing where nothing ran."""
        if not self.total.measured_s:
            return []
        part = "" if self.done == 1 else f" (for {100 * self.done:.0f} % of the expected tokens)"
        lines = [
            f"predicted{part}: "
            + ", ".join(_words(name, phase) for name, phase in self.phases.items())
        ]
        if self.rates_assumed:
            return [f"{lines[0]} (rates are assumed, not measured: windlass doctor)"]
        shares = self.total.shares_of_bound
        bottleneck = max(shares, key=lambda lane: shares[lane], default="")
        others = ", ".join(f"{lane} {100 * share:.0f} %" for lane, share in shares.items())
        lines.append(
            f"of the bound: {100 * self.share_of_bound:.0f} % reached; least time of each resource"
            f" over the time taken: {others}; bottleneck: {bottleneck}"
        )
        return lines


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is expected of a job, by rates that were measured or assumed."""

    estimate: Estimate
    rates_assumed: bool

    @classmethod
    def of(
        cls, problem: Problem, plan: Plan, work: Workload, known: Estimate | None = None
    ) -> "Prediction":
        """Of the job `work` under `plan`; `known`: its estimate, where it was made already."""
        return cls(known or predict(problem, plan, work), problem.profile.is_assumed)

    def check(self, measured: Mapping[str, PhaseStats], *, is_warm: bool = False) -> Accuracy:
        """What the run took beside it."""
        return compare(self.estimate, measured, rates_assumed=self.rates_assumed, is_warm=is_warm)


def compare(
    predicted: Estimate,
    measured: Mapping[str, PhaseStats],
    *,
    rates_assumed: bool = False,
    is_warm: bool = False,
) -> Accuracy:
    """Phase by phase. What the first pass takes longer counts as prefill, where it is measured; not
    where the run `is_warm`: not the first of its engine, so that weights are in memory."""
    phases = {name: phase for name, phase in predicted.phases.items() if name != "load"}
    # of prompts, both count what is computed, not what is found
    rows = sum(phase.prompt_tokens + phase.output_tokens for phase in phases.values())
    ran = sum(phase.prompt_tokens + phase.output_tokens for phase in measured.values())
    done = ran / rows if rows else 0.0
    done = 1.0 if abs(done - 1) <= _EQUAL else done
    load = None if is_warm else predicted.phases.get("load")
    found = {
        name: _phase(
            [phases.get(name), load if name == "prefill" else None],
            measured.get(name, PhaseStats()),
            done,
        )
        for name in ("prefill", "mixed", "decode")
        if name in phases or name in measured
    }
    total = sum(measured.values(), PhaseStats())
    found["total"] = _phase([load, *phases.values()], total, done)
    if rates_assumed:
        found = {name: replace(phase, error=None) for name, phase in found.items()}
    return Accuracy(phases=found, done=done, rates_assumed=rates_assumed)


def _phase(predicted: list[Phase | None], took: PhaseStats, done: float) -> PhaseCheck:
    known = [phase for phase in predicted if phase is not None]
    predicted_s = done * sum(phase.seconds for phase in known)
    return PhaseCheck(
        predicted_s=predicted_s,
        measured_s=took.seconds,
        predicted_busy={lane: done * sum(p.busy[lane] for p in known) for lane in LANES},
        measured_busy={lane: took.busy.get(lane, 0.0) for lane in LANES},
        bound={lane: done * sum(p.bound[lane] for p in known) for lane in LANES},
        error=predicted_s / took.seconds - 1 if took.seconds else None,
    )


def _words(name: str, phase: PhaseCheck) -> str:
    error = "" if phase.error is None else f" ({100 * phase.error:+.0f} %)"
    predicted, measured = format_seconds(phase.predicted_s), format_seconds(phase.measured_s)
    return f"{name} {predicted}, took {measured}{error}"

"""What an engine may expect of the jobs it runs, by the plan and the profile it was opened with."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from windlass.engine.expectation import Rates
from windlass.ids import DISK, HOST
from windlass.perf.accuracy import Accuracy, Prediction
from windlass.perf.estimate import predict
from windlass.phases import PhaseStats
from windlass.plan import Plan
from windlass.planner.choose import Chosen
from windlass.workload import Workload

_STAT = Path("/proc/stat")
_USUAL = 256, 64  # tokens in and out; the rate hardly depends on them
_BUSY = 0.1  # of the processors' time: more than this, in other programs, slows a run


class OtherWork:
    """Processor time that other programs take, since this was made."""

    def __init__(self) -> None:
        self._before = _processor_seconds()

    def share(self) -> float:
        """Of all processors' time, from 0 to 1; 0 where the system does not tell."""
        spent = [
            now - before for now, before in zip(_processor_seconds(), self._before, strict=True)
        ]
        whole, busy, own = spent
        return max(0.0, min(1.0, (busy - own) / whole)) if whole > 0 else 0.0


def _processor_seconds() -> tuple[float, float, float]:
    """In all, busy, and of these for this process; since the system started."""
    if not _STAT.exists():
        return 0.0, 0.0, 0.0
    user, nice, system, idle, iowait, irq, soft, steal = map(
        int, _STAT.read_text().splitlines()[0].split()[1:9]
    )
    tick = os.sysconf("SC_CLK_TCK")
    busy = (user + nice + system + irq + soft + steal) / tick
    own = os.times()
    return busy + (idle + iowait) / tick, busy, own.user + own.system


@dataclass(frozen=True, slots=True)
class Compared:
    """A run beside its prediction. `others`: share of the processors' time that other programs took
    since the engine was opened, which no prediction could know."""

    accuracy: Accuracy
    others: float

    def lines(self) -> list[str]:
        """For people; no percentage where it would say nothing of the prediction."""
        found = self.accuracy
        if self.others < _BUSY or found.rates_assumed:
            return found.lines()
        phases = {name: replace(phase, error=None) for name, phase in found.phases.items()}
        lines = replace(found, phases=phases).lines()
        if lines:
            lines[0] += f"; other programs took {100 * self.others:.0f} % of the processors' time"
        return lines

    def to_json(self) -> dict[str, Any]:
        return {**self.accuracy.to_json(), "others_cpu_share": self.others}


class EngineExpectation:
    """Predictions for one engine, by what was chosen for it."""

    def __init__(self, chosen: Chosen) -> None:
        self._chosen = chosen
        self._others = OtherWork()

    def rates(self, plan: Plan, sequences: int) -> Rates:
        """As `engine/expectation.py` says, of answers of usual length."""
        problem = self._chosen.problem
        work = Workload.from_lengths(*_USUAL, sequences).shortened(plan.max_model_len)
        profile = problem.profile
        links = {DISK: profile.disk.points[-1][1]}
        if profile.down is not None:
            links[HOST] = profile.down.rate.points[-1][1]
        found = predict(problem, plan, work)
        return Rates(found.decode_tokens_s, links, profile.is_assumed)

    def compare(
        self, plan: Plan, work: Workload | None, phases: Mapping[str, PhaseStats], *, is_warm: bool
    ) -> Compared | None:
        """As `engine/expectation.py` says."""
        if work is None:
            prediction = self._chosen.prediction
        else:
            prediction = Prediction.of(self._chosen.problem, plan, work)
        if prediction is None:
            return None
        return Compared(prediction.check(phases, is_warm=is_warm), self._others.share())

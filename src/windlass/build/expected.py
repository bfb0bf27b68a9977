"""What an engine may expect of the jobs it runs, by the plan and the profile it was opened with."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from windlass.hardware.profile import HardwareProfile
from windlass.models.spec import ModelSpec
from windlass.perf.accuracy import Accuracy, compare
from windlass.perf.estimate import Estimate
from windlass.perf.sizes import Sizes
from windlass.phases import PhaseStats
from windlass.plan import Plan
from windlass.planner.pilot import Problem, predict
from windlass.workload import Workload

_STAT = Path("/proc/stat")
_BUSY = 0.1  # of the processors' time: more than this, in other programs, slows a run


class OtherWork:
    """Processor time that other programs take, since this was made."""

    def __init__(self) -> None:
        self._before = _processor_seconds()

    def share(self) -> float:
        """Of all processors' time, from 0 to 1; 0 where the system does not tell."""
        spent = [now - before for now, before in zip(_processor_seconds(), self._before, strict=True)]
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


class Expected:
    """Predictions for one engine. `work`: the job that it was planned for, if any, and `estimate`
    what the planner expects of it; estimated when first asked for where it is None."""

    def __init__(
        self,
        spec: ModelSpec,
        sizes: Sizes,
        profile: HardwareProfile,
        *,
        work: Workload | None = None,
        estimate: Estimate | None = None,
    ) -> None:
        self._spec = spec
        self._sizes = sizes
        self._profile = profile
        self._work = work
        self._estimate = estimate
        self._others = OtherWork()

    def compare(
        self, plan: Plan, work: Workload | None, phases: Mapping[str, PhaseStats], *, is_warm: bool
    ) -> Compared | None:
        """As `engine/expectation.py` says."""
        predicted = self._estimate if work is None else None
        work = work or self._work
        if work is None:
            return None
        if predicted is None:
            problem = Problem(
                spec=self._spec, sizes=self._sizes, plan=plan, profile=self._profile, workload=work
            )
            predicted = predict(problem)
        assumed = self._profile.source == "assumed"
        found = compare(predicted, phases, rates_assumed=assumed, is_warm=is_warm)
        return Compared(found, self._others.share())

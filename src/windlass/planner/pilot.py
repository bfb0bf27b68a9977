"""Watches a run: passes beside what they were predicted to take. Where they differ, the rates of
the profile are rescaled, and what a plan can change without other memory is planned anew."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from windlass.hardware.profile import Curve, HardwareProfile, Processor
from windlass.models.spec import ModelSpec
from windlass.perf.accuracy import Accuracy, compare
from windlass.perf.estimate import Estimate, estimate
from windlass.perf.job_passes import Limits, PassRun, compose
from windlass.perf.op_cost import Seen
from windlass.perf.simulation import PassTimes
from windlass.perf.sizes import Sizes
from windlass.phases import PhaseStats
from windlass.plan import Plan
from windlass.planner.budget import bytes_here
from windlass.schedule.batch import CHUNK_TOKENS, Segment
from windlass.units import round_up
from windlass.workload import Workload

TOLERANCE = 0.2  # of predicted over measured, beyond which rates are rescaled
_WINDOW = 4  # passes that are judged together, at least
_WINDOW_S = 2.0  # that they take, at least; twice as much after every time rates were rescaled
_WORTH_S = 20.0  # of time left, for which a search of a second or two pays
_GAIN = 0.05  # of the time that is left, below which a plan stays as it is
_LEAST_SHARE = 0.05  # of the time, below which a lane says nothing of its rate
_FEW_SEQUENCES = 256  # that stand for a job where single passes are timed
_FACTORS = (0.5, 1.0, 2.0)
_PROMPT_SHARES = (0.5, 0.25)  # of the rows of a pass that also decodes
_CLOCKED = 2  # other plans that run on the clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a run was planned for."""

    spec: ModelSpec
    sizes: Sizes
    plan: Plan
    profile: HardwareProfile
    workload: Workload


class Pilot:
    """One run's observer."""

    def __init__(
        self,
        problem: Problem,
        predicted: Estimate | None = None,
        *,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`predicted`: of the problem, estimated here if None. `tell` is called once, when the
        prediction first fails."""
        problem = _as_planned(problem)
        self._problem = problem
        self._predicted = predicted or predict(problem)
        self._tell = tell
        self._plan = problem.plan
        self._profile = problem.profile
        self._times: PassTimes | None = None
        self._slower = 1.0  # what the rates alone do not explain
        self._window: list[tuple[PassRun, PhaseStats]] = []
        self._window_s = _WINDOW_S
        self._is_first = True
        self._most_seqs = problem.plan.max_num_seqs  # that may still run
        self._said: str | None = None

    def check(self, phases: Mapping[str, PhaseStats]) -> Accuracy:
        """All that ran beside the prediction that was made at the start."""
        return compare(self._predicted, phases, replanned=self._said)

    def after(
        self,
        segments: Sequence[Segment],
        took: PhaseStats,
        left: Callable[[], Sequence[tuple[int, int, int]]],
    ) -> Plan | None:
        """A step over `segments` has ended. `left`: prompt tokens, tokens to generate, and prompt
        tokens that are found, of every sequence that has not ended. The plan to go on with, if it
        is another."""
        if self._is_first:  # its weights were not there yet
            self._is_first = False
            return None
        self._window.append((run_of(segments), took))
        seconds = sum(one.seconds for _, one in self._window)
        if len(self._window) < _WINDOW or seconds < self._window_s:
            return None
        window, self._window = self._window, []
        ratio = self._judge(window)
        if 1 / (1 + TOLERANCE) <= ratio <= 1 + TOLERANCE:
            return None
        self._window_s *= 2
        factors = self._rescale(window)
        lengths = left()
        plan = self._replan(lengths) if lengths else self._plan
        changes = _changes(self._plan, plan)
        if self._said is None:
            self._said = _sentence(ratio, factors, changes)
            self._tell(self._said)
        if not changes:
            return None
        self._plan, self._times = plan, None  # its passes have other sizes
        self._most_seqs = max(self._most_seqs, plan.max_num_seqs)
        return plan

    def _judge(self, window: Sequence[tuple[PassRun, PhaseStats]]) -> float:
        """Measured over predicted seconds."""
        predicted = sum(self._seconds(run) for run, _ in window)
        return sum(took.seconds for _, took in window) / predicted

    def _seconds(self, run: PassRun) -> float:
        times = self._pass_times()
        return self._slower * (times.of(run).seconds + times.sample_s(run.num_logits))

    def _pass_times(self) -> PassTimes:
        if self._times is None:
            plan, work = self._plan, self._problem.workload
            few = work.evenly(min(work.num_sequences, _FEW_SEQUENCES))
            runs = list(compose(few, Limits.of(plan)))
            self._times = PassTimes(
                self._problem.spec, self._problem.sizes, plan, self._profile, runs
            )
        return self._times

    def _rescale(self, window: Sequence[tuple[PassRun, PhaseStats]]) -> dict[str, float]:
        """Sets the rates to those of the window; by how much, by lane."""
        times, took = self._pass_times(), sum((one for _, one in window), PhaseStats())
        factors: dict[str, float] = {}
        for lane in ("disk", "host"):
            predicted = sum(times.of(run).busy.get(lane, 0.0) for run, _ in window)
            if lane == "host":
                predicted += sum(times.sample_s(run.num_logits) for run, _ in window)
            measured, least = took.busy[lane], _LEAST_SHARE * took.seconds
            is_telling = measured > least and predicted > least
            factors[lane] = predicted / measured if is_telling else 1.0
        self._profile = scaled(self._profile, disk=factors["disk"], host=factors["host"])
        self._times, self._slower = None, 1.0
        self._slower = self._judge(window)
        return factors

    def _replan(self, left: Sequence[tuple[int, int, int]]) -> Plan:
        work = Workload(*zip(*((max(1, p), max(1, g), f) for p, g, f in left), strict=True))
        if self._rest_s(self._plan, work, on_clock=False) < _WORTH_S:
            return self._plan
        most = bytes_here(self._problem.plan, self._problem.spec, self._problem.sizes)
        others = [
            plan
            for plan in variants(self._plan)
            if plan.max_num_seqs <= (plan.state_slots or plan.max_num_seqs)
            and plan.max_num_batched_tokens >= self._most_seqs + CHUNK_TOKENS
            and bytes_here(plan, self._problem.spec, self._problem.sizes) <= most
        ]
        ranked = sorted(others, key=lambda plan: self._rest_s(plan, work, on_clock=False))
        seconds = {
            plan: self._rest_s(plan, work, on_clock=True)
            for plan in [self._plan, *ranked[:_CLOCKED]]
        }
        best = min(seconds, key=lambda plan: seconds[plan])
        return best if seconds[best] < (1 - _GAIN) * seconds[self._plan] else self._plan

    def _rest_s(self, plan: Plan, work: Workload, *, on_clock: bool) -> float:
        problem = self._problem
        found = estimate(problem.spec, problem.sizes, plan, self._profile, work, on_clock=on_clock)
        return found.total_s - found.load_s


def predict(problem: Problem) -> Estimate:
    """What is expected of the problem; sequences longer than the plan allows count as cut."""
    own = _as_planned(problem)
    return estimate(own.spec, own.sizes, own.plan, own.profile, own.workload)


def _as_planned(problem: Problem) -> Problem:
    """With the workload as its plan takes it: sequences cut, prompts shared or not."""
    plan = problem.plan
    work = problem.workload.sharing(plan.prefix_caching).shortened(plan.max_model_len)
    return replace(problem, workload=work)


def variants(plan: Plan) -> list[Plan]:
    """Plans with other numbers of sequences, rows, and prompt rows beside decoding ones; all else
    alike."""
    found: dict[Plan, None] = {}
    for seqs, rows in product(_FACTORS, _FACTORS):
        most = round(rows * plan.max_num_batched_tokens)
        shares = [round_up(round(share * most), CHUNK_TOKENS) for share in _PROMPT_SHARES]
        for mixed in (None, *shares):
            own = replace(
                plan,
                max_num_seqs=max(1, round(seqs * plan.max_num_seqs)),
                max_num_batched_tokens=most,
                mixed_prefill_tokens=mixed,
            )
            if most >= own.max_num_seqs + CHUNK_TOKENS and own != plan:
                found[own] = None
    return list(found)


def run_of(segments: Sequence[Segment]) -> PassRun:
    """The rows of a pass and the positions that they see, as `compose` has them."""
    seen = Seen(0, 0.0, 0, 0.0)
    for segment in segments:
        count = segment.num_tokens
        positions = count * segment.first_position + count * (count + 1) / 2
        own = (0, 0.0, count, positions) if segment.is_prompt else (count, positions, 0, 0.0)
        seen += Seen(*own)
    return PassRun(1, seen, sum(segment.wants_logits for segment in segments))


def scaled(profile: HardwareProfile, *, disk: float, host: float) -> HardwareProfile:
    """The machine with so much higher rates of its disk and its processor."""
    return replace(
        profile, disk=_scaled_curve(profile.disk, disk), host=_scaled_host(profile.host, host)
    )


def _scaled_host(host: Processor, factor: float) -> Processor:
    return replace(
        host,
        memory_rate=factor * host.memory_rate,
        experts={kind: _scaled_curve(curve, factor) for kind, curve in host.experts.items()},
        dense={kind: _scaled_curve(curve, factor) for kind, curve in host.dense.items()},
        decode_attention=factor * host.decode_attention,
        prefill_attention=factor * host.prefill_attention,
        row_rate=factor * host.row_rate,
        call_s=host.call_s / factor,
        expert_s=host.expert_s / factor,
    )


def _scaled_curve(curve: Curve, factor: float) -> Curve:
    return Curve(tuple((size, factor * rate) for size, rate in curve.points))


def _changes(old: Plan, new: Plan) -> list[str]:
    return [
        f"{what} {_or_any(getattr(old, name))} -> {_or_any(getattr(new, name))}"
        for name, what in (
            ("max_num_seqs", "sequences per pass"),
            ("max_num_batched_tokens", "rows per pass"),
            ("mixed_prefill_tokens", "prompt rows beside decoding ones"),
        )
        if getattr(old, name) != getattr(new, name)
    ]


def _or_any(value: int | None) -> str:
    return "any" if value is None else str(value)


def _sentence(ratio: float, factors: Mapping[str, float], changes: Sequence[str]) -> str:
    rates = ", ".join(f"{lane} at {100 * rate:.0f} %" for lane, rate in factors.items())
    then = f"planned anew: {', '.join(changes)}" if changes else "the plan stays as it is"
    return f"passes take {ratio:.2f} times what was predicted ({rates} of its rate); {then}"

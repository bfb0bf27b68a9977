"""How long a job takes under a plan: load, prefill, mixed passes, decode and tail. Pure arithmetic
over descriptions: passes are composed as the engine would, and timed by the schedule on a clock."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from windlass.errors import UsageError
from windlass.perf.bounds import Bounds, bounds_of
from windlass.perf.device_cost import DEVICE_LANES
from windlass.perf.job_passes import Limits, PassRun, compose
from windlass.perf.op_cost import Seen
from windlass.perf.simulation import PassTimes
from windlass.perf.sizes import Problem
from windlass.plan import Plan
from windlass.schedule.batch import CHUNK_TOKENS
from windlass.workload import Workload

LANES = DEVICE_LANES
_PHASES = ("load", "prefill", "mixed", "decode")
_FEW_SEQUENCES = 256  # of a large job, that are looked at one by one
_MOMENT_S = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Passes of one kind. `busy`: seconds that each lane works; `bound`: the least seconds that
    each resource needs (bytes over rate, FLOPs over rate); `bottleneck`: the one that needs
    most."""

    seconds: float
    passes: int
    prompt_tokens: int
    output_tokens: int
    busy: Mapping[str, float]
    bound: Mapping[str, float]
    bottleneck: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A whole job. Seconds, and tokens per second.

    Phases: "load" (what the first pass takes longer because no weights are there yet), "prefill"
    (passes of prompt rows alone), "mixed" (of prompt and generated rows), "decode" (of generated
    rows alone); kinds that do not occur are absent. `prefill_s` is that of prefill and of the mixed
    passes' share of prompt rows, `decode_s` the rest; with `load_s` they add up to `total_s`.

    Prompt tokens of phases and of `prefill_tokens_s` are those computed, as a run counts them;
    `total_tokens_s` counts all.
    """

    prefill_s: float
    decode_s: float
    load_s: float
    total_s: float
    prefill_tokens_s: float
    decode_tokens_s: float
    total_tokens_s: float  # prompt and output, over the whole job
    busy: Mapping[str, float]
    bound: Mapping[str, float]
    bottleneck: str
    phases: Mapping[str, Phase]

    @property
    def share_of_bound(self) -> float:
        """How near the job is to what the bottleneck of each phase allows."""
        least = sum(max(phase.bound.values()) for phase in self.phases.values())
        return least / self.total_s

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def steady_seconds(
    work: Workload, alive: int, rows: float, seconds: Callable[[float, float], float]
) -> float:
    """Seconds of the job as a steady state, in closed form: good enough to rank plans by. `alive`
    sequences run at once, with at most `rows` tokens per pass: the first sequences' prompts, then
    passes until all tokens are generated, some of which carry the prompts of those who come later.
    `seconds(decode tokens, prompt tokens)`: of one pass."""
    output = work.mean_output_tokens
    prompt = work.mean_prompt_tokens - work.mean_shared_tokens  # that is computed
    count = work.num_sequences
    filling = max(1.0, alive * prompt / rows)
    passes = max(max(work.output_tokens) - 1, count * (output - 1) / alive, 0)
    later = max(0.0, work.computed_prompt_tokens - alive * prompt)
    most = max(rows - alive, CHUNK_TOKENS)  # prompt rows beside the rows that decode
    mixed = later / most
    begin = filling * seconds(0, max(1.0, alive * prompt / filling))
    middle = mixed * seconds(alive, min(most, later)) if later else 0.0
    decode = count * (output - 1) / max(passes, 1)
    rest = max(0.0, passes - mixed) * seconds(max(1.0, decode), 0) if passes else 0.0
    return begin + middle + rest


def predict(problem: Problem, plan: Plan, workload: Workload) -> Estimate:
    """The same as `estimate`, but sequences longer than the plan allows count as cut."""
    work = workload.sharing(plan.prefix_caching).shortened(plan.max_model_len)
    return estimate(problem, plan, work)


def estimate(
    problem: Problem, plan: Plan, workload: Workload, *, on_clock: bool = True
) -> Estimate:
    """The job `workload` under `plan`. Without `on_clock` no pass is run on the clock; each is as
    long as its busiest lane works: for comparing many plans.

    Raises UsageError where a sequence is longer than the plan allows, or the profile knows no rate
    for the model's weights.
    """
    if workload.longest > plan.max_model_len:
        raise UsageError(
            f"workload: a sequence has {workload.longest} tokens, allowed {plan.max_model_len}"
        )
    workload = workload.sharing(plan.prefix_caching)
    limits = Limits.of(plan)
    parts = _parts(workload, plan.max_num_seqs)
    composed = [[_as_run(one, plan) for one in compose(part, limits)] for part in parts]
    times = PassTimes(problem, plan, composed[-1], on_clock=on_clock)
    bounds = bounds_of(problem, plan)
    counted = [_count(runs, times, bounds) for runs in composed]
    sums = counted[-1]
    if len(parts) > 1:
        tokens = [part.computed_tokens for part in parts]
        more = (workload.computed_tokens - tokens[1]) / (tokens[1] - tokens[0])
        sums = {
            name: own.beyond(counted[0].get(name, _PhaseSums()), more) for name, own in sums.items()
        }
    sums["load"] = _PhaseSums(
        times.load.seconds, busy=dict(times.load.busy), bound=bounds.load(composed[-1][0])
    )
    return _estimate(workload, sums)


@dataclass(slots=True)
class _PhaseSums:
    """Of passes of one kind."""

    seconds: float = 0.0
    passes: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    prompt_s: float = 0.0  # of `seconds`, the prompt rows' share
    busy: dict[str, float] = field(default_factory=dict)
    bound: dict[str, float] = field(default_factory=dict)

    def add(
        self, one: PassRun, seconds: float, busy: Mapping[str, float], bound: Mapping[str, float]
    ) -> None:
        times, seen = one.repeats, one.seen
        self.seconds += times * seconds
        self.passes += times
        self.prompt_tokens += times * seen.prompt_rows
        self.output_tokens += times * one.num_logits
        self.prompt_s += times * seconds * seen.prompt_rows / seen.num_rows
        for own, values in ((self.busy, busy), (self.bound, bound)):
            for name, value in values.items():
                own[name] = own.get(name, 0.0) + times * value

    def beyond(self, before: "_PhaseSums", more: float) -> "_PhaseSums":
        """These sums and `more` times their growth since `before`."""

        def grown(new: float, old: float) -> float:
            return new + more * max(0.0, new - old)

        plain = ("seconds", "passes", "prompt_tokens", "output_tokens", "prompt_s")
        return _PhaseSums(
            **{name: grown(getattr(self, name), getattr(before, name)) for name in plain},
            busy={k: grown(v, before.busy.get(k, 0.0)) for k, v in self.busy.items()},
            bound={k: grown(v, before.bound.get(k, 0.0)) for k, v in self.bound.items()},
        )


def _as_run(one: PassRun, plan: Plan) -> PassRun:
    """The passes that the plan's schedule makes of one: one, or one for each micro-batch."""
    count = -(-one.num_rows // plan.pass_rows)
    if count == 1:
        return one
    seen = one.seen
    each = Seen(
        round(seen.decode_rows / count),
        seen.decode_positions / count,
        max(round(seen.prompt_rows / count), int(seen.decode_rows < count)),
        seen.prompt_positions / count,
    )
    return PassRun(one.repeats * count, each, round(one.num_logits / count))


def _parts(workload: Workload, max_num_seqs: int) -> list[Workload]:
    """The workload; or, of a large one, evenly chosen sequences, and twice as many: both have the
    same begin and end, so that their difference is the steady state in the middle."""
    few = max(_FEW_SEQUENCES, 2 * max_num_seqs)
    if workload.num_sequences < 3 * few:
        return [workload]
    return [workload.evenly(few), workload.evenly(2 * few)]


def _count(runs: Sequence[PassRun], times: PassTimes, bounds: Bounds) -> dict[str, _PhaseSums]:
    sums: dict[str, _PhaseSums] = {}
    for one in runs:
        timed = times.of(one)
        after = times.sample_s(one.num_logits)
        busy = {**timed.busy, "host": timed.busy["host"] + after}
        own = sums.setdefault(_phase(one.seen), _PhaseSums())
        own.add(one, timed.seconds + after, busy, bounds.of(one))
    return sums


def _phase(seen: Seen) -> str:
    if not seen.prompt_rows:
        return "decode"
    return "mixed" if seen.decode_rows else "prefill"


def _estimate(workload: Workload, sums: Mapping[str, _PhaseSums]) -> Estimate:
    load_s = sums["load"].seconds
    prefill_s = sum(own.prompt_s for own in sums.values())
    total_s = sum(own.seconds for own in sums.values())
    decode_s = total_s - load_s - prefill_s
    phases = {
        name: Phase(
            seconds=own.seconds,
            passes=round(own.passes),
            prompt_tokens=round(own.prompt_tokens),
            output_tokens=round(own.output_tokens),
            busy=_all_lanes(own.busy),
            bound=_all_lanes(own.bound),
            bottleneck=_most(own.bound),
        )
        for name, own in sorted(sums.items(), key=lambda item: _PHASES.index(item[0]))
    }
    bound = {lane: sum(p.bound[lane] for p in phases.values()) for lane in LANES}
    outputs, prompts = workload.total_output_tokens, workload.total_prompt_tokens
    return Estimate(
        prefill_s=prefill_s,
        decode_s=decode_s,
        load_s=load_s,
        total_s=total_s,
        prefill_tokens_s=workload.computed_prompt_tokens / max(prefill_s, _MOMENT_S),
        decode_tokens_s=outputs / max(decode_s, _MOMENT_S),
        total_tokens_s=(prompts + outputs) / max(total_s, _MOMENT_S),
        busy={lane: sum(p.busy[lane] for p in phases.values()) for lane in LANES},
        bound=bound,
        bottleneck=_most(bound),
        phases=phases,
    )


def _all_lanes(values: Mapping[str, float]) -> dict[str, float]:
    return {lane: values.get(lane, 0.0) for lane in LANES}


def _most(values: Mapping[str, float]) -> str:
    return max(values, key=lambda name: values[name]) if values else "host"

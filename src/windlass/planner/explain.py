"""Why a plan is as it is: bytes of every tier and what they hold, what the job takes and what
limits it, what more memory would bring, and the plans that come next. Pure arithmetic over a
search."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from windlass.ids import Part
from windlass.perf.device_cost import few_rows
from windlass.perf.estimate import Estimate
from windlass.perf.flops import num_parameters
from windlass.perf.sizes import Problem, Sizes
from windlass.plan import HOST, PART_WORDS, Plan, TierPlan
from windlass.planner.bursts import MOST_SEQS, find_bursts
from windlass.planner.constraints import PlanConstraints
from windlass.planner.device_budget import row_reads
from windlass.planner.search import Candidate, replanned, search
from windlass.units import GIB, counted, format_bytes, format_seconds
from windlass.workload import Workload

NUM_ALTERNATIVES = 3


@dataclass(frozen=True, slots=True)
class Tier:
    """A memory. `budget`: bytes that may be used, None for a disk. `holds`: bytes by what they are;
    they add up to what is used."""

    name: str
    budget: int | None
    holds: Mapping[str, int]

    @property
    def used(self) -> int:
        return sum(self.holds.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """`more_host_s`, `more_device_s`: seconds that the job would take with one more GiB of that
    memory; of a device None without one."""

    model: str
    machine: str
    rates: str  # where the machine's rates come from
    workload: Workload
    best: Candidate
    alternatives: tuple[Candidate, ...]
    tiers: tuple[Tier, ...]
    more_host_s: float
    more_device_s: float | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data; `plan` is what `--plan` replays."""
        work = self.workload
        return {
            "model": self.model,
            "machine": self.machine,
            "rates": self.rates,
            "workload": {
                "num_sequences": work.num_sequences,
                "prompt_tokens": work.total_prompt_tokens,
                "shared_prompt_tokens": sum(work.shared_tokens),
                "output_tokens": work.total_output_tokens,
                "longest": work.longest,
            },
            "plan": self.best.plan.to_json(),
            "estimate": self.best.estimate.to_json(),
            "share_of_bound": self.best.estimate.share_of_bound,
            "tiers": [
                {"name": t.name, "budget": t.budget, "used": t.used, "holds": dict(t.holds)}
                for t in self.tiers
            ],
            "one_more_gib": {
                name: {"total_s": seconds, "saves_s": self._saves_s(seconds)}
                for name, seconds in self._more().items()
            },
            "alternatives": [
                {"plan": one.plan.to_json(), "estimate": one.estimate.to_json()}
                for one in self.alternatives
            ],
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """For people."""
        work, found = self.workload, self.best.estimate
        return [
            f"model: {self.model}",
            f"machine: {self.machine} (rates: {self.rates})",
            f"workload: {counted(work.num_sequences, 'sequence')},"
            f" {counted(round(work.mean_prompt_tokens), 'token')} in"
            f"{_shared(work)} and {work.mean_output_tokens:.0f} out on average, {work.longest} at"
            " most",
            "",
            *(_tier_line(tier) for tier in self.tiers),
            "",
            f"pass: {_choices(self.best.plan)}",
            f"predicted: {format_seconds(found.total_s)} in all: loading"
            f" {format_seconds(found.load_s)}, prefill {format_seconds(found.prefill_s)}"
            f" ({found.prefill_tokens_s:.3g} tokens/s), decode {format_seconds(found.decode_s)}"
            f" ({found.decode_tokens_s:.3g} tokens/s)",
            *_bottleneck_lines(found),
            *(self._more_line(name, seconds) for name, seconds in self._more().items()),
            *self._alternative_lines(),
            *(f"note: {note}" for note in self.notes),
        ]

    def _more(self) -> dict[str, float]:
        """Seconds with one more GiB, by memory."""
        device = {} if self.more_device_s is None else {"device": self.more_device_s}
        return {"host": self.more_host_s, **device}

    def _saves_s(self, seconds: float) -> float:
        return max(0.0, self.best.estimate.total_s - seconds)

    def _more_line(self, name: str, seconds: float) -> str:
        saved = self._saves_s(seconds)
        if saved < 0.005 * self.best.estimate.total_s:
            return f"one more GiB of {name} memory would bring nothing"
        share = 100 * saved / self.best.estimate.total_s
        return f"one more GiB of {name} memory would save {format_seconds(saved)} ({share:.0f} %)"

    def _alternative_lines(self) -> list[str]:
        if not self.alternatives:
            return ["alternatives: none that fit"]
        best = self.best.estimate.total_s
        return ["alternatives, the best first:"] + [
            f"  {format_seconds(one.estimate.total_s)}"
            f" ({100 * (one.estimate.total_s / best - 1):+.1f} %): {_choices(one.plan)}"
            for one in self.alternatives
        ]


def explain(
    problem: Problem,
    workload: Workload,
    host_memory: int,
    wanted: PlanConstraints,
) -> Explanation:
    """The best plan for the job, and what is to be known of it. BudgetError where nothing fits."""
    spec, sizes, profile = problem.spec, problem.sizes, problem.profile
    found = search(problem, workload, host_memory, wanted)
    best, *others = found
    workload = workload.sharing(best.plan.prefix_caching)
    more_host_s, more_device_s = _with_more(problem, workload, host_memory, wanted, best)
    return Explanation(
        model=f"{spec.family}, {num_parameters(spec) / 1e9:.3g} B parameters,"
        f" {format_bytes(sum(weight_bytes(sizes).values()))} of weights",
        machine=profile.name,
        rates=f"{profile.source} {profile.captured}".strip(),
        workload=workload,
        best=best,
        alternatives=tuple(others[:NUM_ALTERNATIVES]),
        tiers=tiers_of(best.plan, sizes),
        more_host_s=more_host_s,
        more_device_s=more_device_s,
        notes=_notes(problem, best.plan, workload),
    )


def _with_more(
    problem: Problem, work: Workload, host_memory: int, wanted: PlanConstraints, best: Candidate
) -> tuple[float, float | None]:
    """Seconds of the job with one more GiB of host memory, and of device memory. Beside a device
    the choices of the best plan are kept: a search of such plans takes long."""
    device = problem.sizes.device
    if device is None:
        return search(problem, work, host_memory + GIB, wanted)[0].estimate.total_s, None
    larger = replace(device, budget_bytes=device.budget_bytes + GIB)
    richer = replace(problem, sizes=replace(problem.sizes, device=larger))
    return (
        replanned(problem, work, host_memory + GIB, wanted, best).estimate.total_s,
        replanned(richer, work, host_memory, wanted, best).estimate.total_s,
    )


def weight_bytes(sizes: Sizes) -> dict[Part, int]:
    """Of all parts of each kind."""
    return {part: sizes.slot_bytes[part] * count for part, count in sizes.num_parts.items()}


def tiers_of(plan: Plan, sizes: Sizes) -> tuple[Tier, ...]:
    """Every memory of the plan, the host's first, and the disk."""
    return (*(_tier(own, sizes) for own in plan.tiers), disk_tier(plan, sizes))


def _tier(own: TierPlan, sizes: Sizes) -> Tier:
    """What the budget holds; adds up to the plan's total."""
    holds = {
        "process" if own.name == HOST else "context": own.process_bytes,
        "activations": own.activation_bytes,
        "KV cache": own.kv_pages * own.kv_page_bytes,
        "forecast": own.forecast_bytes,
    }
    for part in own.parts:
        if part.slots:
            name = f"{PART_WORDS[part.part]} {part.slots} of {part.num_parts}"
            holds[name] = part.num_bytes
    if own.state_slots:
        states = own.state_slots + own.kept_states
        holds["recurrent states"] = states * sizes.state_bytes
    return Tier(own.name, own.budget_bytes, holds)


def disk_tier(plan: Plan, sizes: Sizes) -> Tier:
    """The checkpoint: what memory holds beside it, and what each pass over all experts reads. Two
    memories hold the same parts, as far as they can."""
    most = {part: max(tier.of(part).slots for tier in plan.tiers) for part in sizes.num_parts}
    kept = sum(sizes.slot_bytes[part] * count for part, count in most.items())
    total = sum(weight_bytes(sizes).values())
    return Tier("disk", None, {"weights also in memory": kept, "weights read": total - kept})


def _tier_line(tier: Tier) -> str:
    of = "" if tier.budget is None else f" of {format_bytes(tier.budget)}"
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in tier.holds.items() if size)
    return f"{tier.name}: {format_bytes(tier.used)}{of}: {parts}"


def _bottleneck_lines(found: Estimate) -> list[str]:
    """The bottleneck of the job, and of each phase of some length."""
    busy = ", ".join(
        f"{_lane(name)} {100 * seconds / found.total_s:.0f} %"
        for name, seconds in found.busy.items()
        if seconds
    )
    lines = [
        f"bottleneck: {_lane(found.bottleneck)}; busy: {busy}; its bound is"
        f" {100 * found.share_of_bound:.0f} % of the time"
    ]
    for name, phase in found.phases.items():
        if phase.passes and phase.seconds >= 0.01 * found.total_s:
            shares = {lane: 100 * s / phase.seconds for lane, s in phase.bound.items() if s}
            others = ", ".join(
                f"{_lane(lane)} {share:.0f} %"
                for lane, share in sorted(shares.items(), key=lambda item: -item[1])
                if lane != phase.bottleneck
            )
            lines.append(
                f"  {name}: {counted(phase.passes, 'pass', 'passes')} in"
                f" {format_seconds(phase.seconds)}, bound by {_lane(phase.bottleneck)}"
                f" ({shares.get(phase.bottleneck, 0.0):.0f} %)"
                + (f", least of others: {others}" if len(shares) > 2 else "")
            )
    return lines


def _lane(name: str) -> str:
    """A resource, for people."""
    return f"link {name}" if name in ("down", "up") else name


def _shared(work: Workload) -> str:
    mean = work.mean_shared_tokens
    return f" ({mean:.0f} of them computed by earlier ones)" if mean else ""


def _choices(plan: Plan) -> str:
    experts = plan.top.of(Part.EXPERT)
    above, streamed = plan.above, plan.kv_offloading_share
    return (
        f"{counted(plan.max_num_seqs, 'sequence')}, {plan.max_num_batched_tokens} tokens,"
        f" attention by {plan.micro_batch_tokens}, KV cache of"
        f" {plan.kv_pages * plan.page_tokens} tokens,"
        f" experts resident {experts.slots} of {experts.num_parts}"
        + (f", {100 * plan.host_attention:.0f} % of attention on the host" if above else "")
        + (f", keys and values of {100 * streamed:.0f} % in RAM" if streamed else "")
        + (f", {100 * plan.host_experts:.0f} % of experts on the host" if plan.host_experts else "")
        + (", generated rows one by one" if plan.generated_experts == "rows" else "")
        + (f", {plan.groups} groups" if plan.groups > 1 else "")
        + (f", bursts of {counted(plan.burst_tokens, 'token')}" if plan.burst_tokens else "")
    )


def _notes(problem: Problem, plan: Plan, workload: Workload) -> tuple[str, ...]:
    notes = problem.spec.limits()
    bursts = find_bursts(problem, plan, workload)
    if bursts is not None and (plan.burst_tokens or bursts.num_sequences <= MOST_SEQS):
        notes += (bursts.line(plan),)
    if plan.above is not None and (rows := few_rows(problem)):
        notes += (
            f"an expert in RAM with up to {counted(rows, 'row')} is computed there sooner than"
            f" fetched; the host computes {100 * plan.host_experts:.0f} % of the experts for"
            f" generated tokens: a"
            " fixed share, so that results depend on nothing else in a pass, and none unless"
            " measured rates say that it pays",
        )
    if plan.generated_experts == "rows":
        rows = plan.max_num_seqs * (1 + problem.sizes.drafts)
        reads = row_reads(problem.spec, rows)
        notes += (
            f"{rows} generated rows a pass, each by itself, read {reads:.2f} times the experts that"
            " tiles of rows would, in kernels that have more under way: for"
            " all generated rows, so that results depend on nothing else in a pass",
        )
    if workload.longest > plan.max_model_len:
        notes += (
            f"sequences longer than {plan.max_model_len} tokens do not fit and count as that long",
        )
    return notes

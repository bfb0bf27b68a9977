"""Looks for the plan that ends a job soonest. Proposes values; planner/budget.py says what fits.

Sequences and tokens per pass (how much prompt is mixed into passes that decode), tokens per call of
attention, and pages of the KV cache are enumerated; all memory that they leave holds weights. A
closed form ranks the whole grid, the passes of a coarse workload rank the best of it, the clock
decides between the last few.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from windlass.errors import BudgetError, UsageError
from windlass.models.spec import ModelSpec
from windlass.perf.device_cost import few_rows
from windlass.perf.device_pass_cost import DevicePassCost, Placed
from windlass.perf.estimate import Estimate, estimate, steady_seconds
from windlass.perf.job_passes import PassRun
from windlass.perf.op_cost import Seen
from windlass.perf.pass_cost import PassCost, held_shares, layer_kinds
from windlass.perf.sizes import Problem, Sizes
from windlass.plan import PAGE_TOKENS, Plan
from windlass.planner.budget import SMALLEST_CONTEXT
from windlass.planner.bursts import with_bursts
from windlass.planner.constraints import PlanConstraints
from windlass.planner.device_budget import plan_for
from windlass.schedule.batch import CHUNK_TOKENS
from windlass.units import round_up
from windlass.workload import Workload

_SEQS = (
    1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048
)  # fmt: skip
_MORE_SEQS = (3072, 4096, 6144)  # where a device's rows take so much less of a pass
_ROWS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_FEW_MICRO_ROWS = 256  # of a call of attention, instead of as many as a plain plan has
# Of the pages that all sequences of a pass would take at their full length: they are not all there
# at once, and who finds none waits or is computed again.
_PAGE_SHARES = (1.0, 0.8, 0.6, 0.4)
_SHARE_STEP = 0.25  # of attention on the host
_EXPERT_SHARES = (0.25, 0.5, 0.75, 1.0)  # of experts on the host, where rows are few
_GROUPS = (1, 2)  # where the host attends: the experts of one beside the attention of the other
_COMPOSED = 18  # plans whose passes are composed
_CLOCKED, _CLOCKED_ABOVE = 6, 4  # plans that run on the clock; with a device, which takes longer
_AS_FAST = 1.005  # of the best plan's seconds: less than estimates can tell apart
_COARSE_WAVES = 2  # of sequences, in the coarse workload
_COARSE_LEVELS = 4  # lengths in it


_Shares = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that fits, and what to expect of it."""

    plan: Plan
    estimate: Estimate


def search(
    problem: Problem,
    workload: Workload,
    host_memory: int,
    wanted: PlanConstraints,
    *,
    context: int | None = None,
) -> list[Candidate]:
    """A few plans within the budget, the soonest to end first with all sequences decoded together;
    whether each then decodes in bursts is decided last. What `wanted` fixes is kept. Sequences
    longer than fits count as long as fits: the engine refuses or shortens them.

    `context`: tokens that one sequence must be able to have, also where the workload has none as
    long. Raises BudgetError where nothing fits, as `make_plan` does.
    """
    machine = _Machine(problem.spec, problem.sizes, host_memory, context or 0)
    work = machine.fitting(workload, wanted)
    seconds_of, sizes = _pass_seconds(problem), problem.sizes
    grid = machine.grid(work, wanted)
    ranked = sorted(grid, key=lambda plan: _closed_form(seconds_of(plan), plan, work))
    some = _spread(ranked, _COMPOSED, each=3)

    def coarse(plan: Plan) -> float:
        part = _coarse(work, plan.max_num_seqs)
        found = estimate(problem, plan, part, on_clock=False)
        more = work.computed_tokens / part.computed_tokens
        return found.load_s + (found.total_s - found.load_s) * more

    most = _CLOCKED if sizes.device is None else _CLOCKED_ABOVE
    best = _spread(sorted(some, key=coarse), most, each=2)
    best += machine.neighbours(best[0], wanted)
    found = [Candidate(plan, estimate(problem, plan, work)) for plan in best]
    least = min(one.estimate.total_s for one in found)

    def rank(one: Candidate) -> tuple[float, int]:
        """Of plans as fast, the one that holds fewer pages, which must be touched before use."""
        return max(one.estimate.total_s, _AS_FAST * least), one.plan.kv_pages

    found.sort(key=rank)
    found = [*machine.with_host_experts(problem, work, found[0], wanted), *found]
    if wanted.burst_tokens is None:
        found = [_with_bursts(problem, one, work) for one in found]
    return found


def replanned(
    problem: Problem, workload: Workload, host_memory: int, wanted: PlanConstraints, best: Candidate
) -> Candidate:
    """The choices of `best` within other budgets."""
    machine = _Machine(problem.spec, problem.sizes, host_memory, 0)
    plan = machine.again(best.plan, wanted)
    work = workload.sharing(plan.prefix_caching).shortened(plan.max_model_len)
    return Candidate(plan, estimate(problem, plan, work))


def _with_bursts(problem: Problem, one: Candidate, work: Workload) -> Candidate:
    """As it decodes best, which the estimate does not know and did not rank by."""
    plan = with_bursts(problem, one.plan, work)
    return one if plan == one.plan else Candidate(plan, estimate(problem, plan, work))


class _Machine:
    """Which plans there are; all methods are pure."""

    def __init__(self, spec: ModelSpec, sizes: Sizes, host_memory: int, context: int) -> None:
        # one layer of each kind is all that a budget asks of a model
        self._spec = replace(spec, blocks=tuple(spec.blocks[i] for i, _ in layer_kinds(spec)))
        self._sizes = sizes
        self._host_memory = host_memory
        self._context = context

    def fitting(self, workload: Workload, wanted: PlanConstraints) -> Workload:
        """The workload with no sequence longer than a plan can hold, and as plans share prompts.
        BudgetError where nothing fits."""
        plain = self._plain(wanted)
        workload, most = workload.sharing(plain.prefix_caching), plain.max_model_len
        if workload.longest <= most:
            return workload
        longest = min(workload.longest, self._spec.max_positions)
        if wanted.max_model_len is None and wanted.kv_pages is None:
            alone = replace(wanted, kv_pages=_pages(longest), max_num_seqs=wanted.max_num_seqs or 1)
            tried = [_with(alone, one) for one in self._shares(wanted)]
            most = longest if any(map(self._plan, tried)) else most
        return workload.shortened(most)

    def grid(self, work: Workload, wanted: PlanConstraints) -> list[Plan]:
        """All plans of the grid that fit, and the one by plain rules."""
        found: dict[Plan, None] = {}
        known = _SEQS if self._sizes.device is None else (*_SEQS, *_MORE_SEQS)
        for seqs in _choices(known, work.num_sequences, wanted.max_num_seqs):
            fewest = round_up(seqs + CHUNK_TOKENS, CHUNK_TOKENS)
            sizes = [fewest, *(rows for rows in _ROWS if rows > fewest)]
            most = max(fewest, seqs + min(seqs, work.num_sequences) * max(work.prompt_tokens))
            for rows in _choices(sizes, most, wanted.max_num_batched_tokens):
                values = replace(wanted, max_num_seqs=seqs, max_num_batched_tokens=rows)
                for pages in self._page_counts(seqs, work, wanted):
                    for one in self._divided(replace(values, kv_pages=pages), work):
                        plans = self._plan(one)
                        found |= {p: None for p in plans if p.max_model_len >= work.longest}
        plain = self._plain(wanted)
        if plain.max_model_len >= work.longest or not found:
            found[plain] = None
        return list(found)

    def neighbours(self, plan: Plan, wanted: PlanConstraints) -> list[Plan]:
        """The same plan with fewer rows per call of attention, and more weights; with a little more
        or less of attention on the host."""
        fixed = _choices_of(plan, wanted)
        found: list[Plan] = []
        if wanted.micro_batch_tokens is None and plan.micro_batch_tokens > _FEW_MICRO_ROWS:
            found += self._plan(replace(fixed, micro_batch_tokens=_FEW_MICRO_ROWS))
        if plan.above is None or wanted.host_attention is not None:
            return found
        host, streamed = plan.shares
        near = (-_SHARE_STEP / 2, _SHARE_STEP / 2)
        for share in (host + more for more in near if not streamed):
            if 0 < share < 1:
                found += self._plan(replace(fixed, host_attention=share))
        if wanted.kv_offloading_share is None:
            for share in (streamed + more for more in near if not host):
                if 0 < share < 1:
                    found += self._plan(replace(fixed, kv_offloading_share=share))
        # few pages, divided otherwise, may be too few of one home
        return [one for one in found if one.max_model_len >= plan.max_model_len]

    def with_host_experts(
        self, problem: Problem, work: Workload, best: Candidate, wanted: PlanConstraints
    ) -> list[Candidate]:
        """`best` with a share of its experts on the host, where measured costs and the clock say
        that it ends sooner so."""
        is_open = best.plan.above is not None and wanted.host_experts is None
        if not is_open or not problem.profile.captured or not few_rows(problem):
            return []
        fixed = replace(_choices_of(best.plan, wanted), kv_pages=best.plan.kv_pages)
        plans = [p for one in _EXPERT_SHARES for p in self._plan(replace(fixed, host_experts=one))]
        tried = [
            Candidate(plan, estimate(problem, plan, work))
            for plan in plans
            if plan.max_model_len >= work.longest
        ]
        sooner = min(tried, key=lambda one: one.estimate.total_s, default=best)
        pays = _AS_FAST * sooner.estimate.total_s < best.estimate.total_s
        return [sooner] if pays else []

    def again(self, plan: Plan, wanted: PlanConstraints) -> Plan:
        """The same choices. BudgetError where they do not fit."""
        fixed = replace(
            _choices_of(plan, wanted), micro_batch_tokens=plan.micro_batch_tokens,
            burst_tokens=plan.burst_tokens,
        )  # fmt: skip
        return plan_for(self._spec, self._sizes, self._host_memory, fixed)

    def _divided(self, values: PlanConstraints, work: Workload) -> Iterator[PlanConstraints]:
        """The values, with what a device leaves to its host; as they are on a machine without."""
        if self._sizes.device is None:
            yield values
            return
        longest = max(work.longest, self._context, 2)
        values = replace(values, max_model_len=values.max_model_len or longest)
        for share in self._shares(values):
            may_group = values.groups is None and share[0] and not share[1]
            for groups in _GROUPS if may_group else (values.groups,):
                yield replace(_with(values, share), groups=groups)

    def _shares(self, wanted: PlanConstraints) -> Sequence[_Shares]:
        """Of sequences that attend on the host, and of those whose keys and values it keeps for the
        device, that are tried: half of each kind where nobody is left on the device."""
        host, streamed = wanted.host_attention, wanted.kv_offloading_share
        if self._sizes.device is None:
            return ((host, streamed),)
        some = [_SHARE_STEP * i for i in range(round(1 / _SHARE_STEP) + 1)]
        if host is not None:
            return [(host, s) for s in (some if streamed is None else [streamed]) if host + s <= 1]
        if streamed is not None:
            return [(s, streamed) for s in some if s + streamed <= 1]
        return [
            *((s, 0.0) for s in some), *((0.0, s) for s in some[1:]),
            (0.5, 0.5),
        ]  # fmt: skip

    def _plain(self, wanted: PlanConstraints) -> Plan:
        """By plain rules; with a device too small for keys and values, those on the host."""
        first, *others = self._shares(wanted)
        try:
            return plan_for(self._spec, self._sizes, self._host_memory, wanted)
        except BudgetError:
            for share in others[::-1]:
                if plans := self._plan(_with(wanted, share)):
                    return plans[0]
            raise

    def _page_counts(self, seqs: int, work: Workload, wanted: PlanConstraints) -> Sequence[int]:
        if wanted.kv_pages is not None:
            return (wanted.kv_pages,)
        context = wanted.max_model_len or min(SMALLEST_CONTEXT, self._spec.max_positions)
        least = _pages(max(work.longest, context, self._context))
        alive = min(seqs, work.num_sequences)
        whole = alive * (_pages(_tokens(work) / work.num_sequences) + 1)
        return sorted({least, *(max(least, int(share * whole)) for share in _PAGE_SHARES)})

    def _plan(self, values: PlanConstraints) -> list[Plan]:
        """The plan with these values, if it fits."""
        try:
            return [plan_for(self._spec, self._sizes, self._host_memory, values)]
        except (BudgetError, UsageError):
            return []


def _with(values: PlanConstraints, shares: _Shares) -> PlanConstraints:
    return replace(values, host_attention=shares[0], kv_offloading_share=shares[1])


def _choices_of(plan: Plan, wanted: PlanConstraints) -> PlanConstraints:
    """What was chosen of the plan beside what follows from it."""
    return replace(
        PlanConstraints.of(plan), expert_slots=wanted.expert_slots,
        micro_batch_tokens=wanted.micro_batch_tokens, burst_tokens=wanted.burst_tokens,
        max_model_len=wanted.max_model_len if plan.above is None else plan.max_model_len,
        prefix_caching=wanted.prefix_caching,
    )  # fmt: skip


def _choices(values: Iterable[int], most: int, fixed: int | None) -> list[int]:
    """The fixed value, or those below `most` and the first beyond it."""
    if fixed is not None:
        return [fixed]
    ordered = sorted(values)
    return [*(v for v in ordered if v < most), *[v for v in ordered if v >= most][:1]]


def _spread(plans: Sequence[Plan], most: int, *, each: int) -> list[Plan]:
    """The first of the plans, at most `each` of as many sequences: neighbours are much alike, and
    what ranks them does not know all."""
    kept: list[Plan] = []
    counts: Counter[int] = Counter()
    for plan in plans:
        if len(kept) < most and counts[plan.max_num_seqs] < each:
            counts[plan.max_num_seqs] += 1
            kept.append(plan)
    return kept


PassSeconds = Callable[[PassRun], float]


def _pass_seconds(problem: Problem) -> Callable[[Plan], PassSeconds]:
    """Of passes under any plan, by a closed form."""
    sizes = problem.sizes
    if sizes.device is None:
        cost = PassCost(problem)

        def on_host(plan: Plan) -> PassSeconds:
            held = held_shares(plan, sizes)
            return lambda one: cost.of(one, held).seconds

        return on_host
    device_cost = DevicePassCost(problem)

    def on_device(plan: Plan) -> PassSeconds:
        placed = Placed.of(plan, sizes)
        return lambda one: device_cost.of(one, placed).seconds

    return on_device


def _closed_form(pass_seconds: PassSeconds, plan: Plan, work: Workload) -> float:
    """Seconds of the job as a steady state."""
    prompt, output = work.mean_prompt_tokens, work.mean_output_tokens
    hold = plan.kv_pages * plan.page_tokens / (prompt + output / 2 + plan.page_tokens / 2)
    alive = max(1, min(plan.max_num_seqs, work.num_sequences, int(hold)))
    middle = (prompt + work.mean_shared_tokens) / 2  # positions that a prompt row sees

    def seconds(decode: float, prefill: float) -> float:
        seen = Seen(round(decode), decode * (prompt + output / 2), round(prefill), prefill * middle)
        return pass_seconds(PassRun(1, seen, max(1, round(decode))))

    return steady_seconds(work, alive, plan.max_num_batched_tokens, seconds)


def _coarse(work: Workload, max_num_seqs: int) -> Workload:
    """A few waves of sequences of a few lengths: those of the job, in groups of equal number."""
    count = min(work.num_sequences, max(8, _COARSE_WAVES * max_num_seqs))
    ordered = sorted((output, prompt, shared) for prompt, output, shared in work.lengths())
    levels = min(_COARSE_LEVELS, len(ordered))
    lengths: list[tuple[int, int, int]] = []
    for level in range(levels):
        own = ordered[level * len(ordered) // levels : (level + 1) * len(ordered) // levels]
        means = (round(sum(values) / len(own)) for values in zip(*own, strict=True))
        output, prompt, shared = means
        lengths.append((prompt, output, min(shared, prompt - 1)))
    longest = max(prompt + output for prompt, output, _ in lengths)
    assert longest <= work.longest + 1
    return Workload(*zip(*(lengths[i % levels] for i in range(count)), strict=True))


def _tokens(work: Workload) -> int:
    return work.total_prompt_tokens + work.total_output_tokens


def _pages(tokens: float) -> int:
    return max(1, int(-(-tokens // PAGE_TOKENS)))

"""The plan of a run: searched for a job whose lengths are known, by plain rules for any other."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from windlass.errors import BudgetError
from windlass.perf.accuracy import Prediction
from windlass.perf.estimate import Estimate
from windlass.perf.sizes import Problem
from windlass.plan import Plan
from windlass.planner.bursts import with_bursts
from windlass.planner.constraints import PlanConstraints
from windlass.planner.device_budget import plan_for
from windlass.planner.search import Candidate, search
from windlass.units import counted, format_seconds
from windlass.workload import USUAL_OUTPUT, Job, Workload

_USUAL_CONTEXT = 4096  # that answers without a limit may have, where there is room


def single_request(prompt_tokens: int, max_tokens: int | None) -> Job:
    """A job of one answer."""
    output = max_tokens or USUAL_OUTPUT
    return Job(Workload((max(1, prompt_tokens),), (output,)), max_tokens is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A plan for a problem, as its process weighs in the end; the job that it was chosen for and
    its estimate, both None where it was made by plain rules."""

    problem: Problem
    plan: Plan
    workload: Workload | None = None
    estimate: Estimate | None = None

    @property
    def prediction(self) -> Prediction | None:
        """What is expected of the job; None without one."""
        if self.workload is None:
            return None
        return Prediction.of(self.problem, self.plan, self.workload, self.estimate)

    def lines(self) -> list[str]:
        """For people: what is expected, and what that rests on."""
        if self.estimate is None or self.workload is None:
            return []
        found, work, profile = self.estimate, self.workload, self.problem.profile
        rates = (
            "assumed (windlass doctor measures them)"
            if profile.is_assumed
            else f"{profile.source} {profile.captured}"
        )
        return [
            f"plan: for {counted(work.num_sequences, 'sequence')} of"
            f" {work.mean_prompt_tokens:.0f} tokens in and {work.mean_output_tokens:.0f} out:"
            f" about {format_seconds(found.total_s)},"
            f" {found.total_tokens_s:.3g} tokens/s, bottleneck {found.bottleneck}; rates {rates}"
        ]


def choose_plan(
    problem: Problem,
    job: Job,
    host_memory: int,
    wanted: PlanConstraints,
    *,
    growth: Callable[[], int] = lambda: 0,
) -> Chosen:
    """The best plan that the search finds. `growth`: bytes that the process has grown by since
    its sizes were measured, which the search itself adds to.

    Raises BudgetError where nothing fits."""
    wanted = replace(wanted, kept_states=0)  # a job's prompts are no turns of a chat
    context = None
    if not job.is_bounded:
        plain = plan_for(problem.spec, problem.sizes, host_memory, wanted)
        context = min(plain.max_model_len, _USUAL_CONTEXT)
    found = search(problem, job.workload, host_memory, wanted, context=context)
    weighs = problem.sizes.process_bytes + max(0, growth())
    problem = replace(problem, sizes=replace(problem.sizes, process_bytes=weighs))
    for best in found:
        plan = _again(problem, host_memory, wanted, best)
        if plan is not None:
            return Chosen(problem=problem, plan=plan, workload=job.workload, estimate=best.estimate)
    return plain_plan(problem, host_memory, wanted)


def plain_plan(problem: Problem, host_memory: int, wanted: PlanConstraints) -> Chosen:
    """By plain rules, for whatever comes. BudgetError where nothing fits."""
    plan = plan_for(problem.spec, problem.sizes, host_memory, wanted)
    if wanted.burst_tokens is None:
        plan = with_bursts(problem, plan, None)
    return Chosen(problem=problem, plan=plan)


def _again(
    problem: Problem, host_memory: int, wanted: PlanConstraints, best: Candidate
) -> Plan | None:
    """The same choices beside a process that has grown; None if they fit no more."""
    plan = best.plan
    values = replace(
        wanted,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        micro_batch_tokens=plan.micro_batch_tokens,
        kv_pages=plan.kv_pages,
    )
    if plan.above is not None:
        values = replace(
            values, groups=plan.groups, max_model_len=plan.max_model_len,
            host_attention=plan.host_attention, kv_offloading_share=plan.kv_offloading_share,
            host_experts=plan.host_experts,
        )  # fmt: skip
    try:
        again = plan_for(problem.spec, problem.sizes, host_memory, values)
    except BudgetError:
        return None
    return replace(again, burst_tokens=plan.burst_tokens, burst_max_seqs=plan.burst_max_seqs)

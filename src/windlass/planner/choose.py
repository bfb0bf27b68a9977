"""The plan of a run: searched for a job whose lengths are known, by plain rules for any other."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from windlass.errors import BudgetError
from windlass.hardware.profile import HardwareProfile
from windlass.models.spec import ModelSpec
from windlass.perf.estimate import Estimate
from windlass.perf.sizes import Sizes
from windlass.plan import Plan
from windlass.planner.budget import PlanConstraints, make_plan
from windlass.planner.search import Candidate, search
from windlass.units import format_seconds
from windlass.workload import USUAL_OUTPUT, Job, Workload

_USUAL_CONTEXT = 4096  # that answers without a limit may have, where there is room


def single_request(prompt_tokens: int, max_tokens: int | None) -> Job:
    """A job of one answer."""
    output = max_tokens or USUAL_OUTPUT
    return Job(Workload((max(1, prompt_tokens),), (output,)), max_tokens is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A plan, and what it was chosen for: all None where it was made by plain rules."""

    plan: Plan
    sizes: Sizes
    estimate: Estimate | None = None
    workload: Workload | None = None
    profile: HardwareProfile | None = None

    def lines(self) -> list[str]:
        """For people: what is expected, and what that rests on."""
        if self.estimate is None or self.workload is None or self.profile is None:
            return []
        found, work = self.estimate, self.workload
        sequences = "1 sequence" if work.num_sequences == 1 else f"{work.num_sequences} sequences"
        rates = (
            "assumed (windlass doctor measures them)"
            if self.profile.source == "assumed"
            else f"{self.profile.source} {self.profile.captured}"
        )
        return [
            f"plan: for {sequences} of {work.mean_prompt_tokens:.0f} tokens in"
            f" and {work.mean_output_tokens:.0f} out: about {format_seconds(found.total_s)},"
            f" {found.total_tokens_s:.3g} tokens/s, bottleneck {found.bottleneck}; rates {rates}"
        ]


def choose_plan(
    spec: ModelSpec,
    sizes: Sizes,
    profile: HardwareProfile,
    job: Job,
    host_memory: int,
    wanted: PlanConstraints,
    *,
    growth: Callable[[], int] = lambda: 0,
) -> Chosen:
    """The best plan that the search finds. `growth`: bytes that the process has grown by since
    `sizes` was made, which the search itself adds to.

    Raises BudgetError where nothing fits."""
    context = None
    if not job.is_bounded:
        plain = make_plan(spec, sizes, host_memory, wanted)
        context = min(plain.max_model_len, _USUAL_CONTEXT)
    found = search(spec, sizes, profile, job.workload, host_memory, wanted, context=context)
    sizes = replace(sizes, process_bytes=sizes.process_bytes + max(0, growth()))
    for best in found:
        plan = _again(spec, sizes, host_memory, wanted, best)
        if plan is not None:
            return Chosen(
                plan=plan, sizes=sizes, estimate=best.estimate, workload=job.workload,
                profile=profile,
            )  # fmt: skip
    return Chosen(plan=make_plan(spec, sizes, host_memory, wanted), sizes=sizes)


def _again(
    spec: ModelSpec, sizes: Sizes, host_memory: int, wanted: PlanConstraints, best: Candidate
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
    try:
        return make_plan(spec, sizes, host_memory, values)
    except BudgetError:
        return None

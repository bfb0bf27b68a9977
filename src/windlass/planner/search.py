"""Looks for the plan that ends a job soonest. Proposes values; planner/budget.py says what fits.

Sequences per pass, rows per pass (how much prompt is mixed into passes that decode), rows per call
of attention, and pages of keys and values are enumerated; all memory that they leave holds weights.
A closed form ranks the whole grid, passes composed for a coarse workload rank the best of it, the
clock decides between the last few.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from windlass.errors import BudgetError, UsageError
from windlass.hardware.profile import HardwareProfile
from windlass.plan import Plan
from windlass.planner.budget import PAGE_TOKENS, Sizes, Wanted, make_plan
from windlass.planner.compose import PassRun
from windlass.planner.costs import Seen
from windlass.planner.estimate import Estimate, estimate
from windlass.planner.timing import PassTimes, layer_kinds
from windlass.schedule.batch import CHUNK_TOKENS
from windlass.spec.model import ModelSpec
from windlass.units import round_up
from windlass.workload import Workload

_SEQS = (
    1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048
)  # fmt: skip
_ROWS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_MICRO_ROWS = (1024, 256)
# Of the pages that all sequences of a pass would take at their full length: they are not all there
# at once, and who finds none waits or is computed again.
_PAGE_SHARES = (1.0, 0.8, 0.6, 0.4)
_COMPOSED = 12  # plans whose passes are composed
_CLOCKED = 4  # plans that run on the clock
_LEVELS = 4  # lengths of the coarse workload
_COARSE_WAVES = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that fits, and what to expect of it."""

    plan: Plan
    estimate: Estimate


def search(
    spec: ModelSpec,
    sizes: Sizes,
    profile: HardwareProfile,
    workload: Workload,
    host_memory: int,
    wanted: Wanted,
) -> list[Candidate]:
    """Plans within the budget, the soonest to end first; what `wanted` fixes is kept. Sequences
    longer than fits count as long as fits: the engine refuses or shortens them.

    Raises BudgetError where nothing fits, as `make_plan` does.
    """
    problem = _Problem(spec, sizes, profile, workload, host_memory, wanted)
    plans = problem.ranked(problem.plans())[:_COMPOSED]
    more = [p for plan in plans for p in problem.with_other_micro_batches(plan)]
    best = problem.compared([*plans, *more])[:_CLOCKED]
    found = [problem.on_clock(plan) for plan in best]
    return sorted(found, key=lambda one: one.estimate.total_s)


class _Problem:
    def __init__(
        self,
        spec: ModelSpec,
        sizes: Sizes,
        profile: HardwareProfile,
        workload: Workload,
        host_memory: int,
        wanted: Wanted,
    ) -> None:
        self._spec = spec
        # one layer of each kind: all that the budget asks of a model
        self._kinds = replace(spec, blocks=tuple(spec.blocks[i] for i, _ in layer_kinds(spec)))
        self._sizes = sizes
        self._profile = profile
        self._host_memory = host_memory
        self._wanted = wanted
        self._default = make_plan(self._kinds, sizes, host_memory, wanted)
        self._workload = self._fitting(workload)

    def plans(self) -> list[Plan]:
        """All that fit of the grid, and the plan by plain rules."""
        found = {self._default: None} if self._holds(self._default) else {}
        count, tokens = self._workload.num_sequences, _tokens(self._workload)
        for seqs in _up_to(_SEQS, count, self._wanted.max_num_seqs):
            fewest = round_up(seqs + CHUNK_TOKENS, CHUNK_TOKENS)
            sizes = [fewest, *(rows for rows in _ROWS if rows > fewest)]
            for rows in _up_to(sizes, max(tokens, fewest), self._wanted.max_num_batched_tokens):
                found |= dict.fromkeys(self._with_pages(seqs, rows))
        return list(found) or [self._default]

    def with_other_micro_batches(self, plan: Plan) -> list[Plan]:
        """The same with fewer rows per call of attention."""
        if self._wanted.micro_batch_tokens is not None:
            return []
        values = replace(
            self._wanted,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            kv_pages=plan.kv_pages,
        )
        others = [rows for rows in _MICRO_ROWS if rows < plan.micro_batch_tokens]
        return [p for m in others for p in self._plan(replace(values, micro_batch_tokens=m))]

    def ranked(self, plans: Iterable[Plan]) -> list[Plan]:
        """By the closed form."""
        return sorted(plans, key=self._closed_form)

    def compared(self, plans: Iterable[Plan]) -> list[Plan]:
        """By the passes of a coarse workload, each as long as its busiest lane works."""
        return sorted(plans, key=self._coarse)

    def on_clock(self, plan: Plan) -> Candidate:
        found = estimate(self._spec, self._sizes, plan, self._profile, self._workload)
        return Candidate(plan, found)

    def _fitting(self, workload: Workload) -> Workload:
        """The workload with sequences cut to what any plan can hold."""
        if workload.longest <= self._default.max_model_len:
            return workload
        most = self._default.max_model_len
        if self._wanted.max_model_len is None and self._wanted.kv_pages is None:
            longest = min(workload.longest, self._spec.max_positions)
            if self._plan(replace(self._wanted, kv_pages=_pages(longest))):
                most = longest
        prompts = tuple(min(p, most - 1) for p in workload.prompt_tokens)
        lengths = zip(prompts, workload.output_tokens, strict=True)
        return Workload(prompts, tuple(min(g, most - p) for p, g in lengths))

    def _with_pages(self, seqs: int, rows: int) -> list[Plan]:
        values = replace(self._wanted, max_num_seqs=seqs, max_num_batched_tokens=rows)
        if self._wanted.kv_pages is not None:
            return self._plan(values)
        least = max(_pages(self._workload.longest), _pages(self._context()))
        whole = seqs * _pages(_tokens(self._workload) / self._workload.num_sequences)
        shares = {max(least, int(share * whole)) for share in _PAGE_SHARES}
        return [p for pages in shares for p in self._plan(replace(values, kv_pages=pages))]

    def _context(self) -> int:
        """What one sequence must be able to have in any case: requests may ask for it."""
        return self._wanted.max_model_len or self._default.max_model_len_least

    def _plan(self, values: Wanted) -> list[Plan]:
        try:
            plan = make_plan(self._kinds, self._sizes, self._host_memory, values)
        except (BudgetError, UsageError):
            return []
        return [plan] if self._holds(plan) else []

    def _holds(self, plan: Plan) -> bool:
        return self._workload.longest <= plan.max_model_len if hasattr(self, "_workload") else True

    def _closed_form(self, plan: Plan) -> float:
        """Seconds: the first sequences' prompts, then passes until all tokens are generated, of which
        some carry the prompts of those who come later."""
        work, rows = self._workload, plan.max_num_batched_tokens
        count = work.num_sequences
        prompt, output = work.mean_prompt_tokens, work.mean_output_tokens
        held = plan.kv_pages * plan.page_tokens / (prompt + output / 2 + plan.page_tokens / 2)
        alive = max(1, min(plan.max_num_seqs, count, int(held)))
        first = _run(0, alive * prompt, prompt, 0.0)
        filling = max(1.0, alive * prompt / rows)
        decode = _run(alive, 0.0, prompt, output)
        passes = max(max(work.output_tokens) - 1, count * (output - 1) / alive)
        later = max(0.0, work.total_prompt_tokens - alive * prompt)
        mixed_rows = max(1.0, rows - alive / 2)
        mixed = min(passes, later / mixed_rows) if later else 0.0
        full = _run(alive, min(mixed_rows, later), prompt, output)
        times = PassTimes(
            self._kinds_whole, self._sizes, plan, self._profile, [first], on_clock=False
        )
        return (
            filling * times.reckoned_s(_capped(first, rows))
            + max(0.0, passes - mixed) * times.reckoned_s(decode)
            + max(mixed, later / mixed_rows) * times.reckoned_s(full)
        )

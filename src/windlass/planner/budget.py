"""Divides a memory budget: from sizes and hints to a Plan, or to the smallest budget that works.

Plain rules for one machine without measurements. What is fixed by the user is kept or refused.
The size of a pass comes first, then the slots of the reading pipeline, the KV cache (more sequences
per pass), and with what is left weights that stay in memory: every byte of them saves the same
reads per pass, so dense parts, head, experts, embedding in this order.
"""

from collections.abc import Mapping, Sequence

from windlass.errors import BudgetError, UsageError
from windlass.ids import DEVICE, Part
from windlass.models.spec import ModelSpec, Moe
from windlass.perf.sizes import Sizes
from windlass.plan import HOST, PAGE_TOKENS, PART_WORDS, PartSlots, Plan, TierPlan
from windlass.planner.activations import (
    activation_bytes,
    device_activation_bytes,
    gathered_bytes,
    host_expert_bytes,
)
from windlass.planner.constraints import PlanConstraints, check_constraints
from windlass.runtime.kv_rounds import half_bytes
from windlass.schedule.batch import CHUNK_TOKENS, most_drafts
from windlass.units import MIB, format_bytes, round_up

READ_THREADS = 4
_SEQS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
_ROWS = (8192, 4096, 2048, 1024, 512, 256, 128)  # a pass has room for all sequences and a chunk
_MICRO_ROWS = 1024  # of a call of attention
# Where the model does not fit, a pass reads most of it whatever it computes: tokens per pass
# count for more than resident experts, so activations and the KV cache come first.
_ACTIVATION_SHARE = 0.35  # of what is left after the process itself
_KV_SHARE = 0.6  # of what is left after activations and the slots of the pipeline
_KV_SHARE_RESIDENT = 0.15  # the same, where all weights fit beside it
_PIPELINE_SLOTS = 8  # experts: one at work, the others arriving, several reads in flight
# Experts are foreseen where they do not all fit and few sequences want them: with many, all of them
# are certain. What that keeps takes the place of experts, so little of it.
MOST_FORESEEN_SEQS = 16
_FORECAST_SHARE = 0.02  # of what is left for experts
# Recurrent states of prompts that other prompts may go on with, where no job is known
_KEPT_STATES = 16  # at most, or as many as sequences
_KEPT_SHARE = 0.05  # of what is left after the KV cache; all of it where all weights fit beside
_USUAL_TOKENS = 1024  # of a sequence, where its length is not limited by the user
# Of a server: chats grow by turns and are kept for the next, and few clients want experts more than
# room for others. Two contexts have room before any expert beyond the pipeline's
_SERVED_TOKENS = 2048
_KV_SHARE_SERVED = 0.3
_SERVED_CONTEXTS = 4  # that fit at once, so that one does not hold up all others
_SERVED_CONTEXT = 4096  # tokens; below, a context may have the whole KV cache
SMALLEST_CONTEXT = 512
_LONGEST_TABLE = 16384  # positions; beyond, the KV cache dwarfs the tables
NOISE_BYTES = 4 * MIB  # the process itself weighs a little more or less in the next run
MIN_SLOTS = {
    Part.EXPERT: 2, Part.BLOCK: 2, Part.FFN: 1, Part.HEAD: 1, Part.JOIN: 1, Part.FINAL: 1,
    Part.EMBED: 0,
}  # fmt: skip


def make_plan(spec: ModelSpec, sizes: Sizes, host_memory: int, wanted: PlanConstraints) -> Plan:
    """The plan for a budget. BudgetError names the smallest budget that works."""
    check_constraints(wanted, spec)
    if wanted.kv_offloading_share:
        raise UsageError(
            f"kv_offloading_share: got {wanted.kv_offloading_share}, allowed 0 without a GPU, whose"
            " memory keys and values would be kept out of"
        )
    draft = Draft(spec, sizes, wanted)
    smallest = draft.smallest()
    if host_memory < smallest:
        raise BudgetError(
            f"host memory: got {format_bytes(host_memory)}, this model needs at least"
            f" {named_budget(smallest + NOISE_BYTES)}"
            f" ({format_bytes(sizes.process_bytes)} for the process itself,"
            f" {format_bytes(smallest - sizes.process_bytes)} to run):"
            " raise --host-memory"
        )
    return draft.fill(host_memory)


def named_budget(num_bytes: int) -> str:
    """As a user may give it."""
    return f"{round_up(num_bytes, 8 * MIB) // MIB}MiB"


def bytes_here(plan: Plan, spec: ModelSpec, sizes: Sizes) -> int:
    """What `plan`, which another process may have made, adds up to in this one."""
    host, seqs, rows = plan.host, plan.max_num_seqs, plan.max_num_batched_tokens
    draft = Draft(spec, sizes, PlanConstraints.of(plan))
    beside = host.forecast_bytes + host.kept_states * sizes.state_bytes
    return draft.total(host.slots, seqs, rows, host.kv_pages) + beside


class Draft:
    """Planning of one memory, that passes work in; all methods are pure."""

    def __init__(self, spec: ModelSpec, sizes: Sizes, wanted: PlanConstraints) -> None:
        self._spec = spec
        self._sizes = sizes
        self._wanted = wanted
        self._page_bytes = page_bytes(sizes) + PAGE_TOKENS * sizes.draft_bytes_per_token
        context = wanted.max_model_len or min(SMALLEST_CONTEXT, spec.max_positions)
        self._context_pages = -(-context // PAGE_TOKENS)

    def smallest(self) -> int:
        """The least total that works with what the user fixed."""
        seqs = self._wanted.max_num_seqs or 1
        rows = self._wanted.max_num_batched_tokens or _fewest_rows(seqs)
        pages = self._wanted.kv_pages or self._context_pages
        return self.total(self._least_slots(), seqs, rows, pages)

    def fill(self, host_memory: int) -> Plan:
        """Grows the smallest plan into the budget."""
        free = host_memory - self._sizes.process_bytes - self._tables()
        slots = self._least_slots()
        least_pages = self._wanted.kv_pages or self._context_pages
        least = self._slots_bytes(slots) + least_pages * self._page_bytes
        seqs, rows = self._pass_size(free, least)
        left = free - self._pass_bytes(seqs, rows)
        piped = slots.get(Part.EXPERT, 0) + _PIPELINE_SLOTS - MIN_SLOTS[Part.EXPERT]
        self._grow(slots, Part.EXPERT, left - least, most=piped)
        pages = self._grow_pages(left - self._slots_bytes(slots), seqs)
        left -= pages * self._page_bytes
        beside = self._slots_bytes(slots), self._slots_bytes(self._sizes.num_parts)
        kept = _kept_states(self._wanted, self._sizes.state_bytes, seqs, [left - b for b in beside])
        left -= kept * self._sizes.state_bytes
        for part in (Part.BLOCK, Part.FFN, Part.HEAD):
            self._grow(slots, part, left - self._slots_bytes(slots))
        forecast = self._forecast(slots, left - self._slots_bytes(slots), seqs)
        left -= forecast
        for part in (Part.EXPERT, Part.EMBED):
            self._grow(slots, part, left - self._slots_bytes(slots))
        return self._plan(host_memory, slots, (seqs, rows, pages), (forecast, kept))

    def _forecast(self, slots: Mapping[Part, int], left: int, seqs: int) -> int:
        """Bytes to foresee experts with, of those that are left for experts beyond their slots."""
        size, count = self._sizes.slot_bytes[Part.EXPERT], self._sizes.num_parts[Part.EXPERT]
        fixed = self._wanted.expert_slots
        missing = count - slots[Part.EXPERT]
        fits = missing == 0 if fixed is not None else missing * size <= left
        if fits or seqs > MOST_FORESEEN_SEQS:
            return 0
        share = int(_FORECAST_SHARE * (left + slots[Part.EXPERT] * size))
        return max(0, min(self._sizes.forecast_bytes, share, left))

    def total(self, slots: Mapping[Part, int], seqs: int, rows: int, pages: int) -> int:
        """Bytes of all that a plan with these choices holds."""
        return (
            self._sizes.process_bytes + self._tables() + self._pass_bytes(seqs, rows)
            + self._slots_bytes(slots) + pages * self._page_bytes
        )  # fmt: skip

    def _pass_size(self, free: int, least: int) -> tuple[int, int]:
        """Sequences and tokens per pass: the largest whose activations keep to their share. What
        the smallest pass takes is not counted against it. Sequences come before tokens."""
        fixed_seqs, fixed_rows = self._wanted.max_num_seqs, self._wanted.max_num_batched_tokens
        floor = self._pass_bytes(fixed_seqs or 1, fixed_rows or _fewest_rows(1))
        limit = floor + int(_ACTIVATION_SHARE * max(0, free - least - floor))
        seqs = fixed_seqs or next(
            s
            for s in _SEQS
            if s == _SEQS[-1] or self._pass_bytes(s, fixed_rows or _fewest_rows(s)) <= limit
        )
        if fixed_rows:
            return min(seqs, fixed_rows - CHUNK_TOKENS), fixed_rows
        fewest = _fewest_rows(seqs)
        fitting = (r for r in _ROWS if r > fewest and self._pass_bytes(seqs, r) <= limit)
        return seqs, next(fitting, fewest)

    def _pass_bytes(self, seqs: int, rows: int) -> int:
        return self._activations(seqs, rows) + seqs * self._sizes.state_bytes

    def _grow_pages(self, left: int, seqs: int) -> int:
        """Pages for `seqs` sequences of usual length, within their share of what is left; of a
        server for all that they may have, where that costs no weights their place."""
        wanted, longest = self._wanted, self._spec.max_positions
        if wanted.kv_pages is not None:
            return wanted.kv_pages
        usual = _SERVED_TOKENS if wanted.serves else _USUAL_TOKENS
        share = _KV_SHARE * left
        if wanted.serves:
            least = 2 * _SERVED_CONTEXT // PAGE_TOKENS * self._page_bytes
            share = max(_KV_SHARE_SERVED * left, min(share, least))
        beside = left - self._slots_bytes(self._sizes.num_parts)  # all weights resident
        if beside > _KV_SHARE_RESIDENT * left:
            share = beside
            usual = longest if wanted.serves else usual
        most = -(-min(wanted.max_model_len or usual, longest) // PAGE_TOKENS) * seqs
        return max(self._context_pages, min(most, int(share) // self._page_bytes))

    def _grow(
        self, slots: dict[Part, int], part: Part, left: int, *, most: int | None = None
    ) -> None:
        """Adds slots of `part` for all of its keys (or `most`), or as many as fit."""
        size, keys = self._sizes.slot_bytes.get(part, 0), self._sizes.num_parts.get(part, 0)
        if not keys or (part is Part.EXPERT and self._wanted.expert_slots is not None):
            return
        more = min((keys if most is None else min(most, keys)) - slots[part], left // size)
        if part is Part.EMBED and more < keys:
            return
        slots[part] += max(0, more)

    def _least_slots(self) -> dict[Part, int]:
        least = MIN_SLOTS | {Part.EXPERT: least_expert_slots(self._spec, self._wanted.groups or 1)}
        slots = {part: min(n, least[part]) for part, n in self._sizes.num_parts.items()}
        if self._wanted.expert_slots is not None and Part.EXPERT in slots:
            slots[Part.EXPERT] = min(self._wanted.expert_slots, self._sizes.num_parts[Part.EXPERT])
        return slots

    def _slots_bytes(self, slots: Mapping[Part, int]) -> int:
        return sum(self._sizes.slot_bytes[part] * count for part, count in slots.items())

    def _micro_rows(self, seqs: int) -> int:
        """Of a call of attention: `seqs` that decode make as many groups as are wanted."""
        groups = self._wanted.groups or 1
        fewest = _MICRO_ROWS if groups == 1 else max(CHUNK_TOKENS, -(-seqs // groups))
        return self._wanted.micro_batch_tokens or min(_MICRO_ROWS, fewest)

    def _activations(self, seqs: int, rows: int) -> int:
        micro = self._micro_rows(seqs)
        is_model_based = self._wanted.schedule == "model-based"
        if self._sizes.backend.name == DEVICE:
            beside = host_expert_bytes(self._spec, seqs) if self._wanted.host_experts else 0
            if self._wanted.kv_offloading_share:
                context = self._wanted.max_model_len or SMALLEST_CONTEXT
                beside += 2 * half_bytes(self._sizes.staged_bytes_per_token, PAGE_TOKENS, context)
            return beside + device_activation_bytes(
                self._spec,
                rows=min(rows, micro) if is_model_based else rows,
                micro_rows=micro,
                seqs=seqs + most_drafts(seqs, self._sizes.drafts),
                context=self._wanted.max_model_len or _LONGEST_TABLE,
            )
        gathered = gathered_bytes(self._spec, rows) if (self._wanted.groups or 1) > 1 else 0
        return gathered + activation_bytes(
            self._spec,
            self._sizes.backend,
            rows=min(rows, micro) if is_model_based else rows,
            micro_rows=micro,
            seqs=seqs + most_drafts(seqs, self._sizes.drafts),
            page_tokens=PAGE_TOKENS,
        )

    def _tables(self) -> int:
        context = self._wanted.max_model_len or self._spec.max_positions
        positions = min(context, _LONGEST_TABLE)
        return positions * self._sizes.bytes_per_position + self._sizes.row_buffer_bytes

    def _plan(
        self,
        host_memory: int,
        slots: Mapping[Part, int],
        size: tuple[int, int, int],
        beside: tuple[int, int],
    ) -> Plan:
        """`beside`: bytes to foresee experts with, and recurrent states that are kept."""
        (seqs, rows, pages), (forecast, kept) = size, beside
        added = forecast + kept * self._sizes.state_bytes
        wanted, sizes = self._wanted, self._sizes
        host = TierPlan(
            name=HOST,
            budget_bytes=host_memory,
            process_bytes=sizes.process_bytes,
            activation_bytes=self._activations(seqs, rows) + self._tables(),
            parts=parts_with(slots, sizes),
            kv_pages=pages,
            kv_page_bytes=page_bytes(sizes),
            state_slots=seqs if sizes.state_bytes else 0,
            total_bytes=self.total(slots, seqs, rows, pages) + added,
            forecast_bytes=forecast,
            kept_states=kept,
        )  # fmt: skip
        return Plan(
            tiers=(host,),
            max_model_len=longest_context(wanted, self._spec, pages, seqs),
            page_tokens=PAGE_TOKENS,
            kv_cache_dtype=sizes.kv_cache_dtype,
            max_num_seqs=seqs,
            max_num_batched_tokens=rows,
            micro_batch_tokens=self._micro_rows(seqs),
            groups=wanted.groups or 1,
            mixed_prefill_tokens=wanted.mixed_prefill_tokens,
            burst_tokens=wanted.burst_tokens or 0,
            burst_max_seqs=seqs if wanted.burst_tokens else 0,
            # with a recurrent state only what goes on from one that is kept is not computed again
            prefix_caching=wanted.prefix_caching and not sizes.state_bytes,
            read_threads=READ_THREADS,
            schedule=wanted.schedule or "module-based",
        )


def longest_context(wanted: PlanConstraints, spec: ModelSpec, pages: int, seqs: int) -> int:
    """Tokens that one sequence may have of `pages`: all, unless less is wanted, or clients of a
    server would wait for it."""
    tokens = pages * PAGE_TOKENS
    if wanted.serves and wanted.max_model_len is None:
        own = tokens // min(seqs, _SERVED_CONTEXTS) // PAGE_TOKENS * PAGE_TOKENS
        tokens = min(tokens, max(own, _SERVED_CONTEXT))
    return min(wanted.max_model_len or spec.max_positions, tokens)


def least_expert_slots(spec: ModelSpec, groups: int) -> int:
    """With several groups all experts of a layer, and one that arrives: each group wants most of
    them, and what has to go for others is read again for the next."""
    least = MIN_SLOTS[Part.EXPERT]
    if groups == 1:
        return least
    networks = [block.ffn for block in spec.blocks]
    of_layer = max((one.num_experts for one in networks if isinstance(one, Moe)), default=0)
    return max(least, of_layer + 1)


def parts_with(slots: Mapping[Part, int], sizes: Sizes) -> tuple[PartSlots, ...]:
    """So many slots, as a tier's plan has them."""
    return tuple(
        PartSlots(
            part=part, slots=slots[part], slot_bytes=sizes.slot_bytes[part],
            num_parts=sizes.num_parts[part],
        )
        for part in PART_WORDS
        if part in slots
    )  # fmt: skip


def page_bytes(sizes: Sizes) -> int:
    """Of one page of the KV cache, in all layers."""
    return max(1, PAGE_TOKENS * sizes.bytes_per_token)


def _fewest_rows(seqs: int) -> int:
    """Tokens of the smallest pass that all sequences and one chunk of a prompt fit into."""
    return round_up(seqs + CHUNK_TOKENS, CHUNK_TOKENS)


def _kept_states(wanted: PlanConstraints, state_bytes: int, seqs: int, left: Sequence[int]) -> int:
    """Recurrent states kept of prompts. `left`: bytes for them beside the fewest weights, and
    beside all."""
    if not state_bytes or not wanted.prefix_caching:
        return 0
    if wanted.kept_states is not None:
        return wanted.kept_states
    few, resident = left
    room = max(_KEPT_SHARE * max(0, few), resident)
    return min(int(room) // state_bytes, max(_KEPT_STATES, seqs))

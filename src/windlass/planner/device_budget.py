"""Divides two memory budgets: that of a device, in whose memory passes work, and that of the host
below it. `plan_for` makes a plan for either kind of machine.

The device has what a host has without one: workspace, slots, keys and values of the sequences that
attend there. The host keeps keys and values of the others, and all weights that it can, but for
kinds that stay on the device for good: of those one slot is enough to pass through.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from windlass.errors import BudgetError
from windlass.ids import DEVICE, HomeShares, Part
from windlass.models.spec import ModelSpec, Moe
from windlass.perf.sizes import Backend, DeviceSizes, Sizes
from windlass.plan import HOST, PAGE_TOKENS, GeneratedExperts, Plan, TierPlan
from windlass.planner.activations import host_side_bytes
from windlass.planner.budget import (
    MOST_FORESEEN_SEQS,
    NOISE_BYTES,
    SMALLEST_CONTEXT,
    Draft,
    longest_context,
    make_plan,
    named_budget,
    page_bytes,
    parts_with,
)
from windlass.planner.constraints import PlanConstraints, check_constraints
from windlass.runtime.kv_rounds import half_pages
from windlass.units import format_bytes

# Reads of weights by rows for each by tiles. Kernels of rows have more warps on a processor than
# tiles of 16 bits, and four times as many programs: what that brings is to be measured, and an
# eighth more bytes is taken to be less [assumed]
_MOST_ROW_READS = 1.125
_FORECAST_SHARE = 0.02  # of what is left for experts on the host
# Kinds of parts in the order in which the host keeps them
_KEPT = (Part.BLOCK, Part.FFN, Part.HEAD, Part.JOIN, Part.EXPERT, Part.EMBED)


def plan_for(spec: ModelSpec, sizes: Sizes, host_memory: int, wanted: PlanConstraints) -> Plan:
    """The plan for a budget, and for that of the device where `sizes` have one. BudgetError names
    the smallest budget that works."""
    if sizes.device is None:
        return make_plan(spec, sizes, host_memory, wanted)
    check_constraints(wanted, spec)
    return _DeviceDraft(spec, sizes, sizes.device, wanted).fill(host_memory)


def host_bytes_here(plan: Plan, spec: ModelSpec, sizes: Sizes) -> int:
    """What the host's tier of `plan`, below a device, adds up to in this process."""
    assert sizes.device is not None, "a plan of a device for a machine without"
    draft = _DeviceDraft(spec, sizes, sizes.device, PlanConstraints.of(plan))
    host, size = plan.host, _Size(plan.max_num_seqs, plan.micro_batch_tokens, plan.host.kv_pages)
    return draft.host_total(host.slots, size) + host.forecast_bytes


def row_reads(spec: ModelSpec, rows: int) -> float:
    """How often so many rows, each by itself, read an expert, for each read of tiles, which do so
    once: where routing is even, in the layer where that is most."""
    return max(
        rows * one.top_k / (one.num_experts * (1 - (1 - one.top_k / one.num_experts) ** rows))
        for one in {block.ffn for block in spec.blocks if isinstance(block.ffn, Moe)}
    )


@dataclass(frozen=True, slots=True)
class _Size:
    """Of a pass, as the host must know it."""

    seqs: int
    micro_rows: int
    pages: int  # of sequences that attend on the host


class _DeviceDraft:
    """One planning problem; all methods are pure."""

    def __init__(
        self, spec: ModelSpec, sizes: Sizes, device: DeviceSizes, wanted: PlanConstraints
    ) -> None:
        self._spec = spec
        self._sizes = sizes
        self._device = device
        self._wanted = wanted
        self._shares = HomeShares(wanted.host_attention or 0.0, wanted.kv_offloading_share or 0.0)
        self._share = self._shares.below  # whose keys and values the host keeps

    def fill(self, host_memory: int) -> Plan:
        """The device's tier first, as if it were a host; then the host's, beside it."""
        context = self._wanted.max_model_len or self._spec.max_positions
        pages = self._wanted.kv_pages
        theirs, own = None, None
        if pages is not None:
            theirs = pages if self._share == 1 else round(self._share * pages)
            own = pages - theirs
        plan = self._above(own)
        if theirs is None:
            theirs = 0
            if self._share:  # as many positions for each sequence as on the device
                own = plan.host.kv_pages
                theirs = own if self._share == 1 else round(own * self._share / (1 - self._share))
        above = replace(plan.host, name=DEVICE)
        if self._share == 1:
            above = self._without_pages(above)
        size = _Size(plan.max_num_seqs, plan.micro_batch_tokens, theirs)
        host = self._host(host_memory, above, size)
        plan = replace(
            plan,
            tiers=(host, above),
            host_attention=self._shares.host,
            kv_offloading_share=self._shares.streamed,
        )
        if self._shares.streamed and not self._wanted.max_model_len:
            # what goes to the device at once has room there
            each = self._sizes.staged_bytes_per_token
            pages = half_pages(each, PAGE_TOKENS, SMALLEST_CONTEXT) - 1
            context = min(context, pages * PAGE_TOKENS)
        return replace(
            plan,
            max_model_len=min(
                context,
                longest_context(
                    self._wanted, self._spec, min(plan.pages.values()), plan.max_num_seqs
                ),
            ),
            host_experts=self._wanted.host_experts or 0.0,
            generated_experts=self._generated_experts(plan.max_num_seqs),
        )

    def _generated_experts(self, seqs: int) -> GeneratedExperts:
        """Each row by itself where the rows of `seqs` sequences hardly ever share an expert, so
        that weights are read little more often than tiles of rows would."""
        is_apart = self._device.backend == "triton" and not self._wanted.host_experts
        rows = seqs * (1 + self._sizes.drafts)
        reads = row_reads(self._spec, rows)
        return "rows" if is_apart and reads <= _MOST_ROW_READS else "tiles"

    def _above(self, pages: int | None) -> Plan:
        """The plan of the device's memory, called the host's."""
        device, sizes = self._device, self._sizes
        own = replace(
            sizes, process_bytes=device.process_bytes, slot_bytes=device.slot_bytes,
            row_buffer_bytes=0, forecast_bytes=0, backend=Backend(DEVICE, 0), device=None,
        )  # fmt: skip
        # rows of several homes are not in the order in which states were found, and sums that
        # recurrent layers leave to torch may have other bits on a device in other company
        draft = Draft(self._spec, own, replace(self._wanted, kv_pages=pages, kept_states=0))
        smallest = draft.smallest()
        if device.budget_bytes < smallest:
            raise BudgetError(
                f"device memory: got {format_bytes(device.budget_bytes)}, this model needs at least"
                f" {named_budget(smallest)} ({format_bytes(device.process_bytes)} for its context,"
                f" {format_bytes(smallest - device.process_bytes)} to run):"
                " raise --device-memory"
            )
        return draft.fill(device.budget_bytes)

    def _without_pages(self, tier: TierPlan) -> TierPlan:
        """Nobody attends there."""
        less = tier.total_bytes - tier.kv_pages * tier.kv_page_bytes
        return replace(tier, kv_pages=0, total_bytes=less)

    # --- the host ---------------------------------------------------------------------------------

    def _host(self, host_memory: int, above: TierPlan, size: _Size) -> TierPlan:
        sizes = self._sizes
        # what the device holds passes through here
        slots = {p: min(n, above.of(p).slots, 1) for p, n in sizes.num_parts.items()}
        least = self.host_total(slots, size)
        if host_memory < least:
            raise BudgetError(
                f"host memory: got {format_bytes(host_memory)}, this plan needs at least"
                f" {named_budget(least + NOISE_BYTES)} beside a device"
                f" ({format_bytes(sizes.process_bytes)} for the process itself):"
                " raise --host-memory"
            )
        forecast = self._forecast(host_memory - least, above, size)
        left = host_memory - least - forecast
        for part in _KEPT:
            keys, each = sizes.num_parts.get(part, 0), sizes.slot_bytes.get(part, 0)
            if not keys or above.of(part).slots >= keys:
                continue
            more = min(keys - slots[part], left // each)
            if part is Part.EMBED and more < keys:
                continue
            slots[part] += more
            left -= more * each
        return TierPlan(
            name=HOST,
            budget_bytes=host_memory,
            process_bytes=sizes.process_bytes,
            activation_bytes=self._beside(size),
            parts=parts_with(slots, sizes),
            kv_pages=size.pages,
            kv_page_bytes=page_bytes(sizes),
            state_slots=0,
            total_bytes=self.host_total(slots, size) + forecast,
            forecast_bytes=forecast,
        )  # fmt: skip

    def host_total(self, slots: Mapping[Part, int], size: _Size) -> int:
        """Bytes of all that the host holds."""
        sizes = self._sizes
        weights = sum(sizes.slot_bytes[part] * count for part, count in slots.items())
        kept = size.pages * page_bytes(sizes)
        return sizes.process_bytes + self._beside(size) + weights + kept

    def _beside(self, size: _Size) -> int:
        """What passes take of the host's memory."""
        sizes = self._sizes
        return sizes.row_buffer_bytes + host_side_bytes(
            self._spec, threads=sizes.backend.threads, micro_rows=size.micro_rows, seqs=size.seqs,
            attends=self._shares.host > 0, has_experts=bool(self._wanted.host_experts),
        )  # fmt: skip

    def _forecast(self, left: int, above: TierPlan, size: _Size) -> int:
        """To foresee experts, where few sequences want what does not all stay on the device."""
        experts = above.of(Part.EXPERT)
        if size.seqs > MOST_FORESEEN_SEQS or experts.slots >= (experts.num_parts or 0):
            return 0
        return min(self._sizes.forecast_bytes, int(_FORECAST_SHARE * left))

"""How long a pass takes where a device computes beside its host, without a clock: as
perf/pass_cost.py, on five lanes. Pure arithmetic; seconds."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from windlass.ids import Part
from windlass.models.spec import Moe
from windlass.perf.device_cost import DeviceCost
from windlass.perf.flops import active_experts
from windlass.perf.job_passes import PassRun
from windlass.perf.pass_cost import (
    PassCost,
    Timed,
    contention,
    held_shares,
    kv_numbers,
    layer_kinds,
)
from windlass.perf.sizes import Problem, Sizes
from windlass.plan import HOST, Plan
from windlass.weights.io_queue import BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a plan has things: shares of each kind of part that have slots on the device and on
    the host, the share of sequences that attend on the host, groups of a pass, the share of experts
    that the host computes for generated rows, and that of sequences whose keys and values come from
    the host."""

    above: Mapping[Part, float]
    below: Mapping[Part, float]
    on_host: float
    groups: int
    experts_on_host: float = 0.0
    streamed: float = 0.0

    @classmethod
    def of(cls, plan: Plan, sizes: Sizes) -> "Placed":
        return cls(
            held_shares(plan, sizes), held_shares(plan, sizes, tier=HOST), plan.host_attention,
            plan.groups, plan.host_experts, plan.kv_offloading_share,
        )  # fmt: skip

    @property
    def cold(self) -> "Placed":
        """Before the first pass."""
        return replace(self, above={}, below={})


class _Rows(NamedTuple):
    """Seconds of the device for so many rows, and bytes of weights that they want."""

    attention: float
    experts: float
    again: float  # reading experts from its memory once more, for each further group
    wanted: dict[Part, float]


class DevicePassCost:
    """Passes of one model on one machine, whatever the plan."""

    def __init__(self, problem: Problem) -> None:
        self.costs = DeviceCost(problem, kv_numbers=kv_numbers(problem.spec))
        self._problem = problem
        self._host = PassCost(problem)  # what rows want does not depend on who computes
        self._kinds = layer_kinds(problem.spec)
        self._by_rows: dict[int, _Rows] = {}

    def of(self, one: PassRun, placed: Placed) -> Timed:
        """A pass like `one` that finds parts where they are `placed`."""
        rows = self._rows(one.num_rows)
        costs, seen, on_host = self.costs, one.seen, placed.on_host
        own = seen.share(1 - on_host)
        attention, up, host, down = rows.attention, 0.0, 0.0, 0.0
        for layer, count in self._kinds:
            theirs = costs.host_rows(layer, seen, on_host)
            attention += count * costs.scores_s(layer, own if theirs.num_rows else seen)
            if theirs.num_rows:
                sent, seconds, back = costs.host_attention_s(layer, theirs)
                up, host, down = up + count * sent, host + count * seconds, down + count * back
        come, gone = self.streamed_bytes(one, placed)
        experts, head = rows.experts, costs.head_s(one.num_logits)
        attends, beside = host, 0.0  # the host's experts, while the device computes its own
        if placed.experts_on_host and seen.decode_rows:
            prompts = self._rows(seen.prompt_rows).experts if seen.prompt_rows else 0.0
            experts -= placed.experts_on_host * (rows.experts - prompts)
            for layer, count in self._kinds:
                sent, seconds, back = self._host_experts_s(layer, seen.decode_rows, placed)
                up, host, down = up + count * sent, host + count * seconds, down + count * back
                beside += count * (sent + seconds + back)
        fetched, read = self.moved_bytes(one, placed)
        computing = max(attention, attends) + max(experts, beside)
        if placed.groups > 1:
            experts += (placed.groups - 1) * rows.again
            computing = max(attention + max(experts, beside), host)
        busy = {
            "disk": read / self._problem.profile.disk.at(BLOCK_BYTES),
            "down": costs.fetch_s(fetched + come) + down,
            "up": up + costs.send_s(gone),
            "host": host,
            "device": attention + experts + head,
        }
        seconds = max(*busy.values(), computing + head)
        seconds += contention(busy["disk"], busy["host"], seconds, self._problem.profile.threads)
        return Timed(seconds, busy, read)

    def streamed_bytes(self, one: PassRun, placed: Placed) -> tuple[float, float]:
        """Bytes of keys and values that come from the host, and that go back."""
        come = gone = 0.0
        for layer, count in self._kinds if placed.streamed else ():
            theirs = self.costs.host_rows(layer, one.seen, placed.streamed)
            if theirs.num_rows:
                some = self.costs.streamed_bytes(layer, theirs)
                come, gone = come + count * some[0], gone + count * some[1]
        return come, gone

    def moved_bytes(
        self, one: PassRun, placed: Placed, *, at_least: bool = False
    ) -> tuple[float, float]:
        """Bytes of weights that a pass fetches from the host, and that it reads from disk. What the
        device holds is what the host holds too: both keep what is used next. Where it must be
        `at_least` that, none of it is."""
        fetched = read = 0.0
        for part, num_bytes in self._rows(one.num_rows).wanted.items():
            if part is Part.HEAD and not one.num_logits:
                continue
            above, below = placed.above.get(part, 0.0), placed.below.get(part, 0.0)
            if part is Part.EXPERT:
                fetched += self._fetched_experts(one, placed)
            else:
                fetched += num_bytes * (1 - above)
            kept = min(1.0, above + below) if at_least else max(above, below)
            read += num_bytes * (1 - kept)
        return fetched, read

    def _fetched_experts(self, one: PassRun, placed: Placed) -> float:
        """Bytes of experts. Of those that the host computes prompts alone want any, and where there
        are none the device's slots are for the others."""
        share, above = placed.experts_on_host, placed.above.get(Part.EXPERT, 0.0)
        whole = self._rows(one.num_rows).wanted[Part.EXPERT]
        if not share or not one.seen.decode_rows:
            return whole * (1 - above)
        prompts = one.seen.prompt_rows
        if not prompts:
            return whole * max(0.0, 1 - share - above)
        theirs = self._rows(prompts).wanted[Part.EXPERT]
        return (1 - above) * (whole - share * (whole - theirs))

    def _host_experts_s(self, layer: int, rows: int, placed: Placed) -> tuple[float, float, float]:
        """Of the link up, of the host and of the link down, for `rows` generated rows."""
        moe = self._problem.spec.blocks[layer].ffn
        if not isinstance(moe, Moe):
            return 0.0, 0.0, 0.0
        active = active_experts(moe.num_experts, moe.top_k, rows)
        each = max(1, round(rows * moe.top_k / active))
        return self.costs.host_experts_s(layer, active * placed.experts_on_host, each)

    def _rows(self, rows: int) -> _Rows:
        known = self._by_rows.get(rows)
        if known is not None:
            return known
        spec, costs = self._problem.spec, self.costs
        attention, experts, again = costs.embed_s(rows), 0.0, 0.0
        for layer, count in self._kinds:
            block = spec.blocks[layer]
            if block.attention is not None:
                attention += count * costs.projections_s(layer, rows)
            if isinstance(block.ffn, Moe):
                active = active_experts(block.ffn.num_experts, block.ffn.top_k, rows)
                each = max(1, round(rows * block.ffn.top_k / active))
                seconds = costs.route_s(layer, rows) + costs.combine_s(layer, rows)
                seconds += active * costs.expert_s(layer, each)
                experts += count * (seconds + costs.experts(layer, ()).last.seconds)
                num_bytes = active * self._problem.sizes.slot_bytes[Part.EXPERT]
                again += count * num_bytes / costs.memory_rate
            elif block.ffn is not None:
                experts += count * costs.dense(layer, rows).last.seconds
        found = _Rows(attention, experts, again, self._host.wanted_bytes(rows))
        self._by_rows[rows] = found
        return found

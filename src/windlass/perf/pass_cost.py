"""How long a pass takes without a clock: routing even, every lane busy beside the others, weights
that stay in memory not read again. Pure arithmetic; seconds."""

from collections.abc import Mapping
from dataclasses import dataclass

from windlass.ids import Part
from windlass.models.spec import Block, Gqa, Mla, ModelSpec, Moe
from windlass.perf.flops import active_experts, kept_numbers
from windlass.perf.job_passes import PassRun
from windlass.perf.op_cost import OpCost
from windlass.perf.sizes import Problem, Sizes
from windlass.plan import Plan
from windlass.weights.io_queue import BLOCK_BYTES

# Taken by reading at the disk's full rate, of what computes beside it: issuing, completions, memory
# traffic. Fitted to passes that measured 1.09 to 1.25 times their lanes
# (docs/experiments/0017-pass-cost.md)
_READING_CORES = 0.5


@dataclass(frozen=True, slots=True)
class Timed:
    """One pass: from its begin to the next, what lanes work in it, and bytes read."""

    seconds: float
    busy: Mapping[str, float]
    bytes_read: float = 0.0


class PassCost:
    """Passes of one model on one machine, whatever the plan."""

    def __init__(self, problem: Problem) -> None:
        self.costs = OpCost(problem, kv_numbers=kv_numbers(problem.spec))
        self._spec = problem.spec
        self._sizes = problem.sizes
        self._profile = problem.profile
        self._kinds = layer_kinds(problem.spec)
        self._by_rows: dict[int, tuple[float, dict[Part, float]]] = {}

    def of(self, one: PassRun, held: Mapping[Part, float]) -> Timed:
        """A pass like `one` that finds the share `held` of each kind of part."""
        known = self._by_rows.get(one.num_rows)
        if known is None:
            known = self._by_rows[one.num_rows] = self._rows_alone(one.num_rows)
        host, wanted = known
        host += sum(n * self.costs.scores_s(layer, one.seen) for layer, n in self._kinds)
        host += self.costs.head_s(one.num_logits)
        read = missing_bytes(wanted, held, has_logits=one.num_logits > 0)
        disk = read / self._profile.disk.at(BLOCK_BYTES)
        seconds = max(disk, host)
        seconds += contention(disk, host, seconds, self._profile.threads)
        return Timed(seconds, {"disk": disk, "host": host}, read)

    def wanted_bytes(self, rows: int) -> dict[Part, float]:
        """Bytes of weights that so many rows need, the head included."""
        head = self._sizes.num_parts.get(Part.HEAD, 0) * self._bytes(Part.HEAD)
        wanted = {Part.HEAD: float(head), Part.BLOCK: 0.0, Part.EXPERT: 0.0, Part.FFN: 0.0}
        for layer, count in self._kinds:
            ffn = self._spec.blocks[layer].ffn
            wanted[Part.BLOCK] += count * self._bytes(Part.BLOCK)
            if isinstance(ffn, Moe):
                active = active_experts(ffn.num_experts, ffn.top_k, rows)
                wanted[Part.EXPERT] += count * active * self._bytes(Part.EXPERT)
            elif ffn is not None:
                wanted[Part.FFN] += count * self._bytes(Part.FFN)
        return wanted

    def _rows_alone(self, rows: int) -> tuple[float, dict[Part, float]]:
        """What depends on the number of rows alone: seconds of the host, bytes of weights."""
        host = self.costs.embed_s(rows)
        for layer, count in self._kinds:
            ffn = self._spec.blocks[layer].ffn
            seconds = 0.0
            if self._spec.blocks[layer].attention is not None:
                seconds = self.costs.projections_s(layer, rows)
            if isinstance(ffn, Moe):
                active = active_experts(ffn.num_experts, ffn.top_k, rows)
                each = max(1, round(rows * ffn.top_k / active))
                one_expert = self.costs.expert_s(layer, each)
                seconds += self.costs.route_s(layer, rows) + self.costs.combine_s(layer, rows)
                seconds += active * one_expert + self.costs.experts(layer, ()).last.seconds
            elif ffn is not None:
                seconds += self.costs.dense(layer, rows).last.seconds
            host += count * seconds
        return host, self.wanted_bytes(rows)

    def _bytes(self, part: Part) -> int:
        return self._sizes.slot_bytes.get(part, 0)


def contention(disk: float, host: float, seconds: float, threads: int) -> float:
    """Seconds that a pass of `seconds` takes longer because readers and the host's threads, each
    busy so long in it, share cores and memory. Falls on the pass while both work."""
    return _READING_CORES / threads * disk * min(1.0, host / max(seconds, 1e-9))


def layer_kinds(spec: ModelSpec) -> list[tuple[int, int]]:
    """One layer of each kind, and how many there are of it."""
    kinds: dict[Block, list[int]] = {}
    for layer, block in enumerate(spec.blocks):
        kinds.setdefault(block, []).append(layer)
    return [(layers[0], len(layers)) for layers in kinds.values()]


def kv_layers(spec: ModelSpec) -> int:
    """Layers whose keys and values grow with the sequence."""
    return sum(isinstance(block.attention, Gqa | Mla) for block in spec.blocks)


def kv_numbers(spec: ModelSpec) -> int:
    """Numbers that a position adds to the KV cache of all layers."""
    return sum(kept_numbers(block.attention) for block in spec.blocks)


def held_shares(plan: Plan, sizes: Sizes, *, tier: str | None = None) -> dict[Part, float]:
    """Share of each kind of part that the plan has slots for where passes take weights from, or in
    the `tier` of that name."""
    own = plan.top if tier is None else next(one for one in plan.tiers if one.name == tier)
    slots = own.slots
    return {
        part: min(1.0, slots.get(part, 0) / keys) for part, keys in sizes.num_parts.items() if keys
    }


def missing_bytes(
    wanted: Mapping[Part, float], held: Mapping[Part, float], *, has_logits: bool
) -> float:
    """Bytes that a pass must read. What is held when its turn comes is known beforehand where all
    parts are used in every pass; else it is as likely to be used as what is not."""
    return sum(
        num_bytes * (1 - held.get(part, 0.0))
        for part, num_bytes in wanted.items()
        if has_logits or part is not Part.HEAD
    )

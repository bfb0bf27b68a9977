"""The least time that each resource needs for a pass, whatever the schedule: bytes over the best
rate, FLOPs over the best rate. Pure arithmetic; seconds."""

from collections.abc import Mapping

from windlass.ids import Part
from windlass.models.spec import ModelSpec, Moe, Recurrent
from windlass.perf.flops import (
    active_experts,
    attention_flops,
    attention_matrices,
    expert_matrices,
    shared_matrices,
)
from windlass.perf.job_passes import PassRun
from windlass.perf.op_cost import OpRates, softmax_s
from windlass.perf.pass_cost import (
    PassCost,
    held_shares,
    kv_numbers,
    layer_kinds,
    missing_bytes,
)
from windlass.perf.sizes import Problem
from windlass.plan import Plan


class Bounds:
    """Bounds of passes under a plan: weights that stay in memory are not read again, all others
    that the pass needs are."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        spec, sizes, profile = problem.spec, problem.sizes, problem.profile
        self._spec = spec
        self._sizes = sizes
        self._profile = profile
        self._rates = OpRates(profile.host, sizes.weight_kinds)
        self._kv_bytes = sizes.bytes_per_token / max(1, kv_numbers(spec))  # of a number
        self._pass_cost = PassCost(problem)
        self._held = held_shares(plan, sizes)
        self._kinds = layer_kinds(spec)
        self._flops = {layer: _flops_per_row(spec, layer) for layer, _ in self._kinds}

    def load(self, first: PassRun) -> dict[str, float]:
        """What the first pass needs more than one like it that finds its weights."""
        cold = self._disk(first, {})
        return {"disk": max(0.0, cold - max(self.of(first).values()))}

    def of(self, one: PassRun) -> dict[str, float]:
        """Of one pass: disk, and the host's arithmetic or memory."""
        host = sum(count * self._block(layer, one) for layer, count in self._kinds)
        if one.num_logits:
            bytes_of_head = self._part(Part.HEAD) * self._sizes.num_parts.get(Part.HEAD, 0)
            flops = 2 * self._spec.vocab_size * self._spec.hidden_size * one.num_logits
            host += self._least(flops, self._rates.best_dense(Part.HEAD), bytes_of_head)
        return {"disk": self._disk(one, self._held), "host": host}

    def _disk(self, one: PassRun, held: Mapping[Part, float]) -> float:
        wanted = self._pass_cost.wanted_bytes(one.num_rows)
        read = missing_bytes(wanted, held, has_logits=one.num_logits > 0)
        return read / self._profile.disk.best

    def _block(self, layer: int, one: PassRun) -> float:
        """Least seconds of the host in a layer."""
        rows, ffn = one.num_rows, self._spec.blocks[layer].ffn
        dense, network = self._flops[layer]
        best = self._rates.best_dense(Part.BLOCK)
        seconds = self._least(dense * rows, best, self._part(Part.BLOCK))
        flops = network * rows
        if isinstance(ffn, Moe):
            active = active_experts(ffn.num_experts, ffn.top_k, rows)
            experts = active * self._part(Part.EXPERT)
            seconds += self._least(flops * ffn.top_k, self._rates.best_expert, experts)
        elif ffn is not None:
            best = self._rates.best_dense(Part.FFN)
            seconds += self._least(flops, best, self._part(Part.FFN))
        return seconds + self._scores(layer, one)

    def _scores(self, layer: int, one: PassRun) -> float:
        attention, host = self._spec.blocks[layer].attention, self._profile.host
        if attention is None:
            return 0.0
        if isinstance(attention, Recurrent):
            return one.num_rows * attention_flops(attention, 0) / host.prefill_attention
        return softmax_s(attention, one.seen, self._kv_bytes, host)

    def _part(self, part: Part) -> int:
        return self._sizes.slot_bytes.get(part, 0)

    def _least(self, flops: float, rate: float, num_bytes: float) -> float:
        return max(flops / rate, num_bytes / self._profile.host.memory_rate)


def _flops_per_row(spec: ModelSpec, layer: int) -> tuple[int, int]:
    """Of a layer's dense products, and of one expert or of its dense network."""
    dense = 2 * (attention_matrices(spec, layer) + shared_matrices(spec, layer))
    return dense, 2 * expert_matrices(spec, layer)

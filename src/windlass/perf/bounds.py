"""The least time that each resource needs for a pass, whatever the schedule: bytes over the best
rate, FLOPs over the best rate. Pure arithmetic; seconds."""

from collections.abc import Mapping

from windlass.hardware.profile import HardwareProfile, Processor
from windlass.ids import Part
from windlass.models.spec import Gqa, Mla, ModelSpec, Moe, Recurrent
from windlass.perf.device_cost import SENT, DeviceCost, exchanged_numbers, links_of
from windlass.perf.device_pass_cost import DevicePassCost, Placed
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
        self._own = self._computes_on(profile)
        self._rates = OpRates(self._own, sizes.weight_kinds)
        self._kv_bytes = sizes.bytes_per_token / max(1, kv_numbers(spec))  # of a number
        self._pass_cost = PassCost(problem)
        self._held = held_shares(plan, sizes)
        self._kinds = layer_kinds(spec)
        self._flops = {layer: _flops_per_row(spec, layer) for layer, _ in self._kinds}

    @staticmethod
    def _computes_on(profile: HardwareProfile) -> Processor:
        return profile.host

    def load(self, first: PassRun) -> dict[str, float]:
        """What the first pass needs more than one like it that finds its weights."""
        cold = self._disk(first, {})
        return {"disk": max(0.0, cold - max(self.of(first).values()))}

    def of(self, one: PassRun) -> dict[str, float]:
        """Of one pass: disk, and the host's arithmetic or memory."""
        return {"disk": self._disk(one, self._held), "host": self._computing(one)}

    def _computing(self, one: PassRun) -> float:
        """Least seconds of whoever computes."""
        seconds = sum(count * self._block(layer, one) for layer, count in self._kinds)
        if one.num_logits:
            bytes_of_head = self._part(Part.HEAD) * self._sizes.num_parts.get(Part.HEAD, 0)
            flops = 2 * self._spec.vocab_size * self._spec.hidden_size * one.num_logits
            seconds += self._least(flops, self._rates.best_dense(Part.HEAD), bytes_of_head)
        return seconds

    def _disk(self, one: PassRun, held: Mapping[Part, float]) -> float:
        wanted = self._pass_cost.wanted_bytes(one.num_rows)
        read = missing_bytes(wanted, held, has_logits=one.num_logits > 0)
        return read / self._profile.disk.best

    def _block(self, layer: int, one: PassRun) -> float:
        """Least seconds in a layer."""
        rows, ffn = one.num_rows, self._spec.blocks[layer].ffn
        dense, network = self._flops[layer]
        best = self._rates.best_dense(Part.BLOCK)
        seconds = self._least(dense * rows, best, self._part(Part.BLOCK))
        flops = network * rows
        if isinstance(ffn, Moe):
            seconds += self._experts_s(layer, rows, self._rates.best_expert, self._own)
        elif ffn is not None:
            best = self._rates.best_dense(Part.FFN)
            seconds += self._least(flops, best, self._part(Part.FFN))
        return seconds + self._scores(layer, one)

    def _experts_s(self, layer: int, rows: int, best: float, processor: Processor) -> float:
        """Least seconds of so many rows' experts on a processor; none in layers without."""
        ffn = self._spec.blocks[layer].ffn
        if not isinstance(ffn, Moe) or not rows:
            return 0.0
        num_bytes = active_experts(ffn.num_experts, ffn.top_k, rows) * self._part(Part.EXPERT)
        flops = self._flops[layer][1] * rows * ffn.top_k
        return max(flops / best, num_bytes / processor.memory_rate)

    def _scores(self, layer: int, one: PassRun) -> float:
        attention, own = self._spec.blocks[layer].attention, self._own
        if attention is None:
            return 0.0
        if isinstance(attention, Recurrent):
            return one.num_rows * attention_flops(attention, 0) / own.prefill_attention
        return softmax_s(attention, one.seen, self._kv_bytes, own)

    def _part(self, part: Part) -> int:
        return self._sizes.slot_bytes.get(part, 0)

    def _least(self, flops: float, rate: float, num_bytes: float) -> float:
        return max(flops / rate, num_bytes / self._own.memory_rate)


class DeviceBounds(Bounds):
    """Where a device computes beside its host: what each does of a pass, what is not on the device
    comes over the link, what is in neither memory from disk."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        super().__init__(problem, plan)
        self._placed = Placed.of(plan, problem.sizes)
        self._moves = DevicePassCost(problem)
        self._costs = DeviceCost(problem, kv_numbers=kv_numbers(problem.spec))
        _, self._down, self._up = links_of(problem.profile)
        host = problem.profile.host
        self._best_on_host = OpRates(host, problem.sizes.weight_kinds).best_expert

    @staticmethod
    def _computes_on(profile: HardwareProfile) -> Processor:
        return links_of(profile)[0]

    def load(self, first: PassRun) -> dict[str, float]:
        fetched, read = self._moves.moved_bytes(first, self._placed.cold)
        cold = max(fetched / self._down.weights.best, read / self._profile.disk.best)
        slower = "disk" if cold > fetched / self._down.weights.best else "down"
        return {slower: max(0.0, cold - max(self.of(first).values()))}

    def of(self, one: PassRun) -> dict[str, float]:
        """Of one pass: disk, links, and each processor's arithmetic or memory."""
        fetched, read = self._moves.moved_bytes(one, self._placed, at_least=True)
        host = sent = result = 0.0
        for layer, count in self._kinds:
            theirs = self._costs.host_rows(layer, one.seen, self._placed.on_host)
            attention = self._spec.blocks[layer].attention
            if theirs.num_rows and isinstance(attention, Gqa | Mla):
                host += count * softmax_s(attention, theirs, self._kv_bytes, self._profile.host)
                numbers = exchanged_numbers(attention)
                sent += count * theirs.num_rows * numbers[0]
                result += count * theirs.num_rows * numbers[1]
            host += count * self._host_experts_s(layer, one)
        come, gone = self._moves.streamed_bytes(one, self._placed)
        return {
            "disk": read / self._profile.disk.best,
            "down": (fetched + SENT * result + come) / self._down.weights.best,
            "up": (SENT * sent + gone) / self._up.rate.best,
            "host": host,
            "device": self._computing(one),
        }

    def _host_experts_s(self, layer: int, one: PassRun) -> float:
        """Of the host's experts, for generated rows."""
        host, rows, best = self._profile.host, one.seen.decode_rows, self._best_on_host
        return self._placed.experts_on_host * self._experts_s(layer, rows, best, host)

    def _block(self, layer: int, one: PassRun) -> float:
        """Without the scores and the experts that the host computes."""
        seconds = super()._block(layer, one)
        if self._placed.experts_on_host and one.seen.decode_rows:
            of_all, of_prompts = (
                self._experts_s(layer, rows, self._rates.best_expert, self._own)
                for rows in (one.num_rows, one.seen.prompt_rows)
            )
            seconds -= self._placed.experts_on_host * (of_all - of_prompts)
        theirs = self._costs.host_rows(layer, one.seen, self._placed.on_host)
        if theirs.num_rows:
            seconds -= self._scores(layer, one)
            own = one.seen.share(1 - self._placed.on_host)
            seconds += self._costs.scores_s(layer, own)
        return seconds


def bounds_of(problem: Problem, plan: Plan) -> Bounds:
    """Of whoever computes under the plan."""
    return Bounds(problem, plan) if plan.above is None else DeviceBounds(problem, plan)


def _flops_per_row(spec: ModelSpec, layer: int) -> tuple[int, int]:
    """Of a layer's dense products, and of one expert or of its dense network."""
    dense = 2 * (attention_matrices(spec, layer) + shared_matrices(spec, layer))
    return dense, 2 * expert_matrices(spec, layer)

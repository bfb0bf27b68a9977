"""What the operations of a pass cost on a machine: FLOPs and bytes of the model over the rates of a
profile. Pure arithmetic; seconds. What runtime/simulated.py asks of `Costs`, on a host; with a
device: perf/device_cost.py.

Attention's matrices are dense products; its scores cost the bytes of keys and values for generated
rows and FLOPs for prompt rows (kernels/interface.py). Norms, rotation, routing and sums cost the
numbers they touch at the rate of what is done row by row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from windlass.errors import UsageError
from windlass.hardware.profile import Curve, HardwareProfile, Processor
from windlass.ids import DISK_TO_HOST, Part, Route, WeightKey
from windlass.models.spec import Attention, Gqa, Recurrent
from windlass.perf.flops import (
    attention_flops,
    attention_matrices,
    attention_row_numbers,
    expert_matrices,
    ffn_row_numbers,
    kept_numbers,
    shared_matrices,
    state_numbers,
)
from windlass.perf.sizes import Problem
from windlass.runtime.clock import LaneJob, LaneWork
from windlass.schedule.batch import Batch, MicroBatch, Segment, is_capturable

_F32 = 4
_DIRECT_BYTES = 8192  # that a direct read of one row of the embedding moves
# A profile's `call_s` is that of attention, of a layer's network from norm to sum, or of a chunk of
# the head. A network's share of routing, of one call for some experts, and of the sum:
_ROUTE, _EXPERTS, _COMBINE = 0.4, 0.3, 0.3
# Choosing a token greedily, and its text: 5 to 10 us and 30 to 50 us (2 Zen 5 cores, 2026-11-25)
SAMPLE_S = 50e-6
_SAMPLE_READS = 3  # of a row of logits


@dataclass(frozen=True, slots=True)
class Seen:
    """Rows of attention and the positions that they see, summed over the rows."""

    decode_rows: int
    decode_positions: float
    prompt_rows: int
    prompt_positions: float

    def __add__(self, other: "Seen") -> "Seen":
        return Seen(
            self.decode_rows + other.decode_rows,
            self.decode_positions + other.decode_positions,
            self.prompt_rows + other.prompt_rows,
            self.prompt_positions + other.prompt_positions,
        )

    @property
    def num_rows(self) -> int:
        return self.decode_rows + self.prompt_rows

    def chunks(self) -> tuple[int, float]:
        """Rows of prompts that would see as many positions: of chunks of so many rows, behind so
        many earlier ones."""
        mean = self.prompt_positions / self.prompt_rows
        length = max(1, min(self.prompt_rows, round(2 * mean - 1)))
        return length, max(0.0, mean - (length + 1) / 2)

    def share(self, part: float) -> "Seen":
        """Of `part` of the sequences; the rest has `1 - part`."""
        decode, prompt = round(part * self.decode_rows), round(part * self.prompt_rows)
        return Seen(decode, part * self.decode_positions, prompt, part * self.prompt_positions)


def seen_by(segments: Sequence[Segment]) -> Seen:
    """What the rows of `segments` see."""
    decode = prompt = 0
    decode_positions = prompt_positions = 0.0
    for segment in segments:
        count, first = segment.num_tokens, segment.first_position
        positions = count * first + count * (count + 1) / 2
        if segment.is_prompt:
            prompt += count
            prompt_positions += positions
        else:
            decode += count
            decode_positions += positions
    return Seen(decode, decode_positions, prompt, prompt_positions)


class OpRates:
    """Seconds of modules on one processor. `kinds`: how the weights of each part are stored."""

    def __init__(self, processor: Processor, kinds: Mapping[Part, str]) -> None:
        self.processor = processor
        self._experts = _curve(processor, "experts", kinds.get(Part.EXPERT, "bfloat16"))
        self._dense = {
            part: _curve(processor, "dense", kinds.get(part, "bfloat16"))
            for part in (Part.BLOCK, Part.FFN, Part.HEAD)
        }
        self._known: dict[tuple[Part, int], float] = {}

    def expert(self, flops_per_row: float, num_rows: int) -> float:
        """One expert over its rows."""
        return flops_per_row * num_rows / self._rate(self._experts, Part.EXPERT, num_rows)

    def product(self, part: Part, flops_per_row: float, num_rows: int) -> float:
        """Dense matrices of a part over the rows."""
        if not num_rows:
            return 0.0
        return flops_per_row * num_rows / self._rate(self._dense[part], part, num_rows)

    def memory(self, num_bytes: float) -> float:
        return num_bytes / self.processor.memory_rate

    def rows(self, numbers: float) -> float:
        """Numbers read and written row by row."""
        return _F32 * numbers / self.processor.row_rate

    @property
    def best_expert(self) -> float:
        return self._experts.best

    def best_dense(self, part: Part) -> float:
        return self._dense[part].best

    def _rate(self, curve: Curve, part: Part, num_rows: int) -> float:
        rate = self._known.get((part, num_rows))
        if rate is None:
            rate = self._known[part, num_rows] = curve.at(num_rows)
        return rate


def _curve(processor: Processor, what: str, kind: str) -> Curve:
    curves: Mapping[str, Curve] = getattr(processor, what)
    if kind not in curves:
        raise UsageError(
            f"profile of {processor.name}: {what}: no rate for {kind} weights, found"
            f" {', '.join(sorted(curves))}"
        )
    return curves[kind]


class OpCost:
    """`Costs` of a machine whose host computes. `scale`: of what happens once per pass, and
    `weights`: of each layer, where the spec stands for one with more layers of the same kinds."""

    lane = "host"  # that computes

    def __init__(
        self,
        problem: Problem,
        *,
        kv_numbers: int,
        weights: Sequence[float] | None = None,
        scale: float = 1.0,
        keeps_all: bool = False,
    ) -> None:
        """`kv_numbers`: what a position adds to the KV cache of the whole model. `keeps_all`: all
        weights are resident, so that layers of a few tokens are captured (`runtime/capture.py`)."""
        spec, sizes = problem.spec, problem.sizes
        self._spec = spec
        self._sizes = sizes
        self._profile = problem.profile
        self._processor = own = self._computes_on(problem.profile)
        self._rates = OpRates(own, sizes.weight_kinds)
        self._kv_bytes = sizes.bytes_per_token / max(1, kv_numbers)  # of a number
        self._weights = weights or [1.0] * len(spec.blocks)
        self._scale = scale
        self._captures = keeps_all and own.captures
        self._call_s, self._expert_s = own.call_s, own.expert_s
        self._seen: dict[int, Seen] = {}  # by first row of a micro-batch, of the current pass
        self._block_reads: dict[tuple[Part, int], float] = {}

    @staticmethod
    def _computes_on(profile: HardwareProfile) -> Processor:
        return profile.host

    def _on(self, seconds: float) -> LaneWork:
        return LaneWork(LaneJob(self.lane, seconds))

    # --- Costs ------------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> LaneWork:
        self._seen = {micro.first_token: seen_by(micro.segments) for micro in batch.micro_batches}
        own, is_captured = self._processor, self._captures and is_capturable(batch)
        self._call_s, self._expert_s = (0.0, 0.0) if is_captured else (own.call_s, own.expert_s)
        return self._on(self.embed_s(batch.num_tokens) * self._scale)

    def embedding_rows(self, num_rows: int) -> float:
        rate = self._profile.disk.at(_DIRECT_BYTES)
        return num_rows * _DIRECT_BYTES / rate * self._scale

    def attention(self, layer: int, rows: MicroBatch) -> LaneWork:
        seconds = self.attention_s(layer, self._seen[rows.first_token])
        return self._on(seconds * self._weights[layer])

    def route(self, layer: int, num_rows: int) -> LaneWork:
        return self._on(self.route_s(layer, num_rows) * self._weights[layer])

    def experts(self, layer: int, num_rows: Sequence[int]) -> LaneWork:
        flops = 2 * expert_matrices(self._spec, layer)
        seconds = sum(self._rates.expert(flops, count) for count in num_rows)
        seconds += len(num_rows) * self._expert_s + _EXPERTS * self._call_s
        return self._on(seconds * self._weights[layer])

    def combine(self, layer: int, num_rows: int) -> LaneWork:
        return self._on(self.combine_s(layer, num_rows) * self._weights[layer])

    def dense(self, layer: int, num_rows: int) -> LaneWork:
        flops = 2 * expert_matrices(self._spec, layer)
        numbers = num_rows * sum(ffn_row_numbers(self._spec, layer))
        seconds = self._rates.product(Part.FFN, flops, num_rows) + self._rates.rows(numbers)
        seconds += self._call_s
        return self._on(seconds * self._weights[layer])

    def head(self, chunk: int, num_rows: int) -> LaneWork:
        chunks = max(1, self._sizes.num_parts.get(Part.HEAD, 1))
        seconds = self.head_s(num_rows) / chunks + self._processor.call_s
        return self._on(seconds * self._scale)

    def block(self, key: WeightKey, num_bytes: int) -> Sequence[tuple[Route, float]]:
        return ((DISK_TO_HOST, self.read_s(key, num_bytes)),)

    # --- seconds ----------------------------------------------------------------------------------

    def read_s(self, key: WeightKey, num_bytes: int) -> float:
        """One block from disk."""
        seconds = self._block_reads.get((key.part, num_bytes))
        if seconds is None:
            seconds = num_bytes / self._profile.disk.at(num_bytes)
            self._block_reads[key.part, num_bytes] = seconds
        return seconds * (self._weights[key.layer] if key.layer >= 0 else self._scale)

    def embed_s(self, num_rows: int) -> float:
        return self._rates.rows(2 * num_rows * self._spec.hidden_size)

    def attention_s(self, layer: int, seen: Seen) -> float:
        """Norm, projections, rotation, scores and residual of one layer."""
        return self.projections_s(layer, seen.num_rows) + self.scores_s(layer, seen)

    def projections_s(self, layer: int, num_rows: int) -> float:
        matrices = 2 * attention_matrices(self._spec, layer)
        product = self._rates.product(Part.BLOCK, matrices, num_rows)
        numbers = num_rows * attention_row_numbers(self._spec, layer)
        return product + self._rates.rows(numbers) + self._call_s

    def scores_s(self, layer: int, seen: Seen) -> float:
        """Keys and values that generated rows read, and what prompt rows multiply; of a recurrent
        layer its states."""
        attention, own = self._spec.blocks[layer].attention, self._processor
        if attention is None:
            return 0.0
        if isinstance(attention, Recurrent):
            per_row = attention_flops(attention, 0)
            state = 2 * _F32 * state_numbers(attention) * seen.decode_rows  # read and written
            return self._rates.memory(state) + seen.prompt_rows * per_row / own.prefill_attention
        return softmax_s(attention, seen, self._kv_bytes, own)

    def route_s(self, layer: int, num_rows: int) -> float:
        """Norm, router and shared expert."""
        matrices = 2 * shared_matrices(self._spec, layer)
        numbers = num_rows * ffn_row_numbers(self._spec, layer)[0]
        product = self._rates.product(Part.BLOCK, matrices, num_rows)
        return product + self._rates.rows(numbers) + _ROUTE * self._call_s

    def expert_s(self, layer: int, num_rows: int) -> float:
        """One expert over its rows, without its call."""
        flops = 2 * expert_matrices(self._spec, layer)
        return self._rates.expert(flops, num_rows) + self._expert_s

    def combine_s(self, layer: int, num_rows: int) -> float:
        numbers = num_rows * ffn_row_numbers(self._spec, layer)[1]
        return self._rates.rows(numbers) + _COMBINE * self._call_s

    def head_s(self, num_rows: int) -> float:
        """All of the head, without the cost of its calls."""
        flops = 2 * self._spec.vocab_size * self._spec.hidden_size
        moved = 2 * num_rows * self._spec.vocab_size
        return self._rates.product(Part.HEAD, flops, num_rows) + self._rates.rows(moved)

    def sample_s(self, num_rows: int) -> float:
        """Drawing a token for each of `num_rows` rows of logits, after the pass."""
        moved = _SAMPLE_READS * _F32 * self._spec.vocab_size
        return num_rows * (SAMPLE_S + self._rates.memory(moved))


def visible(attention: Attention, seen: Seen) -> tuple[float, float]:
    """Positions that decode rows and prompt rows see, within the window where there is one."""
    window = attention.window if isinstance(attention, Gqa) else None
    if window is None:
        return seen.decode_positions, seen.prompt_positions
    return (
        min(seen.decode_positions, float(seen.decode_rows * window)),
        min(seen.prompt_positions, float(seen.prompt_rows * window)),
    )


def softmax_s(attention: Attention, seen: Seen, kv_bytes: float, own: Processor) -> float:
    """Keys and values that decode rows read, and what prompt rows multiply. `kv_bytes`: of a
    number in the KV cache."""
    decode, prompt = visible(attention, seen)
    seconds = decode * kept_numbers(attention) * kv_bytes / own.decode_attention
    return seconds + prompt * attention_flops(attention, 1) / own.prefill_attention

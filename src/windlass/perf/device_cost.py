"""What the operations of a pass cost where a device computes beside its host: weights come over a
link into the device's slots, attention of some sequences is computed on the host. Pure arithmetic;
seconds. What runtime/simulated.py asks of `Costs`."""

from collections.abc import Sequence
from dataclasses import replace

from windlass.errors import UsageError
from windlass.hardware.profile import HardwareProfile, LinkRates, Processor
from windlass.ids import DEVICE, DISK_TO_HOST, Home, Part, Route, WeightKey
from windlass.models.spec import Attention, Gqa, Mla, Moe
from windlass.perf.flops import expert_matrices, kept_numbers
from windlass.perf.op_cost import (
    SAMPLE_S,
    OpCost,
    OpRates,
    Seen,
    seen_by,
    softmax_s,
    visible,
)
from windlass.perf.sizes import Problem
from windlass.plan import PAGE_TOKENS
from windlass.runtime.clock import HOST_TO_DEVICE, LaneJob, LaneWork
from windlass.schedule.batch import MicroBatch, Segment

DEVICE_LANES = ("disk", "down", "up", "host", DEVICE)
SENT = 4  # bytes of a number that crosses the link: rows are fp32


def links_of(profile: HardwareProfile) -> tuple[Processor, LinkRates, LinkRates]:
    """Device, link down and link up. UsageError where the machine has none."""
    if profile.device is None or profile.down is None or profile.up is None:
        raise UsageError(f"profile of {profile.name}: device: got none, allowed one with its links")
    return profile.device, profile.down, profile.up


def exchanged_numbers(attention: Attention | None) -> tuple[int, int]:
    """Numbers of a row that go up where the host attends, and that its result brings down."""
    match attention:
        case Gqa():
            query = attention.num_heads * attention.head_dim
            return query + kept_numbers(attention), query
        case Mla():
            query = attention.num_heads * (attention.kv_lora_rank + attention.rope.dim)
            result = attention.num_heads * attention.kv_lora_rank
            return query + kept_numbers(attention), result
        case _:
            return 0, 0


class DeviceCost(OpCost):
    """`Costs` of such a machine."""

    lane = DEVICE

    def __init__(
        self,
        problem: Problem,
        *,
        kv_numbers: int,
        weights: Sequence[float] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(problem, kv_numbers=kv_numbers, weights=weights, scale=scale)
        _, self._down, self._up = links_of(problem.profile)
        self._attends = beside_copies(problem.profile.host)
        self._host_rates = OpRates(problem.profile.host, problem.sizes.weight_kinds)

    @staticmethod
    def _computes_on(profile: HardwareProfile) -> Processor:
        return links_of(profile)[0]

    # --- Costs ------------------------------------------------------------------------------------

    def attention(self, layer: int, rows: MicroBatch) -> LaneWork:
        """The host attends as soon as its rows have been projected, beside the device's own."""
        seen, weight = self._seen[rows.first_token], self._weights[layer]
        attention = self._spec.blocks[layer].attention
        if rows.home is not Home.HOST or not isinstance(attention, Gqa | Mla):
            return self._on(self.attention_s(layer, seen) * weight)
        up, host, down = self.host_attention_s(layer, seen)
        chain = (
            LaneJob(DEVICE, self.projections_s(layer, seen.num_rows) * weight),
            LaneJob("up", up * weight), LaneJob("host", host * weight),
            LaneJob("down", down * weight),
        )  # fmt: skip
        return LaneWork(LaneJob(DEVICE, 0.0), (chain,))

    def projections(self, layer: int, num_rows: int) -> LaneWork:
        """Of attention alone."""
        return self._on(self.projections_s(layer, num_rows) * self._weights[layer])

    def scores(self, layer: int, segments: Sequence[Segment]) -> LaneWork:
        """Of attention, what follows once keys and values are there."""
        return self._on(self.scores_s(layer, seen_by(segments)) * self._weights[layer])

    def sent_back(self, layer: int, positions: int) -> LaneJob:
        """Keys and values of so many positions to the host."""
        seconds = self.send_s(positions * self.position_bytes(layer))
        return LaneJob("up", seconds * self._weights[layer])

    def position_bytes(self, layer: int) -> float:
        """Of keys and values of a position."""
        return kept_numbers(self._spec.blocks[layer].attention) * self._kv_bytes

    def host_experts(self, layer: int, num_rows: Sequence[int]) -> LaneWork:
        """Experts of the host with so many rows each: as soon as its rows have been routed, beside
        the device's own."""
        host, spec, weight = self._profile.host, self._spec, self._weights[layer]
        flops, numbers = 2 * expert_matrices(spec, layer), sum(num_rows) * spec.hidden_size
        seconds = sum(self._host_rates.expert(flops, rows) + host.expert_s for rows in num_rows)
        chain = (
            LaneJob("up", _copied(self._up, numbers) * weight),
            LaneJob("host", (seconds + host.call_s) * weight),
            LaneJob("down", _copied(self._down, numbers) * weight),
        )  # fmt: skip
        return LaneWork(LaneJob(DEVICE, 0.0), (chain,))

    def block(self, key: WeightKey, num_bytes: int) -> Sequence[tuple[Route, float]]:
        more = self._weights[key.layer] if key.layer >= 0 else self._scale
        down = num_bytes / self._down.weights.at(num_bytes) * more
        return ((DISK_TO_HOST, self.read_s(key, num_bytes)), (HOST_TO_DEVICE, down))

    # --- seconds ----------------------------------------------------------------------------------

    def host_rows(self, layer: int, seen: Seen, on_host: float) -> Seen:
        """Of `seen`, those whose keys and values the host has, where these are the share `on_host`
        of the sequences: none in a layer without."""
        attention = self._spec.blocks[layer].attention
        return seen.share(on_host if isinstance(attention, Gqa | Mla) else 0.0)

    def host_attention_s(self, layer: int, seen: Seen) -> tuple[float, float, float]:
        """Of the link up, of the host and of the link down."""
        attention, host = self._spec.blocks[layer].attention, self._profile.host
        assert isinstance(attention, Gqa | Mla), "recurrent layers stay on the device"
        sent, result = exchanged_numbers(attention)
        seconds = softmax_s(attention, seen, self._kv_bytes, self._attends) + host.call_s
        return (
            _copied(self._up, seen.num_rows * sent),
            seconds,
            _copied(self._down, seen.num_rows * result),
        )

    def streamed_bytes(self, layer: int, seen: Seen) -> tuple[float, float]:
        """What comes down and goes back up for rows whose keys and values the host has, while they
        are computed on the device."""
        attention = self._spec.blocks[layer].attention
        assert attention is not None, "a layer without keys"
        length, earlier = seen.chunks() if seen.prompt_rows else (1, 0.0)
        chunks = seen.prompt_rows / length
        before = Seen(seen.decode_rows, seen.decode_positions, round(chunks), chunks * earlier)
        # of a generated row its whole page goes back
        each, new = self.position_bytes(layer), seen.prompt_rows + PAGE_TOKENS * seen.decode_rows
        return each * sum(visible(attention, before)), each * new

    def host_expert_s(self, layer: int, num_rows: int) -> float:
        """One expert over its rows on the host, as Fiddler (arXiv 2402.07033) would have it: rows
        up, products, results down."""
        return sum(self.host_experts_s(layer, 1, num_rows)) - self._profile.host.call_s

    def host_experts_s(
        self, layer: int, experts: float, num_rows: int
    ) -> tuple[float, float, float]:
        """Of the link up, of the host and of the link down, for `experts` with `num_rows` each in
        one call (runtime/host_experts.py)."""
        flops, host = 2 * expert_matrices(self._spec, layer), self._profile.host
        seconds = self._host_rates.expert(flops, num_rows) + host.expert_s
        numbers = round(experts * num_rows * self._spec.hidden_size)
        return (
            _copied(self._up, numbers), experts * seconds + host.call_s,
            _copied(self._down, numbers),
        )  # fmt: skip

    def fetched_expert_s(self, layer: int, num_rows: int) -> float:
        """The same of one that is fetched for it."""
        fetched = self._sizes.slot_bytes[Part.EXPERT]
        return fetched / self._down.weights.at(fetched) + self.expert_s(layer, num_rows)

    @property
    def memory_rate(self) -> float:
        """Of the device, bytes/s."""
        return self._processor.memory_rate

    def fetch_s(self, num_bytes: float) -> float:
        """Weights over the link, in large copies."""
        return num_bytes / self._down.weights.best

    def send_s(self, num_bytes: float) -> float:
        """The other way."""
        return num_bytes / self._up.rate.best

    def sample_s(self, num_rows: int) -> float:
        """The device draws; a row costs the host what text and bookkeeping do."""
        return num_rows * SAMPLE_S


def beside_copies(host: Processor) -> Processor:
    """The host as it attends while links carry weights, if that was measured."""
    rate = host.attention_beside_copies
    return host if rate is None else replace(host, decode_attention=rate)


def _copied(link: LinkRates, numbers: int) -> float:
    num_bytes = SENT * numbers
    return num_bytes / link.rate.at(num_bytes) if num_bytes else 0.0


def few_rows(problem: Problem) -> int:
    """Up to how many rows of an expert that lies in the host's memory it would be sooner computed
    there than fetched, and computed on the device; 0: never. By costs alone: which expert has how
    many rows in a pass follows from what else is in it, so that acting on it would make bits depend
    on that; a plan has a share of experts instead (`Plan.host_experts`)."""
    costs, spec = DeviceCost(problem, kv_numbers=1), problem.spec
    layer = next(i for i, block in enumerate(spec.blocks) if isinstance(block.ffn, Moe))
    most = 0
    for rows in (1 << power for power in range(13)):
        if costs.host_expert_s(layer, rows) >= costs.fetched_expert_s(layer, rows):
            break
        most = rows
    step = most // 2
    while step:  # between that and twice as many
        if costs.host_expert_s(layer, most + step) < costs.fetched_expert_s(layer, most + step):
            most += step
        step //= 2
    return most

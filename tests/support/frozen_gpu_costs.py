"""What operations cost where a device computes and weights come over a link: `Costs` of the clock
with the lanes disk, down, up, host and device, in MoE-Gen's order (one group). Pure arithmetic.

The schedule itself then says how well copies hide behind computation, which the closed forms of
perf/frozen_gpu_tiers.py assume: they are compared. It goes with them.
"""

from collections.abc import Sequence

from windlass.ids import DISK_TO_HOST, HOST, Part, Route, WeightKey
from windlass.perf.frozen_gpu_tiers import GpuRates, LayerShape, Share
from windlass.perf.op_cost import seen_by
from windlass.runtime.clock import LaneJob, LaneWork
from windlass.schedule.batch import Batch, MicroBatch

DEVICE_LANES = ("disk", "down", "up", "host", "device")


class DeviceCosts:
    """`share` says what the host does and where things are; its numbers of rows are not used."""

    def __init__(
        self, shape: LayerShape, rates: GpuRates, share: Share, *, head_flops: float = 0.0
    ) -> None:
        """`head_flops`: of a row of logits and one chunk of the vocabulary."""
        assert share.groups == 1, "the schedule has one group"
        self._shape = shape
        self._rates = rates
        self._share = share
        self._head_flops = head_flops

    def embed(self, batch: Batch) -> LaneWork:
        return _device(0.0)

    def embedding_rows(self, num_rows: int) -> float:
        return 0.0

    def attention(self, layer: int, rows: MicroBatch) -> LaneWork:
        """Queries and new keys go up while keys and values of the device's share come down; the
        host's share of the sequences follows its queries and sends its results down."""
        shape, rates, share = self._shape, self._rates, self._share
        seen, omega = seen_by(rows.segments), share.host_attention
        cached = seen.decode_positions * shape.kv
        exchanged = omega * seen.decode_rows * shape.query
        host = (
            LaneJob("up", (seen.num_rows * shape.kv + exchanged) / rates.up),
            LaneJob("host", omega * cached / rates.host_attention),
            LaneJob("down", exchanged / rates.down),
        )
        down = (LaneJob("down", (1 - omega) * (1 - share.kv_on_device) * cached / rates.down),)
        scores = (1 - omega) * seen.decode_positions
        seconds = max(
            seen.num_rows * shape.attention_flops / rates.dense(seen.num_rows),
            shape.attention / rates.device_memory,
        )
        seconds += max(
            scores * shape.score_flops / rates.attention, scores * shape.kv / rates.device_memory
        )
        seconds += seen.prompt_positions * shape.score_flops / rates.attention
        return LaneWork(LaneJob("device", seconds + rates.call_s), (host, down))

    def route(self, layer: int, num_rows: int) -> LaneWork:
        flops = num_rows * self._shape.shared_flops
        return _device(flops / self._rates.dense(num_rows))

    def experts(self, layer: int, num_rows: Sequence[int]) -> LaneWork:
        shape, rates = self._shape, self._rates
        read = shape.expert / rates.device_memory
        times = (max(n * shape.expert_flops / rates.expert(n), read) for n in num_rows)
        return _device(sum(times) + rates.call_s)

    def combine(self, layer: int, num_rows: int) -> LaneWork:
        return _device(0.0)

    def dense(self, layer: int, num_rows: int) -> LaneWork:
        return self.route(layer, num_rows)

    def head(self, chunk: int, num_rows: int) -> LaneWork:
        return _device(num_rows * self._head_flops / self._rates.dense(max(1, num_rows)))

    def block(self, key: WeightKey, num_bytes: int) -> Sequence[tuple[Route, float]]:
        """Over the link; parts that are on disk alone come from there first."""
        down = (Route(HOST, "device"), num_bytes / self._rates.down)
        if not self._is_on_disk(key):
            return (down,)
        return ((DISK_TO_HOST, num_bytes / self._rates.disk), down)

    def _is_on_disk(self, key: WeightKey) -> bool:
        """Evenly spread over what does not stay on the device."""
        share = min(1.0, self._share.on_disk / max(1e-9, 1 - self._share.resident))
        if key.part is not Part.EXPERT:
            return share >= 1
        return int((key.index + 1) * share) > int(key.index * share)


def _device(seconds: float) -> LaneWork:
    return LaneWork(LaneJob("device", seconds))

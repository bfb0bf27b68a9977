"""What operations cost on a machine that is only a ratio: of the link to computation."""

from collections.abc import Sequence

from windlass.forecast.interface import ExpertTable
from windlass.ids import DISK_TO_HOST, Part, Route, WeightKey
from windlass.runtime.clock import LaneJob, LaneWork
from windlass.schedule.batch import Batch, MicroBatch
from windlass.units import MIB

EXPERT_BYTES = 8 * MIB  # two blocks of a demand
# Shares of the weights that a row of Qwen3-30B-A3B reads, as of all models alike: of a layer, and
# of the head for each layer
_ATTENTION, _HEAD = 1 / 3, 0.108


class RatioCosts:
    """`Costs` in layers: what a layer takes to compute one row is 1, a third of it for attention,
    the rest for its experts, each of which takes as long for any number of rows (its weights are
    read once). `rho`: what the link takes for the experts of one row, none of which is there."""

    def __init__(self, table: ExpertTable, rho: float) -> None:
        self._expert = (1 - _ATTENTION) / table.top_k
        self._read = rho / table.top_k / EXPERT_BYTES
        self._head = _HEAD * len(table.num_experts)

    def embed(self, batch: Batch) -> LaneWork:
        return _on_host(0.0)

    def embedding_rows(self, num_rows: int) -> float:
        return 0.0

    def attention(self, layer: int, rows: MicroBatch) -> LaneWork:
        return _on_host(_ATTENTION)

    def route(self, layer: int, num_rows: int) -> LaneWork:
        return _on_host(0.0)

    def experts(self, layer: int, num_rows: Sequence[int]) -> LaneWork:
        return _on_host(len(num_rows) * self._expert)

    def combine(self, layer: int, num_rows: int) -> LaneWork:
        return _on_host(0.0)

    def dense(self, layer: int, num_rows: int) -> LaneWork:
        return _on_host(1 - _ATTENTION)

    def head(self, chunk: int, num_rows: int) -> LaneWork:
        return _on_host(self._head)

    def block(self, key: WeightKey, num_bytes: int) -> Sequence[tuple[Route, float]]:
        seconds = num_bytes * self._read if key.part is Part.EXPERT else 0.0
        return ((DISK_TO_HOST, seconds),)


def _on_host(seconds: float) -> LaneWork:
    return LaneWork(LaneJob("host", seconds))

"""Keys and values that come to a device for each layer, on the clock: runtime/kv_stream.py without
tensors, and as if the pages of a sequence were side by side."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from windlass.ids import Home, Part, WeightKey
from windlass.runtime.clock import LaneJob, Lanes, LaneWork
from windlass.runtime.kv_rounds import Ahead, Round, Wait, num_pages, read_pages, rounds_of
from windlass.runtime.simulated import SimulatedWeights
from windlass.schedule.batch import Batch, MicroBatch, Segment

_LABEL = "keys"


class StreamCosts(Protocol):
    """What of attention over such keys and values takes time."""

    def projections(self, layer: int, num_rows: int) -> LaneWork: ...

    def scores(self, layer: int, segments: Sequence[Segment]) -> LaneWork: ...

    def sent_back(self, layer: int, positions: int) -> LaneJob: ...

    def position_bytes(self, layer: int) -> float:
        """Of keys and values of a position."""
        ...


class Pages(NamedTuple):
    """Tokens of one, and how many come at once at most."""

    tokens: int
    most: int


class SimulatedStream:
    """Implements `StreamPart`. `windows`: of layers that have keys and values."""

    def __init__(
        self,
        lanes: Lanes,
        weights: SimulatedWeights,
        costs: StreamCosts,
        windows: Mapping[int, int | None],
        pages: Pages,
    ) -> None:
        self._lanes, self._weights, self._costs = lanes, weights, costs
        self._windows, self._pages = windows, pages
        self._rounds: dict[int, list[Round]] = {}
        self._ahead = Ahead()

    def begin(self, batch: Batch) -> None:
        micros = [one for one in batch.micro_batches if one.home is Home.STREAMED]
        self._rounds = {one.first_token: rounds_of(one, *self._pages) for one in micros}
        self._ahead.begin(
            [
                partial(self._come, layer, one)
                for layer in self._windows
                for micro in micros
                for one in self._rounds[micro.first_token]
            ]
        )

    def attend(self, layer: int, rows: MicroBatch) -> bool:
        if rows.home is not Home.STREAMED or layer not in self._windows:
            return False
        costs, lanes, tokens = self._costs, self._lanes, self._pages.tokens
        lanes.start(costs.projections(layer, rows.num_tokens), "attention")()
        for one in self._rounds[rows.first_token]:
            self._ahead.take()
            lanes.start(costs.scores(layer, one.segments), "attention")()
            pages = sum(num_pages(s, tokens) - s.first_position // tokens for s in one.segments)
            back = costs.sent_back(layer, pages * tokens)
            lanes[back.lane].put(back.seconds, lambda: None, _LABEL)
        return True

    def _come(self, layer: int, one: Round) -> Wait:
        tokens, window = self._pages.tokens, self._windows[layer]
        pages = sum(len(read_pages(segment, tokens, window)) for segment in one.segments)
        num_bytes = round(pages * tokens * self._costs.position_bytes(layer))
        return self._weights.bring(WeightKey(Part.BLOCK, layer), num_bytes, _LABEL)

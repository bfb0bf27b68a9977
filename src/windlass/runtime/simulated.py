"""The runtime that only counts: the schedule, the weight cache, the policy and the forecast are
those of the device, on a virtual clock. Knows rows, keys, bytes and seconds; no tensor, no file.

The caller is the one thread of a real engine: it waits for weights, and for what it has the lanes
compute. Attention may be under way beside other micro-batches and the experts of other groups where
the lanes that it needs differ (a device, its link and the host); everything else is waited for
before it goes on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from windlass.checkpoint.part_reads import Read
from windlass.forecast.interface import ExpertForecast
from windlass.ids import DISK_TO_HOST, Part, WeightKey
from windlass.prefetch.prefetcher import Prefetcher
from windlass.runtime.clock import HOST_TO_DEVICE, Clock, Lanes, LaneWork, Span
from windlass.runtime.routed_groups import RoutedGroups, layers_of_many_rows
from windlass.runtime.simulated_parts import Costs, HostPart, NoPart, Router, StreamPart
from windlass.schedule.batch import Batch, MicroBatch, RowGroup
from windlass.schedule.observer import RoutedTokens
from windlass.schedule.runtime import Outcome, Routed
from windlass.weights.cache import WeightCache
from windlass.weights.chain import Chain
from windlass.weights.eviction import EvictionPolicy
from windlass.weights.io_queue import BLOCK_BYTES, IoQueue, Link, Priority, Ticket, TicketState
from windlass.weights.residency import Below, Entry, num_slots
from windlass.weights.slots import Slots


class _Rows(NamedTuple):
    """Rows of a layer on their way through its experts: all of a group's, and those of each expert
    of the device's that has any."""

    num_rows: int
    counts: Mapping[int, int]
    on_host: Callable[[], None]  # waits for what the host computes


class _Bytes(NamedTuple):
    """Bytes of a part."""

    key: WeightKey
    num_bytes: int
    label: str = ""  # of what is no part, but moves as that of the layer

    def part(self, begin: int, num_bytes: int) -> "_Bytes":
        return self._replace(num_bytes=num_bytes)


class _ClockedQueue(IoQueue[_Bytes]):
    """Blocks take as long on the lanes of their routes as `costs` says."""

    def __init__(self, lanes: Lanes, costs: Costs, depth: int) -> None:
        super().__init__(lanes.clock, {DISK_TO_HOST: Link(depth)})
        self._lanes = lanes
        self._costs = costs

    def _move(self, ticket: Ticket[_Bytes], block: _Bytes) -> None:
        costs = dict(self._costs.block(block.key, block.num_bytes))
        self._lanes.of(ticket.route).put(
            costs[ticket.route],
            lambda: self.arrived(ticket, block.num_bytes),
            block.label or block.key.part,
        )


@dataclass(frozen=True, slots=True)
class SimulatedParts:
    """Parts of each kind and slots for them. `reads`: of each part, as its tier has them."""

    num_keys: Mapping[Part, int]
    slots: Mapping[Part, int]
    reads: Callable[[WeightKey], Sequence[Read]]
    block_bytes: int = BLOCK_BYTES  # most of what a link to a device moves at once


class SimulatedWeights:
    """Slots that fill by the clock: from disk, or from the slots of the tier below."""

    cache: WeightCache

    def __init__(
        self,
        lanes: Lanes,
        costs: Costs,
        parts: SimulatedParts,
        *,
        policy: EvictionPolicy,
        depth: int,
        tier_below: "SimulatedWeights | None" = None,
    ) -> None:
        """`depth`: blocks in flight at once."""
        self.route = DISK_TO_HOST
        self.below: Below | None = None
        self._chain: Chain[_Bytes] | None = None
        self._reads = parts.reads
        self._clock = lanes.clock
        if tier_below is None:
            self._queue = _ClockedQueue(lanes, costs, depth)
        else:
            self.route = HOST_TO_DEVICE
            self._queue = tier_below._queue
            self._queue.add(self.route, Link(depth, parts.block_bytes, parts.block_bytes // 4))
            self.below = tier_below.cache.feed
            self._chain = Chain(tier_below.cache, self._queue, self.route)
        self.tier_below = tier_below
        given = num_slots(parts.num_keys, parts.slots)
        self.cache = WeightCache(
            parts.num_keys,
            {part: Slots(count) for part, count in given.items()},
            self._queue,
            self,
            policy=policy,
        )

    @contextmanager
    def lease(self, key: WeightKey) -> Iterator[Entry]:
        entry = self.cache.take_resident(key)
        if entry is None:
            demand = self.cache.begin((key,))
            entry = self.cache.next(demand)
            self.cache.abandon(demand)
            assert entry is not None, f"{key} did not arrive"
        yield entry
        self.cache.release((entry,))

    def arrivals(
        self, keys: Sequence[WeightKey], *, in_sets: bool = False, settles: bool = True
    ) -> Iterator[list[Entry]]:
        """As they arrive; `in_sets`: set by set, each complete before the next is read. `settles`:
        as `WeightCache.begin` has it."""
        size = self.cache.group_size
        if in_sets:
            for first in range(0, len(keys), size):
                demand = self.cache.begin(keys[first : first + size], settles=settles)
                arrived = []
                while (entry := self.cache.next(demand)) is not None:
                    arrived.append(entry)
                yield arrived
                self.cache.release(arrived)
            return
        demand = self.cache.begin(keys, settles=settles)
        while (entry := self.cache.next(demand)) is not None:
            arrived = [entry, *self.cache.ready(demand, size - 1)]
            yield arrived
            self.cache.release(arrived)

    def fetch(
        self, entry: Entry, *, priority: Priority, on_done: Callable[[], None]
    ) -> Ticket[_Bytes]:
        if self._chain is not None:
            return self._chain.fetch(entry.key, self._pieces, priority=priority, on_done=on_done)
        pieces = self._pieces(entry)
        return self._queue.enqueue(self.route, pieces, priority=priority, on_done=on_done)

    def bring(self, key: WeightKey, num_bytes: int, label: str) -> Callable[[], None]:
        """Has other bytes come from the tier below, as those of `key` would -> what waits for
        them."""
        if not num_bytes:
            return lambda: None
        queue, pieces = self._queue, [_Bytes(key, num_bytes, label)]
        ticket = queue.enqueue(self.route, pieces, priority=Priority.SOON, on_done=lambda: None)

        def wait() -> None:
            queue.promote(ticket, Priority.DEMAND)
            queue.wait(lambda: ticket.state is TicketState.DONE)

        return wait

    def _pieces(self, entry: Entry) -> list[_Bytes]:
        return [_Bytes(entry.key, read.num_bytes) for read in self._reads(entry.key)]

    def read_from_disk(self, part: Part) -> bool:
        """Whether no tier has a slot for parts of that kind."""
        below = self.tier_below
        return not self.cache.fits(part) and (below is None or below.read_from_disk(part))

    def now(self) -> float:
        return self._clock.now


def _nothing() -> None:
    pass


class SimulatedRuntime:
    """Implements `Runtime` on a clock."""

    def __init__(
        self,
        lanes: Lanes,
        costs: Costs,
        weights: SimulatedWeights,
        *,
        prefetcher: Prefetcher | None,
        forecast: ExpertForecast,
        router: Router,
    ) -> None:
        """Without a `prefetcher` nothing is read beside computation (`Plan.overlap`)."""
        self.host: HostPart = NoPart()  # of experts; beside a device another may take its place
        self.stream: StreamPart | None = None  # the same
        self.runs_ahead = False  # as a device does: the host looks at no routing of many rows
        self._lanes = lanes
        self._costs = costs
        self._weights = weights
        self._prefetcher = prefetcher
        self._forecast = forecast
        self._router = router
        self._groups = RoutedGroups(forecast.outlook)
        self._num_logits = 0
        self._batch: Batch | None = None
        self._unseen: frozenset[int] = frozenset()  # layers of the pass at whose routing none looks
        self._late: list[RoutedTokens] = []  # what these have routed

    @property
    def clock(self) -> Clock:
        return self._lanes.clock

    @property
    def spans(self) -> list[Span]:
        return self._lanes.spans

    # --- weights ----------------------------------------------------------------------------------

    @contextmanager
    def lease(self, key: WeightKey) -> Iterator[Entry]:
        with self._weights.lease(key) as entry:
            yield entry

    def arrivals(self, keys: Sequence[WeightKey]) -> Iterator[list[Entry]]:
        arriving = self._weights.arrivals(
            keys, in_sets=self._prefetcher is None, settles=not self._forecast.outlook.is_open
        )
        arrived = next(arriving, None)  # its demands come before what the forecast wants
        has_worked = False
        while self._forecast.work():  # costs nothing here: it is done while weights are waited for
            has_worked = True
        if has_worked and self._prefetcher is not None:
            self._prefetcher.update()
        while arrived is not None:
            yield arrived
            arrived = next(arriving, None)

    def prefetch(self, layer: int) -> None:
        self._groups.enter(layer)
        if self._prefetcher is not None:
            self._prefetcher.enter(layer)

    def replay(self, layer: int) -> bool:
        return False  # the same work and reads, but for calls that cost nothing: see costs.py

    def replay_block(self, layer: int) -> None:
        return None

    # --- a pass -----------------------------------------------------------------------------------

    def begin(self, batch: Batch) -> None:
        self._groups.begin(batch)
        self._num_logits = len(batch.logit_rows) + len(batch.scored_rows)
        self._batch = batch
        if self._weights.read_from_disk(Part.EMBED):
            self._read_rows(batch.num_tokens)
        elif self._weights.cache.fits(Part.EMBED):
            with self._weights.lease(WeightKey(Part.EMBED)):
                pass
        if self._prefetcher is not None:
            self._prefetcher.begin(batch, self.clock.now)
        outlook = self._forecast.outlook
        self._unseen = layers_of_many_rows(outlook.table, batch) if self.runs_ahead else frozenset()
        self._late = []
        self._forecast.begin(batch, self._router.begin(batch))
        if self.stream is not None:
            self.stream.begin(batch)
        for layer in self._unseen:
            outlook.now[outlook.table.slice(layer)] = 1.0
        outlook.version += bool(self._unseen)
        self._do(self._costs.embed(batch), "embed")

    def attend(
        self, layer: int, weights: Entry, hidden: None, rows: MicroBatch
    ) -> Callable[[], None]:
        if self.stream is not None and self.stream.attend(layer, rows):
            return lambda: None
        wait = self._lanes.start(work := self._costs.attention(layer, rows), "attention")
        if not work.chains:
            wait()
        return wait

    def attended(
        self,
        layer: int,
        weights: Entry,
        hidden: None,
        rows: MicroBatch,
        begun: Callable[[], None],
    ) -> None:
        begun()

    def enter_experts(self, layer: int, weights: Entry, hidden: None, group: RowGroup) -> Routed:
        assert self._batch is not None, "a layer outside a pass"
        tokens = self._router.route(layer, self._batch, group)
        all_E = np.asarray(tokens.counts_E).tolist()
        counts: Mapping[int, int] = {e: n for e, n in enumerate(all_E) if n}
        self._groups.route()
        self._late.append(tokens)
        wanted: Iterable[int] = range(len(all_E))
        if layer not in self._unseen:
            self._tell_late()
            wanted = counts
        self._do(self._costs.route(layer, group.num_tokens), "route")
        on_host: Callable[[], None] = _nothing
        if (begun := self.host.begin(layer, group, counts)) is not None:
            counts, on_host = begun
            wanted = counts
        return Routed(tuple(wanted), _Rows(group.num_tokens, counts, on_host))

    def _tell_late(self) -> None:
        """The forecast learns what has been routed."""
        for tokens in self._late:
            if (of_all := self._groups.add(tokens)) is not None:
                self._forecast.observe(of_all)
        self._late = []

    def experts(self, layer: int, arrived: Sequence[Entry], routed: Routed) -> None:
        data: _Rows = routed.data
        rows = [data.counts.get(entry.key.index, 0) for entry in arrived]
        self._do(self._costs.experts(layer, [count for count in rows if count]), "experts")

    def leave_experts(self, layer: int, routed: Routed) -> None:
        data: _Rows = routed.data
        data.on_host()
        self._do(self._costs.combine(layer, data.num_rows), "combine")

    def enter_dense(self, layer: int, weights: Entry, hidden: None, group: RowGroup) -> int:
        return group.num_tokens

    def dense(self, layer: int, weights: Entry, normed: int) -> None:
        self._do(self._costs.dense(layer, normed), "dense")

    def enter_head(self, hidden: None, batch: Batch) -> None:
        if not self.runs_ahead:
            self._forecast.end(self._router.end())
        with self._weights.lease(WeightKey(Part.FINAL)):
            pass

    def head(self, weights: Entry, final: None) -> None:
        self._do(self._costs.head(weights.key.index, self._num_logits), "head")

    def finish(self, final: None) -> Outcome:
        if self.runs_ahead:  # what is on its way is told when the results are there
            self._tell_late()
            self._forecast.end(self._router.end())
        if self._prefetcher is not None:
            self._prefetcher.end(self.clock.now)
        return Outcome(None, None, None, None)

    def _do(self, work: LaneWork, label: str) -> None:
        """The caller waits for `work`."""
        self._lanes.start(work, label)()

    def _read_rows(self, num_rows: int) -> None:
        over: list[bool] = []
        seconds = self._costs.embedding_rows(num_rows)
        self._lanes.of(DISK_TO_HOST).put(seconds, lambda: over.append(True), "embedding")
        while not over:
            self.clock.wait()

"""The runtime that computes: glue between pass, decoder math, weight store and key/value store.

Owns nothing that outlives a pass except the stores it was given. All calls
come from one thread, on the device's compute stream. With `routing_report.py` the only place where
the host reads what a pass has computed; each time it waits for an event.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from windlass.decoder import block as math
from windlass.decoder.router import router_weights
from windlass.device.streams import Streams
from windlass.forecast.interface import ExpertForecast
from windlass.ids import Part, WeightKey
from windlass.kvcache.kv_cache import KvCache
from windlass.models.spec import ModelSpec, Moe
from windlass.prefetch.prefetcher import Prefetcher
from windlass.runtime.attention_metadata import AttentionMetadata, PassRows, pass_rows
from windlass.runtime.attention_ops import AttentionOps
from windlass.runtime.capture import ComputedBlock, LayerCapture
from windlass.runtime.head import Final, Head
from windlass.runtime.host_attention import OnHost
from windlass.runtime.host_experts import OnHost as OnHostExperts
from windlass.runtime.layer_ops import LayerOps
from windlass.runtime.machine import Machine
from windlass.runtime.routing_report import RoutingReport
from windlass.schedule.batch import Batch, MicroBatch, RowGroup
from windlass.schedule.observer import RouterReader, RoutingObserver
from windlass.schedule.runtime import Outcome, Routed
from windlass.tensors import Tensors, plain
from windlass.weights.store import Arrivals, Lease, WeightStore

_EMBED = WeightKey(Part.EMBED)


class _Rows(NamedTuple):
    """Rows of a layer on their way through its experts."""

    counts: dict[int, int] | None  # rows of each expert that has any; None: nobody has looked
    block: ComputedBlock
    is_replayed: bool
    on_host: OnHostExperts | None = None


class _DenseRows(NamedTuple):
    """Rows of a layer without experts on their way through its network."""

    hidden_TD: torch.Tensor
    normed: torch.Tensor
    at_end: Tensors


@dataclass(frozen=True, slots=True)
class Foresight:
    """Who expects uses of experts, who hints at them (None: nothing is read beside computation,
    `Plan.overlap`), who else is told of routing, and who wants the routers' weights."""

    forecast: ExpertForecast
    prefetcher: Prefetcher | None
    observers: tuple[RoutingObserver, ...] = ()
    router_readers: tuple[RouterReader, ...] = ()

    def words(self) -> str:
        """Whether speculation pays, for people; empty where that is not known."""
        return self.prefetcher.words() if self.prefetcher is not None else ""


def _of(hidden: torch.Tensor, rows: MicroBatch | RowGroup) -> torch.Tensor:
    """Those rows of the hidden states, which a change of them changes."""
    if rows.num_tokens == hidden.shape[0]:
        return hidden
    return hidden[rows.first_token : rows.first_token + rows.num_tokens]


def _embedding(store: WeightStore, batch: Batch, ids_T: torch.Tensor) -> torch.Tensor:
    """(T, D) in the stored type: of the resident table, or just those rows from disk."""
    if not store.cache.fits(Part.EMBED):
        return store.read_rows(_EMBED, [token for own in batch.segments for token in own.token_ids])
    with store.lease(_EMBED) as lease:
        return plain(lease.tensors, "weight")[ids_T]


class _Routers:
    """Hands the weights of each layer's router out, when its block is first there."""

    def __init__(self, spec: ModelSpec, streams: Streams, readers: Sequence[RouterReader]) -> None:
        self._spec = spec
        self._streams = streams
        self._readers = readers
        blocks = spec.trunk.blocks
        layers = {i for i, block in enumerate(blocks) if isinstance(block.ffn, Moe)}
        self._unread = layers if readers else set()

    def read(self, layer: int, block: Tensors) -> None:
        if layer in self._unread:
            self._unread.remove(layer)
            router = router_weights(self._spec, layer, block, self._streams)
            for reader in self._readers:
                reader.set_router(router)


def _left(
    done: ComputedBlock, on_host: OnHostExperts
) -> tuple[ComputedBlock, dict[int, int] | None]:
    """What the host leaves to the device, and rows of each expert there."""
    return done._replace(routed=done.routed._replace(groups=on_host.groups)), on_host.counts


class HostRuntime:
    """Implements `Runtime` on a machine that is given."""

    def __init__(
        self,
        spec: ModelSpec,
        machine: Machine,
        weights: WeightStore,
        kv: KvCache,
        foresight: Foresight,
    ) -> None:
        self._spec = spec
        self._kernels = kernels = machine.kernels
        self._memory, self._streams = machine.memory, (streams := machine.memory.streams)
        self._tracer = tracer = machine.tracer
        self._experts = machine.experts
        self._weights, self._kv = weights, kv
        self._prefetcher = foresight.prefetcher
        self._forecast = foresight.forecast
        self._routing = routing = RoutingReport(foresight.forecast, foresight.observers, streams)
        self._blocks = LayerOps(spec, kernels, tracer=tracer, by_row=machine.by_row,
                                wants_scores=routing.wants_scores)  # fmt: skip
        self._attention = AttentionOps(spec, kernels, kv, machine.memory, tracer, machine.below)
        self._capture = LayerCapture(spec, (self._blocks, self._attention), machine, weights)
        self._routers = _Routers(spec, streams, foresight.router_readers)
        self._head = Head(spec, kernels, machine.memory, tracer)
        self._rows: PassRows | None = None  # of the pass under way
        self._metadata: Mapping[int, AttentionMetadata] = {}
        self._outputs: torch.Tensor | None = None

    # --- weights ----------------------------------------------------------------------------------

    def lease(self, key: WeightKey) -> AbstractContextManager[Lease]:
        return self._weights.lease(key)

    def arrivals(self, keys: Sequence[WeightKey]) -> Iterator[list[Lease]]:
        at_once = self._weights.cache.group_size
        settles = not self._forecast.outlook.is_open  # no other group is to route the layer
        if self._prefetcher is None:
            for first in range(0, len(keys), at_once):
                arriving = self._weights.arrivals(keys[first : first + at_once], settles=settles)
                yield arriving.all()
                arriving.close()
            return
        arriving = self._weights.arrivals(keys, settles=settles)
        while True:
            if not arriving.has_ready:
                arriving.release()
                self._work(arriving)
            arrived = arriving.group(at_once)
            if not arrived:
                return
            yield arrived

    def _work(self, arriving: Arrivals) -> None:
        """The forecast's arithmetic, as long as there is nothing to compute; then hints at what
        follows from it."""
        outlook = self._forecast.outlook
        before = outlook.version
        while arriving.must_wait and self._forecast.work():
            pass
        if self._prefetcher is not None and outlook.version != before:
            self._prefetcher.update()

    def prefetch(self, layer: int) -> None:
        self._routing.enter(layer)
        if self._prefetcher is not None:
            self._prefetcher.enter(layer)

    # --- a pass -----------------------------------------------------------------------------------

    def begin(self, batch: Batch) -> torch.Tensor:
        with self._tracer.span("embed", rows=batch.num_tokens):
            hidden = self._embed(batch, range(len(self._spec.trunk.blocks)))
            if self._prefetcher is not None:
                self._prefetcher.begin(batch, self._weights.now())
            self._routing.begin(batch, hidden)
            hidden, self._metadata = self._capture.begin(batch, hidden, self._metadata)
            return hidden

    def _embed(self, batch: Batch, layers: range, before: Sequence[int] = ()) -> torch.Tensor:
        """Hidden states of the tokens, which go through `layers`; where they are, for attention."""
        self._attention.begin_pass(batch, layers)
        given = self._kv.uncleared(), self._attention.tiles
        self._rows = rows = pass_rows(batch, self._kv.page_tokens, self._memory, before, *given)
        self._kv.clear_all(rows.cleared_P)
        self._metadata = rows.metadata
        return math.embed(self._spec, _embedding(self._weights, batch, rows.tokens_T))

    @property
    def _rows_of_pass(self) -> PassRows:
        assert self._rows is not None, "no pass has begun"
        return self._rows

    def replay(self, layer: int) -> bool:
        if self._routing.wants_states:
            return False  # a layer in one piece does not show them
        done = self._capture.layer(layer)
        if done is not None and done.routed is not None:
            self._routing.captured(layer, done.routed)
        return done is not None

    def replay_block(self, layer: int) -> Routed | None:
        done = self._capture.block(layer)
        if done is None:
            return None
        self._routers.read(layer, done.at_end)
        return self._routed(layer, done, None)

    def attend(
        self, layer: int, weights: Lease, hidden: torch.Tensor, rows: MicroBatch
    ) -> OnHost | None:
        metadata = self._metadata[rows.first_token]
        return self._attention.begin(layer, weights.tensors, _of(hidden, rows), rows, metadata)

    def attended(
        self, layer: int, weights: Lease, hidden: torch.Tensor, rows: MicroBatch, begun: Any
    ) -> None:
        self._attention.end(layer, weights.tensors, _of(hidden, rows), begun)

    def enter_experts(
        self, layer: int, weights: Lease, hidden: torch.Tensor, group: RowGroup
    ) -> Routed:
        self._routers.read(layer, weights.tensors)
        hidden = _of(hidden, group)
        routed = self._blocks.route(layer, weights.tensors, hidden, group)
        shared_TD = self._blocks.shared(layer, weights.tensors, hidden, routed)
        at_end = self._blocks.output_tensors(weights.tensors)
        outputs = self._expert_outputs(routed.groups.order.shape[0], hidden.shape[1])
        return self._routed(layer, ComputedBlock(hidden, routed, shared_TD, at_end, outputs), group)

    def _routed(self, layer: int, done: ComputedBlock, group: RowGroup | None) -> Routed:
        """`group`: of the rows, which the host may have a part of; None where they are replayed."""
        # first, so that what the host wants takes no slot of what is used now
        counts = self._routing.tell(layer, done.routed, done.hidden_TD)
        on_host = None
        if group is not None and self._experts is not None:
            on_host = self._experts.begin(layer, done.routed, group, self._kernels)
        done, counts = (done, counts) if on_host is None else _left(done, on_host)
        chosen = range(len(done.routed.groups.counts_E)) if counts is None else counts
        return Routed(tuple(chosen), _Rows(counts, done, group is None, on_host))

    def _expert_outputs(self, places: int, width: int) -> torch.Tensor:
        """Memory of one layer's expert outputs, the same for all layers and groups of a pass."""
        if self._outputs is None or self._outputs.shape[0] < places:
            self._outputs = None  # freed before the next is made
            self._outputs = self._memory.empty(places, width)
        return self._outputs[:places]

    def experts(self, layer: int, arrived: Sequence[Lease], routed: Routed) -> None:
        data: _Rows = routed.data
        block = data.block
        experts = {lease.key.index: lease.tensors for lease in arrived}
        if not (data.is_replayed and self._capture.experts(layer, experts, block)):
            if data.counts is None:  # what they have on average
                rows = len(block.outputs) * len(experts) // len(block.routed.groups.counts_E)
            else:
                rows = sum(data.counts[expert] for expert in experts)
            self._blocks.experts(layer, experts, block.routed, block.outputs, rows)

    def leave_experts(self, layer: int, routed: Routed) -> None:
        data: _Rows = routed.data
        block = data.block
        if data.on_host is not None:
            data.on_host.end(block.outputs)
        if not (data.is_replayed and self._capture.combine(layer, block)):
            self._blocks.combine(
                layer, block.at_end, block.hidden_TD, block.routed, block.outputs, block.shared_TD
            )

    def enter_dense(
        self, layer: int, weights: Lease, hidden: torch.Tensor, group: RowGroup
    ) -> _DenseRows:
        hidden = _of(hidden, group)
        at_end = self._blocks.output_tensors(weights.tensors)
        return _DenseRows(hidden, self._blocks.ffn_input(weights.tensors, hidden), at_end)

    def dense(self, layer: int, weights: Lease, normed: _DenseRows) -> None:
        self._blocks.dense(layer, weights.tensors, normed.at_end, normed.hidden_TD, normed.normed)

    def enter_head(self, hidden: torch.Tensor, batch: Batch) -> Final:
        self._routing.end(hidden)
        with self._weights.lease(WeightKey(Part.FINAL)) as lease:
            w = lease.tensors
            bias_V = plain(w, "head_bias").clone() if self._spec.head_bias else None
            normed = partial(self._blocks.final_norm, w, hidden)
            return self._head.begin(self._rows_of_pass, normed, batch.scoring, bias_V)

    def head(self, weights: Lease, final: Final) -> None:
        self._head.add(weights.key.index, weights.tensors["weight"], final)

    def finish(self, final: Final) -> Outcome:
        self._outputs = None
        self._capture.end()
        logits, own, best, bests, ids, tops, *ranks = self._streams.on_host(*final.results)
        if not final.drafts:
            self._routing.finish()
            if self._prefetcher is not None:
                self._prefetcher.end(self._weights.now())
        return Outcome(logits, own, best, bests, ids, tops, final.states_TD, *ranks)


class DraftingHostRuntime(HostRuntime):
    """Implements `DraftRuntime`, where the last block of the model drafts. Nobody is told of what
    that layer routes: it is no part of the pass that forecasts are of."""

    def enter_head(self, hidden: torch.Tensor, batch: Batch) -> Final:
        final = super().enter_head(hidden, batch)
        with self._weights.lease(WeightKey(Part.FINAL)) as lease:
            final.states_TD = math.final_norm(self._kernels, self._spec, lease.tensors, hidden)
        return final

    def join(
        self, weights: Lease, states: torch.Tensor, rows: Sequence[int], batch: Batch
    ) -> torch.Tensor:
        with self._tracer.span("embed", rows=batch.num_tokens):
            embedded = self._embed(batch, range(len(self._spec.blocks))[-1:], rows)
            if len(rows) < len(states):
                states = states[self._rows_of_pass.before_T]
            hidden = math.join(self._kernels, self._spec, weights.tensors, embedded, states)
            hidden, self._metadata = self._capture.begin(batch, hidden, self._metadata)
            return hidden

    def enter_draft_head(self, weights: Lease, hidden: torch.Tensor, batch: Batch) -> Final:
        assert not self._spec.head_bias, "no family that drafts has a bias of the head"
        w = weights.tensors

        def normed(rows_R: torch.Tensor) -> torch.Tensor:
            if not len(rows_R):
                return hidden[:0]
            return math.draft_norm(self._kernels, self._spec, w, hidden[rows_R])

        final = self._head.begin(self._rows_of_pass, normed, batch.scoring)
        final.drafts = True
        return final

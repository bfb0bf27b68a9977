"""The runtime that computes: glue between pass, decoder math, weight store and key/value store.

Owns nothing that outlives a pass except the stores and the usage forecast it was given. All calls
come from one thread. The only place where routing is read back to Python.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from windlass.decoder import block as math
from windlass.decoder.attention import value_width
from windlass.decoder.delta import delta_attention
from windlass.decoder.moe import dense_ffn, route, shared_expert
from windlass.decoder.rope import RopeTable
from windlass.decoder.score import RunningLogprobs
from windlass.device.host import empty
from windlass.ids import Part, WeightKey
from windlass.kernels.base import AttentionOptions, ExpertRows, Groups, Kernels
from windlass.memory.kv import KvStore
from windlass.memory.weights import Lease, WeightStore
from windlass.packed import floats_or_none, plain
from windlass.schedule.announce import Announcer, PassForecast
from windlass.schedule.batch import CHUNK_TOKENS, Batch, MicroBatch
from windlass.schedule.embedding import EmbeddingRows
from windlass.schedule.places import Places, Step, is_repeatable, places_of
from windlass.schedule.runtime import Outcome, Routed
from windlass.spec.model import GatedDelta, Gqa, Mla, ModelSpec, Moe, Rope
from windlass.trace import Tracer

_T = TypeVar("_T")
_SCORE_BYTES = 8 << 20  # of logits that only a score is taken of


class _Rows(NamedTuple):
    """Rows of a layer on their way through its experts."""

    h_TD: torch.Tensor
    weights_TA: torch.Tensor
    places: dict[int, tuple[torch.Tensor, torch.Tensor]]  # rows and places of each expert
    outputs: torch.Tensor  # (T * A, D) by place
    shared_TD: torch.Tensor | None


@dataclass(slots=True)
class _Final:
    """Rows on their way through the head."""

    h_RD: torch.Tensor
    logits_RV: torch.Tensor
    bias_V: torch.Tensor | None
    scores: RunningLogprobs
    h_SD: torch.Tensor  # rows whose targets are scored
    column: int


class DeviceRuntime:
    """Implements `Runtime` on a device whose kernels are given."""

    def __init__(
        self,
        spec: ModelSpec,
        kernels: Kernels,
        weights: WeightStore,
        kv: KvStore,
        *,
        embedding: EmbeddingRows,
        announcer: Announcer | None,
        forecast: PassForecast,
        tracer: Tracer,
    ) -> None:
        """Without an `announcer` nothing is read beside computation (`Plan.overlap`)."""
        self._spec = spec
        self._kernels = kernels
        self._weights = weights
        self._kv = kv
        self._embedding = embedding
        self._announcer = announcer
        self._forecast = forecast
        self._tracer = tracer
        self._ropes = {rope: RopeTable(rope) for rope in ropes(spec)}
        self._places: dict[int, Places] = {}
        self._step: Step | None = None  # of passes that go one way, the last one included
        self._outputs: torch.Tensor | None = None

    # --- weights ----------------------------------------------------------------------------------

    def lease(self, key: WeightKey) -> AbstractContextManager[Lease]:
        return self._weights.lease(key)

    def arrivals(self, keys: Sequence[WeightKey]) -> Iterator[list[Lease]]:
        group_size = self._weights.group_size
        if self._announcer is None:
            for first in range(0, len(keys), group_size):
                arriving = self._weights.arrivals(keys[first : first + group_size])
                yield arriving.all()
                arriving.close()
            return
        arriving = self._weights.arrivals(keys)
        for lease in arriving:
            yield [lease, *arriving.ready(group_size - 1)]

    def announce(self, layer: int) -> None:
        if self._announcer is not None:
            self._announcer.enter(layer)

    # --- a pass -----------------------------------------------------------------------------------

    def begin(self, batch: Batch) -> torch.Tensor:
        with self._tracer.span("embed", rows=batch.num_rows):
            tokens = [token for segment in batch.segments for token in segment.token_ids]
            self._places = {
                micro.first_row: places_of(micro, self._kv.page_tokens)
                for micro in batch.micro_batches
            }
            self._forecast.begin(batch.num_rows)
            hidden = math.embed(self._spec, self._embedding.rows(tokens))
            return self._repeat(batch, hidden)

    def _repeat(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states where those of the last pass were, if this one can go the same way."""
        if not is_repeatable(batch):
            self._step = None
            return hidden
        (places,) = self._places.values()
        for rope in self._ropes:
            self._cos_sin(places, rope)
        if self._step is None or self._step.num_rows != batch.num_rows:
            recorder = self._kernels.recorder()
            self._step = None if recorder is None else Step(recorder, places, hidden)
            return hidden
        self._places = {0: self._step.next(places, hidden)}
        return self._step.hidden_TD

    def _computed(self, name: str, layer: int, weights: Lease, body: Callable[[], _T]) -> _T:
        """What `body` computes, by repeating it where the pass goes the way of an earlier one."""
        if self._step is None:
            return body()
        return self._step.recorder.run(name, layer, weights.tensors, body)

    def attention(self, layer: int, weights: Lease, hidden: torch.Tensor, rows: MicroBatch) -> None:
        attention = self._spec.blocks[layer].attention
        part = slice(rows.first_row, rows.first_row + rows.num_rows)
        with self._tracer.span("attention", layer=layer, rows=rows.num_rows):
            if isinstance(attention, GatedDelta):
                self._delta(layer, attention, weights, hidden[part], rows)
                return
            self._computed(
                "attention",
                layer,
                weights,
                lambda: self._softmax(layer, attention, weights, hidden[part], rows),
            )

    def enter_experts(self, layer: int, weights: Lease, hidden: torch.Tensor) -> Routed:
        moe = self._spec.blocks[layer].ffn
        assert isinstance(moe, Moe), "the schedule asked for experts of a dense layer"
        with self._tracer.span("route", layer=layer, rows=len(hidden)):
            h_TD, weights_TA, groups = self._computed(
                "route", layer, weights, lambda: self._route(moe, weights, hidden)
            )
            used = {expert: n for expert, n in enumerate(groups.counts_E.tolist()) if n}
            self._forecast.observe(layer, used)
        shared = None
        if (network := moe.shared) is not None:
            with self._tracer.span("shared", layer=layer, rows=len(hidden)):
                shared = self._computed(
                    "shared",
                    layer,
                    weights,
                    lambda: shared_expert(self._kernels, network, weights.tensors, h_TD),
                )
        outputs = self._expert_outputs(len(groups.order), h_TD.shape[1])
        counts = list(used.values())
        parts = zip(
            torch.split(groups.rows, counts), torch.split(groups.order, counts), strict=True
        )
        places = dict(zip(used, parts, strict=True))
        return Routed(tuple(used), _Rows(h_TD, weights_TA, places, outputs, shared))

    def _route(
        self, moe: Moe, weights: Lease, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Groups]:
        h_TD = math.ffn_input(self._kernels, self._spec, weights.tensors, hidden)
        weights_TA, ids_TA = route(self._kernels, moe, weights.tensors, h_TD)
        return h_TD, weights_TA, self._kernels.group(ids_TA, moe.num_experts)

    def _expert_outputs(self, *shape: int) -> torch.Tensor:
        """Memory of one layer's expert outputs, the same for all layers of a pass."""
        if self._outputs is None or self._outputs.shape != shape:
            self._outputs = None  # freed before the next is made
            self._outputs = empty(*shape)
        return self._outputs

    def experts(self, layer: int, group: Sequence[Lease], routed: Routed) -> None:
        moe, data = self._spec.blocks[layer].ffn, routed.data
        assert isinstance(moe, Moe), "the schedule asked for experts of a dense layer"
        work = [ExpertRows(lease.tensors, *data.places[lease.key.index]) for lease in group]
        rows = sum(one.rows.shape[0] for one in work)
        with self._tracer.span("experts", layer=layer, experts=len(work), rows=rows):
            self._kernels.experts(data.h_TD, work, moe.expert.activation, data.outputs)

    def leave_experts(self, layer: int, hidden: torch.Tensor, routed: Routed) -> None:
        data: _Rows = routed.data
        with self._tracer.span("combine", layer=layer, rows=len(hidden)):
            per_row = data.weights_TA.shape[1]
            self._kernels.combine(
                data.weights_TA,
                data.outputs.view(len(hidden), per_row, -1),
                data.shared_TD,
                hidden,
                self._spec.residual_multiplier,
            )

    def enter_dense(self, layer: int, weights: Lease, hidden: torch.Tensor) -> torch.Tensor:
        return math.ffn_input(self._kernels, self._spec, weights.tensors, hidden)

    def dense(self, layer: int, weights: Lease, hidden: torch.Tensor, normed: torch.Tensor) -> None:
        ffn = self._spec.blocks[layer].ffn
        assert not isinstance(ffn, Moe), "the schedule asked for a dense network of a MoE layer"
        with self._tracer.span("dense", layer=layer, rows=len(hidden)):
            y_TD = dense_ffn(self._kernels, ffn, weights.tensors, normed)
            math.residual(self._kernels, self._spec, hidden, y_TD)

    def enter_head(self, hidden: torch.Tensor, batch: Batch) -> _Final:
        rows, scored = batch.logit_rows, batch.scored_rows
        with self._weights.lease(WeightKey(Part.FINAL)) as lease:
            h_RD = math.final_norm(self._kernels, self._spec, lease.tensors, hidden[rows])
            h_SD = math.final_norm(self._kernels, self._spec, lease.tensors, hidden[scored])
            bias_V = plain(lease.tensors, "head_bias").clone() if self._spec.head_bias else None
        logits_RV = h_RD.new_empty(len(rows), self._spec.vocab_size)
        return _Final(h_RD, logits_RV, bias_V, RunningLogprobs(batch.targets), h_SD, 0)

    def head(self, weights: Lease, final: _Final) -> None:
        w_VD = weights.tensors["weight"]
        part = slice(final.column, final.column + w_VD.shape[0])
        with self._tracer.span("head", rows=len(final.h_RD), chunk=weights.key.index):
            bias = None if final.bias_V is None else final.bias_V[part]
            if len(final.h_RD):
                logits = math.logits(self._kernels, self._spec, w_VD, bias, final.h_RD)
                final.logits_RV[:, part] = logits
            # a few rows at a time: logits of all of them would be larger than the pass itself
            step = max(CHUNK_TOKENS, _SCORE_BYTES // (4 * w_VD.shape[0]))
            for first in range(0, len(final.h_SD), step):
                rows = slice(first, first + step)
                logits = math.logits(self._kernels, self._spec, w_VD, bias, final.h_SD[rows])
                final.scores.add(rows, final.column, logits)
        final.column = part.stop

    def finish(self, final: _Final) -> Outcome:
        self._outputs = None
        return Outcome(final.logits_RV, final.scores.logprobs())

    # --- attention --------------------------------------------------------------------------------

    def _softmax(
        self, layer: int, attention: Gqa | Mla, lease: Lease, x_TD: torch.Tensor, rows: MicroBatch
    ) -> None:
        places, w = self._places[rows.first_row], lease.tensors
        cos = sin = None
        if attention.rope is not None:
            cos, sin = self._cos_sin(places, attention.rope)
        got = math.pre_attention(self._kernels, self._spec, attention, w, x_TD, cos, sin)
        for store, x_TKd in zip(self._kv.stored(layer), (got.key_TKd, got.value_TKv), strict=False):
            self._kernels.write_rows(store, places.pages, places.offsets, x_TKd)
        gqa = attention if isinstance(attention, Gqa) else None
        options = AttentionOptions(
            scale=attention.scale,
            value_dim=value_width(attention),
            window=gqa.window if gqa else None,
            sinks_H=floats_or_none(w, "sinks") if gqa and gqa.sinks else None,
        )
        keys, values = self._kv.paged(layer)
        o_THv = self._kernels.attention(got.q_THd, keys, values, places.work, options)
        math.post_attention(self._kernels, self._spec, attention, w, x_TD, o_THv, got.gate_THv)

    def _cos_sin(self, places: Places, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        if rope not in places.tables:
            found = self._ropes[rope].cos_sin(places.positions, long_T=places.long_rope)
            places.tables[rope] = found
        return places.tables[rope]

    def _delta(
        self, layer: int, attention: GatedDelta, lease: Lease, x_TD: torch.Tensor, rows: MicroBatch
    ) -> None:
        h_TD = math.attention_input(self._kernels, self._spec, lease.tensors, x_TD)
        segments = self._places[rows.first_row].delta
        conv, state = self._kv.states(layer)
        y_TD = delta_attention(self._kernels, attention, lease.tensors, h_TD, segments, conv, state)
        math.residual(self._kernels, self._spec, x_TD, y_TD)


def ropes(spec: ModelSpec) -> set[Rope]:
    """Kinds of rotary positions in the model; each has a table."""
    attentions = [block.attention for block in spec.blocks]
    return {a.rope for a in attentions if isinstance(a, Gqa | Mla) and a.rope is not None}

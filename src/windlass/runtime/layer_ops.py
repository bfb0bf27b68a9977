"""What a layer computes, module by module, on weights that are given. Knows keys and values and
where rows are, not where weights come from."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from windlass.decoder import block as math
from windlass.decoder.attention import (
    CosSin,
    Projected,
    attention_output,
    project,
    value_width,
)
from windlass.decoder.moe import dense_ffn, route, shared_expert
from windlass.decoder.recurrent import recurrent_attention
from windlass.decoder.rope import RopeTable
from windlass.device.base import Allocator
from windlass.kernels.interface import AttentionOptions, ExpertGroups, Kernels, Routes
from windlass.kvcache.kv_cache import KvCache
from windlass.models.spec import Ffn, Gqa, Mla, ModelSpec, Moe, Recurrent, Rope
from windlass.runtime.attention_metadata import AttentionMetadata
from windlass.tensors import Tensors, floats_or_none, plain
from windlass.trace import Tracer


class RoutedRows(NamedTuple):
    """Rows that know their experts."""

    h_TD: torch.Tensor  # what experts read
    router_TD: torch.Tensor  # what the router read
    routes: Routes
    groups: ExpertGroups


class LayerOps:
    """Runs modules of layers; each is a span of the trace."""

    def __init__(
        self,
        spec: ModelSpec,
        kernels: Kernels,
        kv: KvCache,
        *,
        memory: Allocator,
        tracer: Tracer,
        wants_scores: bool,
    ) -> None:
        """`memory`: of the device whose kernels are given. `wants_scores`: routing hands out the
        router's scores of all experts."""
        self._spec = spec
        self._kernels = kernels
        self._kv = kv
        self._tracer = tracer
        self._wants_scores = wants_scores
        self._ropes = {rope: RopeTable(rope, memory) for rope in ropes(spec)}

    def attention(
        self, layer: int, w: Tensors, x_TD: torch.Tensor, metadata: AttentionMetadata
    ) -> None:
        """Adds a block's attention to the hidden states, in place."""
        attention = self._spec.blocks[layer].attention
        assert attention is not None, "the schedule asked for attention of a layer without"
        with self._tracer.span("attention", layer=layer, rows=x_TD.shape[0]):
            if isinstance(attention, Recurrent):
                self._recurrent(layer, attention, w, x_TD, metadata)
            else:
                self._softmax(layer, attention, w, x_TD, metadata)

    def route(self, layer: int, w: Tensors, hidden: torch.Tensor) -> RoutedRows:
        """From the hidden states of all rows to their experts."""
        moe = self._moe(layer)
        with self._tracer.span("route", layer=layer, rows=hidden.shape[0]):
            h_TD, router_TD = math.routing_inputs(self._kernels, self._spec, moe, w, hidden)
            routes = route(self._kernels, moe, w, router_TD, wants_scores=self._wants_scores)
            groups = self._kernels.group(routes.ids_TA, moe.num_experts)
            return RoutedRows(h_TD, router_TD, routes, groups)

    def shared(
        self, layer: int, w: Tensors, hidden: torch.Tensor, routed: RoutedRows
    ) -> torch.Tensor | None:
        """Of the expert that all rows use, where there is one."""
        shared, h_TD = self._moe(layer).shared, routed.h_TD
        if shared is None:
            return None
        with self._tracer.span("shared", layer=layer, rows=h_TD.shape[0]):
            if shared.own_norms:
                h_TD = math.ffn_input(self._kernels, self._spec, w, hidden)
            y_TD = shared_expert(self._kernels, shared, w, h_TD)
            return math.shared_output(self._kernels, self._spec, shared, w, y_TD)

    def experts(
        self,
        layer: int,
        experts: Mapping[int, Tensors],
        routed: RoutedRows,
        outputs: torch.Tensor,
        rows: int,
    ) -> None:
        """Some experts, over the `rows` rows that chose them, to their places of `outputs`."""
        activation = self._moe(layer).expert.activation
        with self._tracer.span("experts", layer=layer, experts=len(experts), rows=rows):
            self._kernels.experts(routed.h_TD, experts, routed.groups, activation, outputs)

    def combine(
        self,
        layer: int,
        w: Tensors,
        hidden: torch.Tensor,
        routed: RoutedRows,
        outputs: torch.Tensor,
        shared_TD: torch.Tensor | None,
    ) -> None:
        """Adds what the experts gave to the hidden states, in place. `w`: the block's, or
        `output_tensors` of it."""
        with self._tracer.span("combine", layer=layer, rows=hidden.shape[0]):
            weights_TA = routed.routes.weights_TA
            outputs_TAD = outputs.view(*weights_TA.shape, -1)
            got = math.ExpertOutputs(weights_TA, outputs_TAD, shared_TD)
            math.add_experts(self._kernels, self._spec, layer, w, hidden, got)

    def output_tensors(self, w: Tensors) -> Tensors:
        """Copies of what the end of a block needs of its part, whose slot may be gone by then."""
        return {name: plain(w, name).clone() for name in math.OUTPUT_TENSORS if name in w}

    def ffn_input(self, w: Tensors, hidden: torch.Tensor) -> torch.Tensor:
        """What the network of a block without experts reads."""
        return math.ffn_input(self._kernels, self._spec, w, hidden)

    def dense(
        self,
        layer: int,
        w: Tensors,
        block: Tensors,
        hidden: torch.Tensor,
        normed: torch.Tensor,
    ) -> None:
        """Adds the network of a block without experts to the hidden states, in place. `block`: as
        `combine` has it."""
        ffn = self._spec.blocks[layer].ffn
        assert isinstance(ffn, Ffn), "the schedule asked for a dense network of another layer"
        with self._tracer.span("dense", layer=layer, rows=hidden.shape[0]):
            y_TD = dense_ffn(self._kernels, ffn, w, normed)
            math.add_network(self._kernels, self._spec, layer, block, hidden, y_TD)

    def final_norm(self, w: Tensors, hidden: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Those rows before the head, normed."""
        if len(rows) == hidden.shape[0]:  # all of them: rows come in their order
            return math.final_norm(self._kernels, self._spec, w, hidden)
        if not rows:
            return hidden[:0]
        picked = hidden[hidden.new_tensor(rows, dtype=torch.int64)]
        return math.final_norm(self._kernels, self._spec, w, picked)

    def fill_tables(self, metadata: AttentionMetadata) -> None:
        """Cos and sin of all kinds of rotary positions that the model has."""
        for rope in self._ropes:
            self._cos_sin(metadata, rope)

    def _moe(self, layer: int) -> Moe:
        moe = self._spec.blocks[layer].ffn
        assert isinstance(moe, Moe), "the schedule asked for experts of another layer"
        return moe

    def _softmax(
        self,
        layer: int,
        attention: Gqa | Mla,
        w: Tensors,
        x_TD: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        got = self._project(layer, attention, w, x_TD, metadata)
        o_THv = self._attend(layer, attention, w, got, metadata)
        y_TD = attention_output(self._kernels, attention, w, o_THv, got.gate_THv)
        math.add_attention(self._kernels, self._spec, layer, w, x_TD, y_TD)

    def _project(
        self,
        layer: int,
        attention: Gqa | Mla,
        w: Tensors,
        x_TD: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> Projected:
        """Queries of the rows, whose keys and values are written."""
        h_TD = math.attention_input(self._kernels, self._spec, w, x_TD)
        cos_sin = None if attention.rope is None else self._cos_sin(metadata, attention.rope)
        got = project(self._kernels, attention, self._spec.norm, w, h_TD, cos_sin)
        for store, x_TKd in zip(self._kv.stored(layer), (got.key_TKd, got.value_TKv), strict=False):
            self._kernels.write_rows(store, metadata.pages, metadata.offsets, x_TKd)
        return got

    def _attend(
        self,
        layer: int,
        attention: Gqa | Mla,
        w: Tensors,
        got: Projected,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """What the queries find, by head: (T, H, v)."""
        gqa = attention if isinstance(attention, Gqa) else None
        options = AttentionOptions(
            scale=attention.scale,
            value_dim=value_width(attention),
            window=gqa.window if gqa else None,
            sinks_H=floats_or_none(w, "sinks") if gqa and gqa.sinks else None,
        )
        keys, values = self._kv.paged(layer)
        return self._kernels.attention(got.q_THd, keys, values, metadata.work, options)

    def _cos_sin(self, metadata: AttentionMetadata, rope: Rope) -> CosSin:
        if rope not in metadata.tables:
            found = self._ropes[rope].cos_sin(
                metadata.positions, long_T=metadata.long_rope, below=metadata.length
            )
            metadata.tables[rope] = found
        return metadata.tables[rope]

    def _recurrent(
        self,
        layer: int,
        attention: Recurrent,
        w: Tensors,
        x_TD: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        h_TD = math.attention_input(self._kernels, self._spec, w, x_TD)
        states = self._kv.states(layer)
        y_TD = recurrent_attention(self._kernels, attention, w, h_TD, metadata.segments, states)
        math.add_attention(self._kernels, self._spec, layer, w, x_TD, y_TD)


def ropes(spec: ModelSpec) -> set[Rope]:
    """Kinds of rotary positions in the model; each has a table."""
    attentions = [block.attention for block in spec.blocks]
    return {a.rope for a in attentions if isinstance(a, Gqa | Mla) and a.rope is not None}

"""Attention of a layer, on weights that are given: by the device that computes or, where that is a
sequence's home, by the host. Knows keys and values and where rows are, not where weights come from.
"""

import torch

from windlass.decoder import block as math
from windlass.decoder.attention import CosSin, Projected, attention_output, project, value_width
from windlass.decoder.recurrent import recurrent_attention
from windlass.decoder.rope import RopeTable
from windlass.device.base import Allocator
from windlass.ids import Home
from windlass.kernels.interface import AttentionOptions, Kernels
from windlass.kvcache.kv_cache import KvCache
from windlass.models.spec import Gqa, Mla, ModelSpec, Recurrent, Rope
from windlass.runtime.attention_metadata import AttentionMetadata
from windlass.runtime.host_attention import HostAttention, OnHost
from windlass.runtime.kv_stream import KvStream
from windlass.schedule.batch import Batch, MicroBatch
from windlass.tensors import Tensors, floats_or_none
from windlass.trace import Tracer


class AttentionOps:
    """What a micro-batch's rows ask of attention; a span of the trace."""

    def __init__(
        self,
        spec: ModelSpec,
        kernels: Kernels,
        kv: KvCache,
        memory: Allocator,
        tracer: Tracer,
        below: tuple[HostAttention | None, KvStream | None] = (None, None),
    ) -> None:
        """`memory`: of the device whose kernels are given, as `kv` is. `below`: attention of
        sequences whose home is the host, and of those whose keys and values come from there, where
        there are any."""
        self._spec = spec
        self._kernels = kernels
        self._kv = kv
        self._tracer = tracer
        self._host, self._stream = below
        self._ropes = {rope: RopeTable(rope, memory) for rope in ropes(spec)}
        self.tiles = {  # of rows, that kernels take at once
            kind
            for layer, block in enumerate(spec.blocks)
            if isinstance(block.attention, Gqa | Mla)
            for kind in kernels.row_tiles(block.attention.num_heads, kv.paged(layer)[0])
        }

    def compute(
        self,
        layer: int,
        w: Tensors,
        x_TD: torch.Tensor,
        metadata: AttentionMetadata,
        streamed: MicroBatch | None = None,
    ) -> None:
        """Adds a block's attention to the hidden states, in place. `streamed`: the rows, where
        their keys and values come from the host."""
        attention = self._spec.blocks[layer].attention
        assert attention is not None, "the schedule asked for attention of a layer without"
        with self._tracer.span("attention", layer=layer, rows=x_TD.shape[0]):
            if isinstance(attention, Recurrent):
                self._recurrent(layer, attention, w, x_TD, metadata)
                return
            got = self.project(layer, attention, w, x_TD, metadata)
            if streamed is None:
                self.write(layer, got, metadata)
                o_THv = self.attend(layer, attention, w, got, metadata)
            else:
                assert self._stream is not None, "a sequence whose home is not there"
                o_THv = self._stream.attend(layer, got, self._options(attention, w), streamed)
            self.finish(layer, w, x_TD, o_THv, got.gate_THv)

    def begin_pass(self, batch: Batch, layers: range) -> None:
        """A pass through `layers` of the model begins."""
        if self._stream is not None:
            self._stream.begin(batch, layers)

    def begin(
        self,
        layer: int,
        w: Tensors,
        x_TD: torch.Tensor,
        rows: MicroBatch,
        metadata: AttentionMetadata,
    ) -> OnHost | None:
        """Begins attention of `rows`, whose hidden states are `x_TD`. None where all is computed,
        or asked of the device, at once: recurrent layers always are."""
        attention = self._spec.blocks[layer].attention
        if rows.home is not Home.HOST or not isinstance(attention, Gqa | Mla):
            is_streamed = rows.home is Home.STREAMED
            self.compute(layer, w, x_TD, metadata, rows if is_streamed else None)
            return None
        assert self._host is not None, "a sequence whose home is not there"
        with self._tracer.span("attention", layer=layer, rows=x_TD.shape[0]):
            got = self.project(layer, attention, w, x_TD, metadata)
            options = self._options(attention, w)
            return self._host.begin(layer, got, options, rows, metadata.work)

    def end(self, layer: int, w: Tensors, x_TD: torch.Tensor, begun: OnHost | None) -> None:
        """Adds what was begun elsewhere to the hidden states, in place, waiting for it."""
        if begun is not None:
            assert self._host is not None, "attention that nobody computes"
            with self._tracer.span("attention", layer=layer, rows=x_TD.shape[0]):
                o_THv = self._host.result(begun)
                self.finish(layer, w, x_TD, o_THv, begun.gate_THv)

    def project(
        self,
        layer: int,
        attention: Gqa | Mla,
        w: Tensors,
        x_TD: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> Projected:
        """Queries, keys and values of the rows."""
        h_TD = math.attention_input(self._kernels, self._spec, w, x_TD)
        cos_sin = None if attention.rope is None else self._cos_sin(metadata, attention.rope)
        return project(self._kernels, attention, self._spec.norm, w, h_TD, cos_sin)

    def write(self, layer: int, got: Projected, metadata: AttentionMetadata) -> None:
        """Keys and values to their pages."""
        for store, x_TKd in zip(self._kv.stored(layer), (got.key_TKd, got.value_TKv), strict=False):
            self._kernels.write_rows(store, metadata.pages, metadata.offsets, x_TKd)

    def attend(
        self,
        layer: int,
        attention: Gqa | Mla,
        w: Tensors,
        got: Projected,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """What the queries find, by head: (T, H, v)."""
        keys, values = self._kv.paged(layer)
        options = self._options(attention, w)
        return self._kernels.attention(got.q_THd, keys, values, metadata.work, options)

    def finish(
        self,
        layer: int,
        w: Tensors,
        x_TD: torch.Tensor,
        o_THv: torch.Tensor,
        gate_THv: torch.Tensor | None,
    ) -> None:
        """Projects what they found and adds it to the hidden states, in place."""
        attention = self._spec.blocks[layer].attention
        assert isinstance(attention, Gqa | Mla), "recurrent layers have their own output"
        y_TD = attention_output(self._kernels, attention, w, o_THv, gate_THv)
        math.add_attention(self._kernels, self._spec, layer, w, x_TD, y_TD)

    def fill_tables(self, metadata: AttentionMetadata) -> None:
        """Cos and sin of all kinds of rotary positions that the model has."""
        for rope in self._ropes:
            self._cos_sin(metadata, rope)

    def _options(self, attention: Gqa | Mla, w: Tensors) -> AttentionOptions:
        gqa = attention if isinstance(attention, Gqa) else None
        return AttentionOptions(
            scale=attention.scale,
            value_dim=value_width(attention),
            window=gqa.window if gqa else None,
            sinks_H=floats_or_none(w, "sinks") if gqa and gqa.sinks else None,
        )

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

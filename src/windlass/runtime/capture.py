"""Layers that are captured once and replayed: with a few tokens and all weights in memory, saying
what is to be computed takes as long as computing it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from windlass.ids import Part, WeightKey
from windlass.kernels.interface import Capture, Kernels
from windlass.models.spec import Ffn, ModelSpec, Moe
from windlass.runtime.attention_metadata import AttentionMetadata
from windlass.runtime.layer_ops import LayerOps, RoutedRows
from windlass.schedule.batch import Batch, is_capturable
from windlass.tensors import Tensors
from windlass.trace import Tracer
from windlass.weights.store import WeightStore


class ComputedLayer(NamedTuple):
    """What a layer tells of itself."""

    routed: RoutedRows | None  # of layers with experts; valid until the next layer


class LayerCapture:
    """Passes of equally many tokens, whosever: hidden states and attention metadata of
    the next take the memory of the last one's, so that a captured layer can be replayed, also when
    other passes were computed in between."""

    def __init__(
        self,
        spec: ModelSpec,
        blocks: LayerOps,
        kernels: Kernels,
        weights: WeightStore,
        tracer: Tracer,
    ) -> None:
        self._spec = spec
        self._blocks = blocks
        self._kernels = kernels
        self._weights = weights
        self._tracer = tracer
        self._pinned: dict[int, list[Tensors]] = {}  # weights of layers that are there for good
        self._passes: dict[int, _Pass] = {}  # by their number of tokens
        self._pass: _Pass | None = None  # under way, if it can be captured

    def begin(
        self, batch: Batch, hidden: torch.Tensor, metadata: Mapping[int, AttentionMetadata]
    ) -> tuple[torch.Tensor, Mapping[int, AttentionMetadata]]:
        """A pass begins: where its hidden states and the attention metadata of its micro-batches
        are from now on."""
        self._pass = None
        if not self._weights.cache.keeps_all or not is_capturable(batch):
            return hidden, metadata
        (now,) = metadata.values()
        now = now._replace(work=now.work.by_row())  # as many tiles as rows, whoever has them
        self._blocks.fill_tables(now)
        self._pass = self._passes.get(batch.num_tokens)
        if self._pass is not None:
            return self._pass.hidden_TD, {0: self._pass.next(now, hidden)}
        capture = self._kernels.capture(lambda: self._tracer.current)
        if capture is not None:
            self._pass = self._passes[batch.num_tokens] = _Pass(capture, now, hidden)
        return hidden, {0: now}

    def layer(self, layer: int) -> ComputedLayer | None:
        """See `Runtime.replay`; None where nothing was computed."""
        if self._pass is None:
            return None
        parts = self._pinned.get(layer) or self._pin(layer)
        if parts is None:
            return None
        now = self._pass
        with self._tracer.span("layer", layer=layer, rows=now.num_tokens):
            done = now.capture.run(layer, lambda: self._compute(layer, parts, now))
        if done is None:
            return None
        self._weights.cache.count_hits(Part.BLOCK, 1)
        if isinstance(self._spec.blocks[layer].ffn, Ffn):
            self._weights.cache.count_hits(Part.FFN, 1)
        if done.routed is not None:
            used = done.routed.groups.counts_E.count_nonzero()
            self._weights.cache.count_hits(Part.EXPERT, int(used))
        return done

    def end(self) -> None:
        """The pass has ended: what replays took is charged to the spans of their capture."""
        if self._pass is not None:
            for name, seconds in self._pass.capture.seconds().items():
                self._tracer.seconds[name] += seconds

    def _pin(self, layer: int) -> list[Tensors] | None:
        """Block, and network or experts."""
        ffn = self._spec.blocks[layer].ffn
        keys = [WeightKey(Part.BLOCK, layer)]
        if isinstance(ffn, Moe):
            keys += [WeightKey(Part.EXPERT, layer, expert) for expert in range(ffn.num_experts)]
        elif ffn is not None:
            keys.append(WeightKey(Part.FFN, layer))
        found = self._weights.pinned(keys)
        if found is None:
            return None
        self._pinned[layer] = [*found]
        return self._pinned[layer]

    def _compute(self, layer: int, parts: Sequence[Tensors], now: "_Pass") -> ComputedLayer:
        """What the schedule does, but for all experts at once: those without rows cost nothing."""
        block, *others = parts
        hidden = now.hidden_TD
        own = self._spec.blocks[layer]
        if own.attention is not None:
            self._blocks.attention(layer, block, hidden, now.metadata)
        ffn = own.ffn
        if isinstance(ffn, Ffn):
            normed = self._blocks.ffn_input(block, hidden)
            self._blocks.dense(layer, others[0], block, hidden, normed)
        if not isinstance(ffn, Moe):
            return ComputedLayer(None)
        routed = self._blocks.route(layer, block, hidden)
        shared_TD = self._blocks.shared(layer, block, hidden, routed)
        outputs = now.capture.empty(now.num_tokens * ffn.top_k, hidden.shape[1])
        experts = dict(enumerate(others))
        self._blocks.experts(layer, experts, routed, outputs, now.num_tokens * ffn.top_k)
        self._blocks.combine(layer, block, hidden, routed, outputs, shared_TD)
        return ComputedLayer(routed)


class _Pass:
    """What passes that replay the same captures have in common."""

    def __init__(
        self, capture: Capture, metadata: AttentionMetadata, hidden_TD: torch.Tensor
    ) -> None:
        self.capture = capture
        self.hidden_TD = hidden_TD
        self.metadata = metadata
        capture.begin(metadata.work)

    @property
    def num_tokens(self) -> int:
        return self.hidden_TD.shape[0]

    def next(self, metadata: AttentionMetadata, hidden_TD: torch.Tensor) -> AttentionMetadata:
        """Takes the tokens of the next pass over; where they are from now on."""
        own = self.metadata
        self.hidden_TD.copy_(hidden_TD)
        for to, new in zip(own[:4], metadata[:4], strict=True):
            to.copy_(new)
        for rope, tables in own.tables.items():
            for to, new in zip(tables, metadata.tables[rope], strict=True):
                to.copy_(new)
        self.capture.begin(metadata.work)
        self.metadata = own._replace(work=metadata.work, segments=metadata.segments)
        return self.metadata

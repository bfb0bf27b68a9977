"""Layers, or their blocks, that are captured once and replayed: with a few tokens and weights in
memory, saying what is to be computed takes as long as computing it."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from windlass.ids import Part, WeightKey
from windlass.kernels.interface import Capture, CapturedExperts
from windlass.models.spec import Ffn, ModelSpec, Moe, Recurrent
from windlass.runtime.attention_metadata import AttentionMetadata
from windlass.runtime.attention_ops import AttentionOps
from windlass.runtime.layer_ops import LayerOps, RoutedRows
from windlass.runtime.machine import Machine
from windlass.schedule.batch import Batch, is_capturable
from windlass.tensors import Tensors
from windlass.weights.store import WeightStore


class ComputedLayer(NamedTuple):
    """What a layer tells of itself."""

    routed: RoutedRows | None  # of layers with experts; valid until the next layer


class ComputedBlock(NamedTuple):
    """The rows of a layer that are on their way to its experts; valid until the next layer."""

    hidden_TD: torch.Tensor
    routed: RoutedRows
    shared_TD: torch.Tensor | None
    at_end: Tensors  # of the block, all that its end needs; of a replayed one, all it has
    outputs: torch.Tensor  # (T * A, D) by place, of the experts


class LayerCapture:
    """Passes of equally many tokens, whosever: hidden states and attention metadata of
    the next take the memory of the last one's, so that a captured layer can be replayed, also when
    other passes were computed in between."""

    def __init__(
        self,
        spec: ModelSpec,
        ops: tuple[LayerOps, AttentionOps],
        machine: Machine,
        weights: WeightStore,
    ) -> None:
        self._spec = spec
        self._blocks, self._attention = ops
        self._machine = machine
        self._tracer = machine.tracer
        self._weights = weights
        self._layers: dict[int, list[Tensors]] = {}  # weights of layers that are there for good
        self._alone: dict[int, Tensors] = {}  # and of blocks, where experts are not
        self._passes: dict[int, _Pass] = {}  # by their number of tokens
        self._pass: _Pass | None = None  # under way, if it can be captured
        self._used: list[torch.Tensor] = []  # rows of each expert, of its layers that are in memory

    def begin(
        self, batch: Batch, hidden: torch.Tensor, metadata: Mapping[int, AttentionMetadata]
    ) -> tuple[torch.Tensor, Mapping[int, AttentionMetadata]]:
        """A pass begins: where its hidden states and the attention metadata of its micro-batches
        are from now on."""
        self._pass, self._used = None, []
        fits = self._machine.replays and self._weights.cache.fits(Part.BLOCK)
        if not fits or not is_capturable(batch):
            return hidden, metadata
        (now,) = metadata.values()
        now = now._replace(work=now.work.by_row())  # as many tiles as rows, whoever has them
        self._attention.fill_tables(now)
        self._pass = self._passes.get(batch.num_tokens)
        if self._pass is not None:
            return self._pass.hidden_TD, {0: self._pass.next(now, hidden)}
        capture = self._machine.kernels.capture(lambda: self._tracer.current)
        if capture is not None:
            self._pass = self._passes[batch.num_tokens] = _Pass(capture, now, hidden)
        return hidden, {0: now}

    def layer(self, layer: int) -> ComputedLayer | None:
        """See `Runtime.replay`; None where nothing was computed."""
        if self._pass is None or self._is_recurrent(layer):
            return None
        parts = self._layers.get(layer) or self._pin(layer)
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
            self._used.append(done.routed.groups.counts_E.clone())  # looked at in the end
        return done

    def block(self, layer: int) -> ComputedBlock | None:
        """See `Runtime.replay_block`; None where nothing was computed."""
        now = self._pass
        if now is None or self._is_recurrent(layer):
            return None
        key = WeightKey(Part.BLOCK, layer)
        block = self._alone.get(layer)
        if block is None:
            found = self._weights.pinned((key,))
            if found is None:
                return None
            block = self._alone[layer] = found[0]
        with self._tracer.span("block", layer=layer, rows=now.num_tokens):
            done = now.capture.run(key, lambda: self._compute_block(layer, block, now))
        if done is not None:
            self._weights.cache.use_pinned(key)
        return done

    def experts(self, layer: int, experts: Mapping[int, Tensors], rows: ComputedBlock) -> bool:
        """Some experts of the layer whose `block` was replayed; False where nothing was
        computed."""
        assert self._pass is not None, "experts of another pass"
        held = self._pass.experts.get(layer)
        if held is None:
            num = rows.routed.groups.counts_E.shape[0]
            held = self._pass.experts[layer] = self._pass.capture.experts(num)
        held.hold(experts)
        places = rows.outputs.shape[0]
        return self._continue(
            ("experts", layer),
            lambda: self._blocks.experts(layer, held, rows.routed, rows.outputs, places),
        )

    def combine(self, layer: int, rows: ComputedBlock) -> bool:
        """The end of that layer; False where nothing was computed."""
        hidden, routed, shared_TD, at_end, outputs = rows
        return self._continue(
            ("combine", layer),
            lambda: self._blocks.combine(layer, at_end, hidden, routed, outputs, shared_TD),
        )

    def _continue(self, key: object, body: Callable[[], None]) -> bool:
        assert self._pass is not None, "a piece of another pass"

        def done() -> bool:
            body()
            return True

        return bool(self._pass.capture.run(key, done, continues=True))

    def end(self) -> None:
        """The pass has ended: what replays took is charged to the spans of their capture."""
        if self._used:
            used = torch.cat(self._used).count_nonzero()
            (on_host,) = self._machine.memory.streams.on_host(used)
            self._weights.cache.count_hits(Part.EXPERT, int(on_host))
            self._used = []
        if self._pass is not None:
            for name, seconds in self._pass.capture.seconds().items():
                self._tracer.seconds[name] += seconds

    def _is_recurrent(self, layer: int) -> bool:
        """Whether what it computes depends on which slots the host has given to its sequences."""
        return isinstance(self._spec.blocks[layer].attention, Recurrent)

    def _pin(self, layer: int) -> list[Tensors] | None:
        """Block, and network or experts, where none of them may be evicted."""
        ffn = self._spec.blocks[layer].ffn
        keys = [WeightKey(Part.BLOCK, layer)]
        if isinstance(ffn, Moe):
            if not self._weights.cache.fits(Part.EXPERT):
                return None
            keys += [WeightKey(Part.EXPERT, layer, expert) for expert in range(ffn.num_experts)]
        elif ffn is not None:
            keys.append(WeightKey(Part.FFN, layer))
        found = self._weights.pinned(keys)
        if found is None:
            return None
        self._layers[layer] = [*found]
        return self._layers[layer]

    def _compute(self, layer: int, parts: Sequence[Tensors], now: "_Pass") -> ComputedLayer:
        """What the schedule does, but for all experts at once: those without rows cost nothing."""
        block, *others = parts
        hidden = now.hidden_TD
        ffn = self._spec.blocks[layer].ffn
        if isinstance(ffn, Moe):
            _, routed, shared_TD, _, outputs = self._compute_block(layer, block, now)
            self._blocks.experts(layer, dict(enumerate(others)), routed, outputs, outputs.shape[0])
            self._blocks.combine(layer, block, hidden, routed, outputs, shared_TD)
            return ComputedLayer(routed)
        self._attend(layer, block, now)
        if isinstance(ffn, Ffn):
            normed = self._blocks.ffn_input(block, hidden)
            self._blocks.dense(layer, others[0], block, hidden, normed)
        return ComputedLayer(None)

    def _compute_block(self, layer: int, block: Tensors, now: "_Pass") -> ComputedBlock:
        self._attend(layer, block, now)
        routed = self._blocks.route(layer, block, now.hidden_TD)  # no rows of prompts on a device
        shared_TD = self._blocks.shared(layer, block, now.hidden_TD, routed)
        outputs = now.capture.empty(routed.groups.order.shape[0], now.hidden_TD.shape[1])
        return ComputedBlock(now.hidden_TD, routed, shared_TD, block, outputs)

    def _attend(self, layer: int, block: Tensors, now: "_Pass") -> None:
        if self._spec.blocks[layer].attention is not None:
            self._attention.compute(layer, block, now.hidden_TD, now.metadata)


class _Pass:
    """What passes that replay the same captures have in common."""

    def __init__(
        self, capture: Capture, metadata: AttentionMetadata, hidden_TD: torch.Tensor
    ) -> None:
        self.capture = capture
        self.hidden_TD = hidden_TD
        self.metadata = metadata
        self.experts: dict[int, CapturedExperts] = {}  # by layer
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
        self.metadata = own._replace(
            work=metadata.work, segments=metadata.segments, length=metadata.length
        )
        return self.metadata

"""One pass: all rows of a batch through all layers (module-based batching, MoE-Gen section 4).

Attention runs by micro-batch; routing sees all rows at once; each needed expert runs once over all
of its rows, those in memory first and together, the others as they arrive. Ordinary code over a
`Runtime`, which decides what is fetched when; nothing here knows a device.
"""

from dataclasses import dataclass
from typing import Any, Literal

from windlass.ids import Part, WeightKey
from windlass.models.spec import Block, ModelSpec, Moe
from windlass.schedule.batch import Batch
from windlass.schedule.runtime import DraftRuntime, Outcome, Routed, Runtime


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer has: attention of any kind, a dense network or experts."""

    has_attention: bool
    network: Literal["none", "dense", "experts"]


@dataclass(frozen=True, slots=True)
class PassShape:
    """What the schedule must know of a model. `draft`: of the layer behind those of a pass, where
    there is one that drafts."""

    layers: tuple[LayerShape, ...]
    num_head_chunks: int
    draft: LayerShape | None = None

    @classmethod
    def of(cls, spec: ModelSpec, num_head_chunks: int) -> "PassShape":
        layers = tuple(_layer_shape(block) for block in spec.trunk.blocks)
        draft = _layer_shape(spec.blocks[-1]) if spec.drafts else None
        return cls(layers, num_head_chunks, draft)

    @property
    def whole(self) -> "PassShape":
        """As if the layer that drafts were the last of each pass: what it costs where it runs over
        all rows, the head for guesses aside."""
        behind = () if self.draft is None else (self.draft,)
        return PassShape((*self.layers, *behind), self.num_head_chunks)


def _layer_shape(block: Block) -> LayerShape:
    has_attention = block.attention is not None
    if block.ffn is None:
        return LayerShape(has_attention, "none")
    return LayerShape(has_attention, "experts" if isinstance(block.ffn, Moe) else "dense")


def run_pass(rt: Runtime, shape: PassShape, batch: Batch) -> Outcome:
    """Runs `batch`; the logits of `batch.logit_rows`, the scores of `batch.targets`."""
    hidden = rt.begin(batch)
    for layer, own in enumerate(shape.layers):
        rt.prefetch(layer)
        if not rt.replay(layer):
            _layer(rt, layer, own, hidden, batch)
    rt.prefetch(len(shape.layers))
    final = rt.enter_head(hidden, batch)
    if batch.logit_rows or batch.scored_rows:
        _head(rt, shape, final)
    return rt.finish(final)


def run_draft(rt: DraftRuntime, shape: PassShape, batch: Batch, states: Any) -> Outcome:
    """Runs the layer that drafts over `batch`, with the states of the tokens before: the logits of
    what follows `batch.logit_rows`. Nothing of it is foreseen; it is read when it is wanted."""
    assert shape.draft is not None, "the model has no layer that drafts"
    layer = len(shape.layers)
    with rt.lease(WeightKey(Part.JOIN, layer)) as weights:
        hidden = rt.join(weights, states, batch)
    if not rt.replay(layer):
        _layer(rt, layer, shape.draft, hidden, batch)
    with rt.lease(WeightKey(Part.JOIN, layer)) as weights:
        final = rt.enter_draft_head(weights, hidden, batch)
    if batch.logit_rows:
        _head(rt, shape, final)
    return rt.finish(final)


def _head(rt: Runtime, shape: PassShape, final: Any) -> None:
    for key in (WeightKey(Part.HEAD, -1, i) for i in range(shape.num_head_chunks)):
        with rt.lease(key) as weights:
            rt.head(weights, final)


def _layer(rt: Runtime, layer: int, shape: LayerShape, hidden: Any, batch: Batch) -> None:
    if shape.network == "experts" and (replayed := rt.replay_block(layer)) is not None:
        _experts(rt, layer, hidden, replayed)
        return
    with rt.lease(WeightKey(Part.BLOCK, layer)) as weights:
        if shape.has_attention:
            for rows in batch.micro_batches:
                rt.attention(layer, weights, hidden, rows)
        if shape.network == "experts":
            routed = rt.enter_experts(layer, weights, hidden)
        elif shape.network == "dense":
            normed = rt.enter_dense(layer, weights, hidden)
    if shape.network == "experts":
        _experts(rt, layer, hidden, routed)
    elif shape.network == "dense":
        with rt.lease(WeightKey(Part.FFN, layer)) as weights:
            rt.dense(layer, weights, hidden, normed)


def _experts(rt: Runtime, layer: int, hidden: Any, routed: Routed) -> None:
    keys = [WeightKey(Part.EXPERT, layer, expert) for expert in routed.experts]
    for group in rt.arrivals(keys):
        rt.experts(layer, group, routed)
    rt.leave_experts(layer, hidden, routed)

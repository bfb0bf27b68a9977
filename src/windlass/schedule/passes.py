"""One pass: all rows of a batch through all layers (module-based batching, MoE-Gen section 4).

Attention runs by micro-batch; routing sees all rows of a group at once; each needed expert runs
once over all of them, those in memory first and together, the others as they arrive. Ordinary code
over a `Runtime`, which decides what is fetched when; nothing here knows a device.

With several groups of rows attention of the next layer is begun before the other groups have left
this one, so that it may go on beside their experts (CGOPipe of MoE-Lightning). A group
attends before those behind it in every layer: its keys and values are theirs to read.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Literal

from windlass.ids import Part, WeightKey
from windlass.models.spec import Block, ModelSpec, Moe
from windlass.schedule.batch import Batch, RowGroup
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
    if len(batch.groups) == 1:
        for layer, own in enumerate(shape.layers):
            rt.prefetch(layer)
            if not rt.replay(layer):
                _layer_alone(rt, layer, own, hidden, batch.groups)
    else:  # passes of few tokens have one group, and no others are replayed
        _layers_in_groups(rt, shape, hidden, batch.groups)
    rt.prefetch(len(shape.layers))
    final = rt.enter_head(hidden, batch)
    if batch.logit_rows or batch.scored_rows:
        _head(rt, shape, final)
        if batch.scoring.ranks:  # of tokens whose logits are known only now
            _head(rt, shape, final)
    return rt.finish(final)


def run_draft(
    rt: DraftRuntime, shape: PassShape, batch: Batch, states: Any, rows: Sequence[int]
) -> Outcome:
    """Runs the layer that drafts over `batch`, with the states of the tokens before, those `rows`
    of `states`: the logits of what follows `batch.logit_rows`. Nothing of it is foreseen; it is
    read when it is wanted."""
    assert shape.draft is not None, "the model has no layer that drafts"
    layer = len(shape.layers)
    with rt.lease(WeightKey(Part.JOIN, layer)) as weights:
        hidden = rt.join(weights, states, rows, batch)
    if not rt.replay(layer):
        _layer_alone(rt, layer, shape.draft, hidden, batch.groups)
    with rt.lease(WeightKey(Part.JOIN, layer)) as weights:
        final = rt.enter_draft_head(weights, hidden, batch)
    if batch.logit_rows:
        _head(rt, shape, final)
    return rt.finish(final)


def _head(rt: Runtime, shape: PassShape, final: Any) -> None:
    for key in (WeightKey(Part.HEAD, -1, i) for i in range(shape.num_head_chunks)):
        with rt.lease(key) as weights:
            rt.head(weights, final)


def _layer_alone(
    rt: Runtime, layer: int, shape: LayerShape, hidden: Any, groups: Sequence[RowGroup]
) -> None:
    """A layer over its one group."""
    if shape.network == "experts" and (replayed := rt.replay_block(layer)) is not None:
        _experts(rt, layer, replayed)
        return
    for _ in _layer(rt, layer, shape, hidden, groups):
        pass


def _layers_in_groups(
    rt: Runtime, shape: PassShape, hidden: Any, groups: Sequence[RowGroup]
) -> None:
    """For each layer, each group: the rest of the layer, then attention of the next begins."""
    with ExitStack() as opened:
        layers = [
            opened.enter_context(closing(_layer(rt, i, own, hidden, groups)))
            for i, own in enumerate(shape.layers)
        ]
        rt.prefetch(0)
        for _ in groups:
            next(layers[0])
        for layer, rest in enumerate(layers):
            for group in groups:
                next(rest, None)
                if layer + 1 == len(layers):
                    continue
                if group is groups[-1]:  # nobody needs this layer's experts any more
                    rt.prefetch(layer + 1)
                next(layers[layer + 1])


def _layer(
    rt: Runtime, layer: int, shape: LayerShape, hidden: Any, groups: Sequence[RowGroup]
) -> Generator[None, None, None]:
    """A layer, group by group. Stops after each group's attention has begun, and between the groups
    as they leave the layer. Its block is leased from the first attention until the last group has
    been routed: two blocks at once, where groups are in two layers."""
    ffn = None

    def rest(entered: Any) -> None:
        nonlocal ffn
        if shape.network == "experts":
            _experts(rt, layer, entered)
        elif shape.network == "dense":
            if ffn is None:
                ffn = held.enter_context(rt.lease(WeightKey(Part.FFN, layer)))
            rt.dense(layer, ffn, entered)

    with ExitStack() as held:  # the dense network, for all groups
        with rt.lease(WeightKey(Part.BLOCK, layer)) as weights:
            begun: list[list[Any]] = []
            for group in groups:
                attending = group.micro_batches if shape.has_attention else ()
                begun.append([rt.attend(layer, weights, hidden, rows) for rows in attending])
                yield
            for group, attention in zip(groups, begun, strict=True):
                for rows, one in zip(group.micro_batches, attention, strict=False):
                    rt.attended(layer, weights, hidden, rows, one)
                entered = None
                if shape.network == "experts":
                    entered = rt.enter_experts(layer, weights, hidden, group)
                elif shape.network == "dense":
                    entered = rt.enter_dense(layer, weights, hidden, group)
                if group is groups[-1]:
                    break
                rest(entered)
                yield
        rest(entered)


def _experts(rt: Runtime, layer: int, routed: Routed) -> None:
    keys = [WeightKey(Part.EXPERT, layer, expert) for expert in routed.experts]
    for arrived in rt.arrivals(keys):
        rt.experts(layer, arrived, routed)
    rt.leave_experts(layer, routed)

"""One pass: all rows of a batch through all layers (module-based batching, MoE-Gen section 4).

Attention runs by micro-batch; routing sees all rows at once; each needed expert runs once over all
of its rows, those in memory first and together, the others as they arrive. Ordinary code over a
`Runtime`, which decides what is fetched when; nothing here knows a device.
"""

from dataclasses import dataclass
from typing import Any

from windlass.ids import Part, WeightKey
from windlass.schedule.batch import Batch
from windlass.schedule.runtime import Outcome, Runtime


@dataclass(frozen=True, slots=True)
class PassShape:
    """What the schedule must know of a model."""

    is_moe: tuple[bool, ...]  # of each layer
    num_head_chunks: int


def run_pass(rt: Runtime, shape: PassShape, batch: Batch) -> Outcome:
    """Runs `batch`; the logits of `batch.logit_rows`, the scores of `batch.targets`."""
    hidden = rt.begin(batch)
    for layer, is_moe in enumerate(shape.is_moe):
        rt.prefetch(layer)
        if rt.replay(layer):
            continue
        if is_moe:
            _moe_layer(rt, layer, hidden, batch)
        else:
            _dense_layer(rt, layer, hidden, batch)
    rt.prefetch(len(shape.is_moe))
    final = rt.enter_head(hidden, batch)
    if batch.logit_rows or batch.scored_rows:
        for key in (WeightKey(Part.HEAD, -1, i) for i in range(shape.num_head_chunks)):
            with rt.lease(key) as weights:
                rt.head(weights, final)
    return rt.finish(final)


def _moe_layer(rt: Runtime, layer: int, hidden: Any, batch: Batch) -> None:
    with rt.lease(WeightKey(Part.BLOCK, layer)) as weights:
        for rows in batch.micro_batches:
            rt.attention(layer, weights, hidden, rows)
        routed = rt.enter_experts(layer, weights, hidden)
    keys = [WeightKey(Part.EXPERT, layer, expert) for expert in routed.experts]
    for group in rt.arrivals(keys):
        rt.experts(layer, group, routed)
    rt.leave_experts(layer, hidden, routed)


def _dense_layer(rt: Runtime, layer: int, hidden: Any, batch: Batch) -> None:
    with rt.lease(WeightKey(Part.BLOCK, layer)) as weights:
        for rows in batch.micro_batches:
            rt.attention(layer, weights, hidden, rows)
        normed = rt.enter_dense(layer, weights, hidden)
    with rt.lease(WeightKey(Part.FFN, layer)) as weights:
        rt.dense(layer, weights, hidden, normed)

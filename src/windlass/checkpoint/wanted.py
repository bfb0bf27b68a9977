"""Every canonical tensor of a model, and the sources it may have. Knows the spec and the names, no
checkpoint."""

from collections.abc import Iterator
from typing import NamedTuple

from windlass.ids import Part, WeightKey
from windlass.models.names import NameMap, TensorSource, TensorSources
from windlass.models.shapes import (
    Shapes,
    block_shapes,
    ffn_shapes,
    final_shapes,
    join_shapes,
    table_shape,
)
from windlass.models.spec import Ffn, ModelSpec, Recurrent


class WantedTensor(NamedTuple):
    """One canonical tensor of one part, and where it may lie."""

    key: WeightKey
    name: str
    shape: tuple[int, ...]
    sources: tuple[TensorSource, ...]
    num_stacked: int  # experts in a tensor that holds all


def all_wanted(spec: ModelSpec, names: NameMap) -> Iterator[WantedTensor]:
    """Every canonical tensor of the model; the whole head as one."""
    table = {"weight": table_shape(spec)}
    yield from _wanted(WeightKey(Part.EMBED), table, names.embed)
    for layer in range(len(spec.blocks)):
        yield from _wanted_block(spec, names, layer)
    yield from _wanted(WeightKey(Part.FINAL), final_shapes(spec), names.final)
    head = names.embed if spec.tied_head else names.head
    yield from _wanted(WeightKey(Part.HEAD), table, head)


def _wanted_block(spec: ModelSpec, names: NameMap, layer: int) -> Iterator[WantedTensor]:
    block, hidden = spec.blocks[layer], spec.hidden_size
    is_recurrent = isinstance(block.attention, Recurrent)
    attention = names.recurrent if is_recurrent else names.attention
    sources = {**names.block, **attention, **names.moe}
    yield from _wanted(WeightKey(Part.BLOCK, layer), block_shapes(spec, layer), sources)
    if block.drafts:
        yield from _wanted(WeightKey(Part.JOIN, layer), join_shapes(spec), names.join)
    if block.ffn is None:
        return
    if isinstance(block.ffn, Ffn):
        shapes = ffn_shapes(block.ffn, hidden)
        yield from _wanted(WeightKey(Part.FFN, layer), shapes, names.ffn)
        return
    shapes = ffn_shapes(block.ffn.expert, hidden)
    num = block.ffn.num_experts
    for index in range(num):
        yield from _wanted(WeightKey(Part.EXPERT, layer, index), shapes, names.expert, num)


def _wanted(
    key: WeightKey, shapes: Shapes, sources: TensorSources, num_stacked: int = 0
) -> Iterator[WantedTensor]:
    for name, shape in shapes.items():
        assert name in sources, f"the name map has no source of {name} in {key}"
        yield WantedTensor(key, name, shape, sources[name], num_stacked)

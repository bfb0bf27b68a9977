"""Finds every canonical tensor among a checkpoint's tensors. Knows names, shapes and types, reads
no file: all errors that a header can show are raised here, before anything is computed."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple

from windlass.errors import CheckpointError
from windlass.ids import Part, WeightKey
from windlass.spec.model import Ffn, GatedDelta, ModelSpec
from windlass.spec.names import (
    Layout,
    NameMap,
    Piece,
    Reshape,
    Source,
    Sources,
    Take,
    TensorInfo,
    Transpose,
    ViewOp,
)
from windlass.spec.shapes import (
    Shapes,
    block_shapes,
    ffn_shapes,
    final_shapes,
    table_shape,
)
from windlass.units import MIB

ITEM_BYTES: Mapping[str, int] = {"BF16": 2, "F16": 2, "F32": 4}

# Tensors of published checkpoints that text generation does not need. Any other tensor that the
# spec does not claim means that config.json and weights disagree, which is an error.
_UNUSED = (
    r"(^|\.)mtp[._]",  # multi-token prediction
    r"\.rotary_emb\.inv_freq$",  # computed, written by old versions of transformers
    r"^(model\.)?(visual|vision_tower|vision_model|audio_tower|multi_modal_projector)\.",
)


class _Wanted(NamedTuple):
    """One canonical tensor of one part, and where it may lie."""

    key: WeightKey
    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    num_stacked: int  # experts in a tensor that holds all


def build_layout(
    spec: ModelSpec,
    names: NameMap,
    tensors: Mapping[str, TensorInfo],
    *,
    head_chunk_bytes: int = 16 * MIB,
) -> Layout:
    """Where every part of the model lies. The head is cut into chunks of whole rows, of at most
    `head_chunk_bytes` where a row fits.

    Raises CheckpointError for a tensor that is missing, has another shape than the spec says or a
    type that Windlass does not run, and for one that the spec does not use but probably should.
    """
    prefix = _trunk_prefix(names, tensors)
    parts: dict[WeightKey, list[Piece]] = {}
    claimed: set[str] = set()
    for wanted in _all_wanted(spec, names):
        info, source = _find(wanted, prefix, tensors)
        piece = _piece(wanted, source, info)
        claimed.add(info.name)
        pieces = (
            _row_chunks(piece, info, head_chunk_bytes) if wanted.key.part == Part.HEAD else [piece]
        )
        for index, one in enumerate(pieces):
            key = wanted.key._replace(index=index) if wanted.key.part == Part.HEAD else wanted.key
            parts.setdefault(key, []).append(one)
    unused = sorted(set(tensors) - claimed)
    _check_unused(spec, names, prefix, [tensors[name] for name in unused])
    return Layout({key: tuple(pieces) for key, pieces in parts.items()}, tuple(unused))


def expected_tensors(spec: ModelSpec, names: NameMap) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of this model as the hub has them, from the spec alone."""
    tensors: dict[str, tuple[int, ...]] = {}
    for wanted in _all_wanted(spec, names):
        source = wanted.sources[0]
        name, shape = _name(source, names.prefixes[0], wanted.key), _stored_shape(wanted, source)
        assert tensors.setdefault(name, shape) == shape, f"{name} has two shapes"
    return tensors


# --- what is wanted -------------------------------------------------------------------------------


def _all_wanted(spec: ModelSpec, names: NameMap) -> Iterator[_Wanted]:
    """Every canonical tensor of the model; the whole head as one."""
    table = {"weight": table_shape(spec)}
    yield from _wanted(WeightKey(Part.EMBED), table, names.embed)
    for layer in range(len(spec.blocks)):
        yield from _wanted_block(spec, names, layer)
    yield from _wanted(WeightKey(Part.FINAL), final_shapes(spec), names.final)
    head = names.embed if spec.tied_head else names.head
    yield from _wanted(WeightKey(Part.HEAD), table, head)


def _wanted_block(spec: ModelSpec, names: NameMap, layer: int) -> Iterator[_Wanted]:
    block, hidden = spec.blocks[layer], spec.hidden_size
    is_delta = isinstance(block.attention, GatedDelta)
    sources = {**names.block, **(names.delta if is_delta else names.attention), **names.moe}
    yield from _wanted(WeightKey(Part.BLOCK, layer), block_shapes(spec, layer), sources)
    if isinstance(block.ffn, Ffn):
        shapes = ffn_shapes(block.ffn, hidden)
        yield from _wanted(WeightKey(Part.FFN, layer), shapes, names.ffn)
        return
    shapes = ffn_shapes(block.ffn.expert, hidden)
    num = block.ffn.num_experts
    for index in range(num):
        yield from _wanted(WeightKey(Part.EXPERT, layer, index), shapes, names.expert, num)


def _wanted(
    key: WeightKey, shapes: Shapes, sources: Sources, num_stacked: int = 0
) -> Iterator[_Wanted]:
    for name, shape in shapes.items():
        assert name in sources, f"the name map has no source of {name} in {key}"
        yield _Wanted(key, name, shape, sources[name], num_stacked)


# --- where it is ----------------------------------------------------------------------------------


def _trunk_prefix(names: NameMap, tensors: Mapping[str, TensorInfo]) -> str:
    """The prefix with which the embedding table exists; the usual one if there is none."""
    for prefix in names.prefixes:
        if any(source.name.format(model=prefix) in tensors for source in names.embed["weight"]):
            return prefix
    return names.prefixes[0]


def _name(source: Source, prefix: str, key: WeightKey) -> str:
    return source.name.format(model=prefix, layer=key.layer, expert=key.index)


def _find(
    wanted: _Wanted, prefix: str, tensors: Mapping[str, TensorInfo]
) -> tuple[TensorInfo, Source]:
    candidates = [(_name(source, prefix, wanted.key), source) for source in wanted.sources]
    for name, source in candidates:
        if name in tensors:
            return tensors[name], source
    place = f"{wanted.name} of {wanted.key}"
    for name, _ in candidates:
        if f"{name}_blocks" in tensors:
            raise CheckpointError(
                f"{tensors[f'{name}_blocks'].file}: {name} is stored as quantised blocks, "
                f"allowed {', '.join(ITEM_BYTES)} ({place})"
            )
    spellings = " or ".join(name for name, _ in candidates)
    files = sorted({info.file for info in tensors.values()})
    looked = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
    raise CheckpointError(
        f"tensor {spellings} is missing ({place}); looked in {looked or 'no files'}"
    )


def _stored_shape(wanted: _Wanted, source: Source) -> tuple[int, ...]:
    """Of the whole tensor on disk."""
    shape = source.shape or wanted.shape
    if source.stacked == "experts":
        return wanted.num_stacked, *shape
    if source.stacked == "rows":
        return wanted.num_stacked * shape[0], *shape[1:]
    return shape


def _piece(wanted: _Wanted, source: Source, info: TensorInfo) -> Piece:
    expected = _stored_shape(wanted, source)
    place = f"{wanted.name} of {wanted.key}"
    if info.shape != expected:
        raise CheckpointError(
            f"{info.file}: tensor {info.name} has shape {list(info.shape)}, "
            f"allowed {list(expected)} ({place})"
        )
    if info.dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{info.file}: tensor {info.name} has type {info.dtype}, "
            f"allowed {', '.join(ITEM_BYTES)} ({place})"
        )
    shape, ops = source.shape or wanted.shape, source.ops
    start = 0 if source.stacked == "no" else wanted.key.index * prod(shape)
    # leading row ranges become a smaller range of elements, so that nobody reads the other rows
    while ops and isinstance(ops[0], Take) and ops[0].dim == 0 and ops[0].step == 1:
        row = prod(shape[1:])
        start += ops[0].start * row
        shape, ops = (ops[0].stop - ops[0].start, *shape[1:]), ops[1:]
    _check_views(wanted, shape, ops)
    return Piece(wanted.name, info.name, start, start + prod(shape), shape, ops)


def _check_views(wanted: _Wanted, shape: tuple[int, ...], ops: tuple[ViewOp, ...]) -> None:
    """A name map's views must give the canonical tensor; a matrix may stay (g, n, D)."""
    for op in ops:
        match op:
            case Take(dim, start, stop, step):
                assert 0 <= start < stop <= shape[dim], f"{wanted.name}: {op} of {shape}"
                shape = (*shape[:dim], len(range(start, stop, step)), *shape[dim + 1 :])
            case Reshape(new):
                assert prod(new) == prod(shape), f"{wanted.name}: {op} of {shape}"
                shape = new
            case Transpose():
                shape = (*shape[:-2], shape[-1], shape[-2])
    folded = shape if len(shape) == len(wanted.shape) else (prod(shape[:-1]), shape[-1])
    assert folded == wanted.shape, f"{wanted.name}: views give {shape}, wanted {wanted.shape}"


def _row_chunks(piece: Piece, info: TensorInfo, chunk_bytes: int) -> list[Piece]:
    """The head in ranges of rows."""
    assert not piece.ops, "the head is stored as it is"
    num_rows, width = piece.shape
    step = max(1, chunk_bytes // (width * ITEM_BYTES[info.dtype]))
    return [
        replace(
            piece,
            start=piece.start + first * width,
            stop=piece.start + min(first + step, num_rows) * width,
            shape=(min(step, num_rows - first), width),
        )
        for first in range(0, num_rows, step)
    ]


def _check_unused(spec: ModelSpec, names: NameMap, prefix: str, tensors: list[TensorInfo]) -> None:
    heads = {source.name.format(model=prefix) for source in names.head["weight"]}
    later_layer = re.compile(re.escape(prefix) + r"(?:layers|blocks)\.(\d+)\.")
    for info in tensors:
        if any(re.search(pattern, info.name) for pattern in _UNUSED):
            continue
        if spec.tied_head and info.name in heads:
            continue  # a copy of the embedding table
        match = later_layer.match(info.name)
        if match and int(match[1]) >= len(spec.blocks):
            continue  # multi-token prediction behind the last layer
        raise CheckpointError(
            f"{info.file}: tensor {info.name} is not part of the {spec.family} model that "
            f"config.json describes ({len(spec.blocks)} layers); allowed are its own tensors, "
            "those of layers beyond the last, of multi-token prediction and of vision towers"
        )

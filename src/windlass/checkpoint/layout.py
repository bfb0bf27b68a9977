"""Finds every canonical tensor among a checkpoint's tensors. Knows names, shapes and types, reads
no file: all errors that a header can show are raised here, before anything is computed."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple

from windlass.checkpoint.locate import (
    PLAIN_TYPES,
    Found,
    find,
    is_linear,
    name_of,
    scheme_of,
    trunk_prefix,
)
from windlass.checkpoint.stored import (
    RowSet,
    StoredTensor,
    is_companion,
    packed_names,
    packed_pieces,
    row_set,
    stored_tensors,
    tensor_name,
    whole_rows,
    zero_bias,
)
from windlass.checkpoint.wanted import WantedTensor, all_wanted
from windlass.errors import CheckpointError
from windlass.ids import Part, WeightKey
from windlass.models.names import (
    Layout,
    NameMap,
    Piece,
    Reshape,
    Take,
    TensorInfo,
    TensorSource,
    Transpose,
    ViewOp,
)
from windlass.models.quantization import Scheme
from windlass.models.spec import ModelSpec
from windlass.units import MIB

ITEM_BYTES: Mapping[str, int] = {
    "BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I32": 4
}  # fmt: skip

# Tensors of published checkpoints that text generation does not need. Any other tensor that the
# spec does not claim means that config.json and weights disagree, which is an error.
_UNUSED = (
    r"(^|\.)mtp[._]",  # multi-token prediction
    r"\.layers\.\d+\.(embed_tokens|shared_head\.head)\.",  # of it: copies of the model's own
    r"\.rotary_emb\.inv_freq$",  # computed, written by old versions of transformers
    r"\.[qkv]_(scale|zero_point)$",  # of quantised queries, keys and values
    r"^(model\.)?((embed_)?(vision|visual|audio|image)|(mm_|multi_modal_)?projector|resampler)[._]",
)
# Modules of a text model, wherever it lies
_TEXT = re.compile(r"^(model\.)?(layers|blocks|embed_tokens|wte|norm|norm_f|lm_head)\.")
# A layer that predicts further tokens has what joins them to the trunk
_PREDICTS_MORE = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")


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
    prefix = trunk_prefix(names, tensors)
    parts: dict[WeightKey, list[Piece]] = {}
    claimed: dict[str, WeightKey] = {}
    for wanted in all_wanted(spec, names):
        found = find(wanted, names, prefix, tensors)
        for key, pieces in _pieces(wanted, found, tensors, head_chunk_bytes):
            claimed.update((piece.tensor, key) for piece in pieces)
            parts.setdefault(key, []).extend(pieces)
    for name in sorted(set(tensors) - set(claimed)):
        if (bias := zero_bias(tensors[name], claimed)) is not None:
            parts[bias[0]].append(bias[1])
            claimed[name] = bias[0]
    unused = sorted(set(tensors) - set(claimed))
    is_quantised = names.quantization is not None
    strays = [n for n in unused if not (is_quantised and is_companion(n, claimed))
              and not any(re.search(pattern, n) for pattern in names.unused)]  # fmt: skip
    notes = _check_unused(spec, prefix, [tensors[name] for name in strays])
    layout = Layout({key: tuple(pieces) for key, pieces in parts.items()}, tuple(unused), notes)
    if names.quantization is not None and not layout.is_quantised:
        raise CheckpointError(
            f"config.json says that weights are quantised with {names.quantization.method},"
            " found no quantised tensor"
        )
    return layout


def with_stored_head(
    spec: ModelSpec, names: NameMap, tensors: Mapping[str, TensorInfo]
) -> ModelSpec:
    """The model with the head that its files have, for `build_layout`: one that is stored counts,
    whatever config.json says of the embedding table."""
    prefix = trunk_prefix(names, tensors)
    heads = [source.name.format(model=prefix) for source in names.head["weight"]]
    stored = any(name in tensors for head in heads for name in (head, *packed_names(head)))
    return replace(spec, tied_head=False) if spec.tied_head and stored else spec


class Expected(NamedTuple):
    """A tensor that a checkpoint should have: plain, or one of those of a quantised matrix."""

    shape: tuple[int, ...]
    scheme: Scheme | None = None
    stored: StoredTensor | None = None
    width: int = 0  # of the matrix


def expected_stored(spec: ModelSpec, names: NameMap) -> dict[str, Expected]:
    """The tensors of a checkpoint of this model as the hub has them, by name, from the spec alone.
    Routers and the head are plain."""
    tensors: dict[str, Expected] = {}
    for wanted in all_wanted(spec, names):
        for name, expected in expected_of(wanted, wanted.sources[0], names, names.prefixes[0]):
            assert tensors.setdefault(name, expected) == expected, f"{name} has two shapes"
    return tensors


def expected_of(
    wanted: WantedTensor, source: TensorSource, names: NameMap, prefix: str
) -> Iterator[tuple[str, Expected]]:
    """The tensors of one canonical tensor that lies in `source`."""
    name = name_of(source, prefix, wanted.key)
    scheme = scheme_of(wanted, names, prefix, name)
    if scheme is None or not is_linear(wanted):
        yield name, Expected(_stored_shape(wanted, source))
        return
    rows = _supported_rows(wanted, source, name, scheme)
    leading = (wanted.num_stacked,) if source.stacked == "experts" else ()
    for stored in stored_tensors(scheme, rows.n, rows.k):
        shape = (*leading, *stored.shapes[0])
        own = tensor_name(scheme.naming, stored.role, name)
        yield own, Expected(shape, scheme, stored, rows.k)


# --- what is read of it ---------------------------------------------------------------------------


def _pieces(
    wanted: WantedTensor, found: Found, tensors: Mapping[str, TensorInfo], head_chunk_bytes: int
) -> Iterator[tuple[WeightKey, list[Piece]]]:
    """Keys and their pieces: one key, or for the head one for each chunk."""
    if found.scheme is None:
        info = tensors[found.name]
        piece = _piece(wanted, _source_of_shape(wanted, found, info), info)
        if wanted.key.part != Part.HEAD:
            yield wanted.key, [piece]
            return
        for index, chunk in enumerate(_row_chunks(piece, info, head_chunk_bytes)):
            yield wanted.key._replace(index=index), [chunk]
        return
    rows = _checked_rows(wanted, found, found.scheme, tensors)
    at = wanted.key.index if found.source.stacked == "experts" else 0
    if wanted.key.part != Part.HEAD:
        yield wanted.key, packed_pieces(wanted.name, found.name, found.scheme, rows, index=at)
        return
    for index, some in enumerate(_head_rows(found.scheme, rows, head_chunk_bytes)):
        pieces = packed_pieces(wanted.name, found.name, found.scheme, some)
        yield wanted.key._replace(index=index), pieces


def _source_of_shape(wanted: WantedTensor, found: Found, info: TensorInfo) -> TensorSource:
    """Of several sources of one name, that which the tensor's shape fits."""
    same = [source for source in wanted.sources if source.name == found.source.name]
    return next((s for s in same if _stored_shape(wanted, s) == info.shape), found.source)


def _checked_rows(
    wanted: WantedTensor, found: Found, scheme: Scheme, tensors: Mapping[str, TensorInfo]
) -> RowSet:
    """The rows of the stored matrix, whose tensors are all there and as they should be."""
    place = f"{wanted.name} of {wanted.key}"
    rows = _supported_rows(wanted, found.source, found.name, scheme)
    is_stack = found.source.stacked == "experts"
    for stored in stored_tensors(scheme, rows.n, rows.k):
        name = tensor_name(scheme.naming, stored.role, found.name)
        if name not in tensors:
            raise CheckpointError(
                f"tensor {name} is missing: {stored.role} of {found.name} ({place})"
            )
        leading = (wanted.num_stacked,) if is_stack else ()
        _check_stored(tensors[name], stored, leading, place)
    folded = rows.shape if len(rows.shape) == len(wanted.shape) else (prod(rows.shape[:-1]), rows.k)
    assert folded == wanted.shape, f"{wanted.name}: views give {rows}, wanted {wanted.shape}"
    return rows


def _supported_rows(
    wanted: WantedTensor, source: TensorSource, name: str, scheme: Scheme
) -> RowSet:
    """The rows of the stored matrix that `wanted` is. CheckpointError where a format is not known
    to be stored as this model type has the tensor: experts in one tensor for all, or turned."""
    rows = row_set(source.shape or wanted.shape, source.ops)
    is_turned = bool(source.ops) and isinstance(source.ops[-1], Transpose)
    form = scheme.format
    can_stack = source.stacked == "no" or (
        source.stacked == "experts" and form.rows > 0 and not form.has_groups
    )
    if rows is None or not can_stack or (is_turned and scheme.naming != "mxfp4"):
        raise CheckpointError(
            f"tensor {name} is quantised as {scheme.naming}, which is not supported where this"
            f" model type keeps {wanted.name} of {wanted.key}"
        )
    return rows


def _check_stored(
    info: TensorInfo, stored: StoredTensor, leading: tuple[int, ...], place: str
) -> None:
    allowed = [(*leading, *shape) for shape in stored.shapes]
    if info.shape not in allowed:
        raise CheckpointError(
            f"{info.file}: tensor {info.name} has shape {list(info.shape)}, "
            f"allowed {list(allowed[0])} ({place})"
        )
    if info.dtype not in stored.dtypes:
        raise CheckpointError(
            f"{info.file}: tensor {info.name} has type {info.dtype}, "
            f"allowed {', '.join(stored.dtypes)} ({place})"
        )


def _head_rows(scheme: Scheme, rows: RowSet, chunk_bytes: int) -> list[RowSet]:
    """The head in ranges of rows, where the format allows it."""
    unit = whole_rows(scheme, rows)
    if unit is None:
        return [rows]
    codes = stored_tensors(scheme, rows.n, rows.k)[0]
    per_row = codes.flat[1] * ITEM_BYTES[codes.dtypes[0]]
    step = max(unit, chunk_bytes // per_row // unit * unit)
    return [
        replace(rows, first=first, count=min(step, rows.n - first))
        for first in range(0, rows.n, step)
    ]


def _stored_shape(wanted: WantedTensor, source: TensorSource) -> tuple[int, ...]:
    """Of the whole tensor on disk."""
    shape = source.shape or wanted.shape
    if source.stacked == "experts":
        return wanted.num_stacked, *shape
    if source.stacked == "rows":
        return wanted.num_stacked * shape[0], *shape[1:]
    return shape


def _piece(wanted: WantedTensor, source: TensorSource, info: TensorInfo) -> Piece:
    expected = _stored_shape(wanted, source)
    place = f"{wanted.name} of {wanted.key}"
    if info.shape != expected:
        raise CheckpointError(
            f"{info.file}: tensor {info.name} has shape {list(info.shape)}, "
            f"allowed {list(expected)} ({place})"
        )
    if info.dtype not in PLAIN_TYPES:
        raise CheckpointError(
            f"{info.file}: tensor {info.name} has type {info.dtype}, "
            f"allowed {', '.join(PLAIN_TYPES)} ({place})"
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


def _check_views(wanted: WantedTensor, shape: tuple[int, ...], ops: tuple[ViewOp, ...]) -> None:
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


def _check_unused(spec: ModelSpec, prefix: str, tensors: list[TensorInfo]) -> tuple[str, ...]:
    """What is left unread and might have been meant, in words. Raises CheckpointError for a tensor
    that belongs to the text model and has no place in it."""
    later_layer = re.compile(re.escape(prefix) + r"(?:layers|blocks)\.(\d+)\.")
    trunk, is_nested, _ = prefix.partition("language_model.")
    root = trunk + is_nested
    later: dict[int, bool] = {}  # layer -> whether it is known to predict further tokens
    for info in tensors:
        if any(re.search(pattern, info.name) for pattern in _UNUSED):
            continue
        if is_nested and not info.name.startswith(root) and not _TEXT.match(info.name):
            continue  # beside the text model
        match = later_layer.match(info.name)
        if match and (layer := int(match[1])) >= len(spec.blocks):
            later[layer] = later.get(layer, False) or bool(_PREDICTS_MORE.search(info.name))
            continue
        raise CheckpointError(
            f"{info.file}: tensor {info.name} is not part of the {spec.family} model that "
            f"config.json describes ({len(spec.blocks)} layers); allowed are its own tensors, "
            "those of layers beyond the last, of multi-token prediction and of vision towers"
        )
    cut = sum(not predicts for predicts in later.values())
    if not cut:
        return ()
    return (
        f"weights: {cut} stored layers are left unread, config.json describes {len(spec.blocks)}",
    )

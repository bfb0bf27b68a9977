"""Finds every canonical tensor among a checkpoint's tensors. Knows names, shapes and types, reads
no file: all errors that a header can show are raised here, before anything is computed."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple

from windlass.errors import CheckpointError
from windlass.ids import Part, WeightKey
from windlass.spec.model import ModelSpec
from windlass.spec.names import (
    Layout,
    NameMap,
    Piece,
    Reshape,
    Source,
    Take,
    TensorInfo,
    Transpose,
    ViewOp,
)
from windlass.spec.quantization import Scheme
from windlass.spec.stored import (
    RowSet,
    StoredTensor,
    companions,
    module_of,
    packed_names,
    packed_pieces,
    row_set,
    stored_tensors,
    tensor_name,
    whole_rows,
)
from windlass.spec.wanted import Wanted, all_wanted
from windlass.units import MIB

PLAIN_TYPES = ("BF16", "F16", "F32")
ITEM_BYTES: Mapping[str, int] = {
    "BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I32": 4
}  # fmt: skip

# Quantised where config.json says so of linear modules. Of the others here (routers and gates are
# linear modules in some programs only, the head by its own setting), the tensors on disk decide.
_LINEAR = re.compile(r"(.*_proj|[kv]_up|shared\.(gate|up|down))\.weight|gate|up|down")
_PERHAPS_LINEAR = re.compile(r"(router|shared\.mix|[ab]_proj)\.weight")

# Tensors of published checkpoints that text generation does not need. Any other tensor that the
# spec does not claim means that config.json and weights disagree, which is an error.
_UNUSED = (
    r"(^|\.)mtp[._]",  # multi-token prediction
    r"\.rotary_emb\.inv_freq$",  # computed, written by old versions of transformers
    r"\.[qkv]_(scale|zero_point)$",  # of quantised queries, keys and values
    r"^(model\.)?(visual|vision_tower|vision_model|audio_tower|multi_modal_projector)\.",
)


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
    beside: set[str] = set()
    for wanted in all_wanted(spec, names):
        found = _find(wanted, names, prefix, tensors)
        if found.scheme is not None:
            beside.update(companions(found.scheme.naming, found.name))
        for key, pieces in _pieces(wanted, found, tensors, head_chunk_bytes):
            claimed.update(piece.tensor for piece in pieces)
            parts.setdefault(key, []).extend(pieces)
    unused = sorted(set(tensors) - claimed)
    _check_unused(spec, names, prefix, [tensors[name] for name in unused if name not in beside])
    layout = Layout({key: tuple(pieces) for key, pieces in parts.items()}, tuple(unused))
    if names.quantization is not None and not layout.is_quantised:
        raise CheckpointError(
            f"config.json says that weights are quantised with {names.quantization.method},"
            " found no quantised tensor"
        )
    return layout


def expected_tensors(spec: ModelSpec, names: NameMap) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of this model as the hub has them, from the spec alone."""
    tensors: dict[str, tuple[int, ...]] = {}
    for wanted in all_wanted(spec, names):
        source = wanted.sources[0]
        name, shape = _name(source, names.prefixes[0], wanted.key), _stored_shape(wanted, source)
        assert tensors.setdefault(name, shape) == shape, f"{name} has two shapes"
    return tensors


# --- where it is ----------------------------------------------------------------------------------


def _trunk_prefix(names: NameMap, tensors: Mapping[str, TensorInfo]) -> str:
    """The prefix with which the embedding table exists; the usual one if there is none."""
    for prefix in names.prefixes:
        if any(source.name.format(model=prefix) in tensors for source in names.embed["weight"]):
            return prefix
    return names.prefixes[0]


def _name(source: Source, prefix: str, key: WeightKey) -> str:
    return source.name.format(model=prefix, layer=key.layer, expert=key.index)


class _Found(NamedTuple):
    """Where a canonical tensor lies. `name`: of the plain tensor, which is not there where a
    `scheme` says how a matrix is packed."""

    name: str
    source: Source
    scheme: Scheme | None


def _find(wanted: Wanted, names: NameMap, prefix: str, tensors: Mapping[str, TensorInfo]) -> _Found:
    candidates = [(_name(source, prefix, wanted.key), source) for source in wanted.sources]
    place = f"{wanted.name} of {wanted.key}"
    for name, source in candidates:
        scheme, is_certain = _scheme(wanted, names, prefix, name)
        codes = tensor_name(scheme.naming, "codes", name) if scheme is not None else name
        if scheme is not None and _is_packed(tensors.get(codes)):
            return _Found(name, source, scheme)
        if name in tensors:
            if scheme is not None and is_certain:
                raise CheckpointError(
                    f"{tensors[name].file}: tensor {name} has type {tensors[name].dtype}, but"
                    f" config.json says that it is quantised (expected {codes} as {scheme.naming};"
                    f" {place})"
                )
            return _Found(name, source, None)
    for name, _ in candidates:
        for packed in packed_names(name):
            if packed in tensors:
                raise CheckpointError(
                    f"{tensors[packed].file}: {name} is stored packed, as {packed}, but"
                    f" {_expected(wanted, names, prefix, name)} ({place})"
                )
    spellings = " or ".join(name for name, _ in candidates)
    files = sorted({info.file for info in tensors.values()})
    looked = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
    raise CheckpointError(
        f"tensor {spellings} is missing ({place}); looked in {looked or 'no files'}"
    )


def _is_packed(codes: TensorInfo | None) -> bool:
    return codes is not None and codes.dtype not in PLAIN_TYPES


def _scheme(wanted: Wanted, names: NameMap, prefix: str, name: str) -> tuple[Scheme | None, bool]:
    """How config.json says that a tensor is stored, and whether that is certain."""
    if names.quantization is None or wanted.key.part in (Part.EMBED, Part.FINAL):
        return None, True
    is_head = wanted.key.part == Part.HEAD
    if is_head and wanted.sources == names.embed["weight"]:
        return None, True
    is_linear = not is_head and _LINEAR.fullmatch(wanted.name) is not None
    perhaps = is_head or _PERHAPS_LINEAR.fullmatch(wanted.name) is not None
    if not is_linear and not perhaps:
        return None, True
    module = module_of(name)
    is_expert = wanted.key.part == Part.EXPERT
    # lists may spell the trunk's name as another version of the model's code
    rest = module.removeprefix(prefix)
    spellings = [module]
    if prefix and rest != module:
        spellings += [other + rest for other in names.prefixes if other not in (prefix, "")]
    found = [names.quantization.find(one, is_expert=is_expert) for one in spellings]
    scheme, is_certain = next((one for one in found if one[0] is None), found[0])
    return scheme, is_certain and not perhaps


def _expected(wanted: Wanted, names: NameMap, prefix: str, name: str) -> str:
    scheme, _ = _scheme(wanted, names, prefix, name)
    if scheme is not None:
        return f"config.json says that it is stored as {scheme.naming}"
    if names.quantization is None:
        return "config.json has no quantization_config"
    return f"config.json says that it is not quantised, allowed {', '.join(PLAIN_TYPES)}"


# --- what is read of it ---------------------------------------------------------------------------


def _pieces(
    wanted: Wanted, found: _Found, tensors: Mapping[str, TensorInfo], head_chunk_bytes: int
) -> Iterator[tuple[WeightKey, list[Piece]]]:
    """Keys and their pieces: one key, or for the head one for each chunk."""
    if found.scheme is None:
        info = tensors[found.name]
        piece = _piece(wanted, found.source, info)
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


def _checked_rows(
    wanted: Wanted, found: _Found, scheme: Scheme, tensors: Mapping[str, TensorInfo]
) -> RowSet:
    """The rows of the stored matrix, whose tensors are all there and as they should be."""
    place = f"{wanted.name} of {wanted.key}"
    source, shape = found.source, found.source.shape or wanted.shape
    rows = row_set(shape, source.ops)
    is_stack = source.stacked == "experts"
    if rows is None or source.stacked == "rows" or (is_stack and not _can_stack(scheme)):
        raise CheckpointError(
            f"tensor {found.name} is quantised as {scheme.naming}: not supported where this model"
            f" type has it ({place})"
        )
    if isinstance((source.ops or (None,))[-1], Transpose) and scheme.naming != "mxfp4":
        raise CheckpointError(
            f"tensor {found.name}, stored (inputs, outputs), is quantised as {scheme.naming},"
            f" allowed mxfp4 ({place})"
        )
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


def _can_stack(scheme: Scheme) -> bool:
    """Whether each expert's tensors can be a range of tensors for all."""
    return scheme.format.rows > 0 and not scheme.format.has_groups


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


def _stored_shape(wanted: Wanted, source: Source) -> tuple[int, ...]:
    """Of the whole tensor on disk."""
    shape = source.shape or wanted.shape
    if source.stacked == "experts":
        return wanted.num_stacked, *shape
    if source.stacked == "rows":
        return wanted.num_stacked * shape[0], *shape[1:]
    return shape


def _piece(wanted: Wanted, source: Source, info: TensorInfo) -> Piece:
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


def _check_views(wanted: Wanted, shape: tuple[int, ...], ops: tuple[ViewOp, ...]) -> None:
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

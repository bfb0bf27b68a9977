"""The tensors that a quantised matrix has on disk: names, types, shapes, and which part of each
belongs to given rows of the matrix. Knows no family and no file."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import lcm, prod
from typing import NamedTuple

from windlass.errors import CheckpointError
from windlass.formats import WeightFormat
from windlass.ids import WeightKey
from windlass.models.names import (
    PackedShape,
    Piece,
    Reshape,
    Role,
    Take,
    TensorInfo,
    Transpose,
    ViewOp,
)
from windlass.models.quantization import Naming, Scheme

_FLOATS = ("F32", "BF16", "F16")

# What is added to the name of the plain tensor ("x.weight", "x.experts.gate_up_proj")
_ENDINGS: dict[Naming, dict[Role, str]] = {
    "fp8": {"codes": "", "scales": "_scale_inv"},
    "mxfp4": {"codes": "_blocks", "scales": "_scales"},
    "float": {"codes": "", "scales": "_scale"},
    "packed": {
        "codes": "_packed", "scales": "_scale", "zeros": "_zero_point", "groups": "_g_idx"
    },
}  # fmt: skip
# Endings of tensors that need not be read -> those of the codes that they lie beside
_COMPANIONS = {"weight_shape": ("weight_packed",), "g_idx": ("qweight",)} | {
    ending: ("weight", "weight_packed")
    for ending in "input_scale activation_scale output_scale input_zero_point "
    "output_zero_point".split()
}
# What stands in place of "weight"
_WORDS: dict[Role, str] = {
    "codes": "qweight", "scales": "scales", "zeros": "qzeros", "groups": "g_idx"
}  # fmt: skip


def tensor_name(naming: Naming, role: Role, name: str) -> str:
    """Of a tensor of the matrix whose plain tensor would be called `name`."""
    if naming in ("gptq", "awq"):
        return f"{module_of(name)}.{_WORDS[role]}"
    return name + _ENDINGS[naming][role]


def module_of(name: str) -> str:
    """The module of a tensor; of a stack of experts, the stack itself."""
    return name.removesuffix(".weight")


def is_companion(name: str, claimed: Container[str]) -> bool:
    """Whether a tensor lies beside a quantised matrix and need not be read: the matrix's shape,
    which is known; groups in their natural order; what belongs to quantised activations."""
    module, _, ending = name.rpartition(".")
    return any(f"{module}.{codes}" in claimed for codes in _COMPANIONS.get(ending, ()))


def packed_names(name: str) -> tuple[str, ...]:
    """What the codes of the matrix `name` are called in any of the formats, but for plain names."""
    return tuple(tensor_name(naming, "codes", name) for naming in ("packed", "mxfp4", "gptq"))


def zero_bias(info: TensorInfo, claimed: Mapping[str, WeightKey]) -> tuple[WeightKey, Piece] | None:
    """A bias that AutoGPTQ's early versions wrote beside each quantised matrix, also of a model
    without biases: the part of the matrix, with which it is read, and what is read of it. None for
    any other tensor."""
    module, _, ending = info.name.rpartition(".")
    key = claimed.get(f"{module}.qweight")
    if ending != "bias" or key is None or info.dtype not in _FLOATS or len(info.shape) != 1:
        return None
    return key, Piece(info.name, info.name, 0, info.shape[0], info.shape, role="zero bias")


class StoredTensor(NamedTuple):
    """One tensor of a matrix. `shapes` are those it may have, the usual one first, all of them
    (a, b) when flattened; `rows_in` the dimension of (a, b) along the matrix's rows, an index of
    which stands for `unit` rows, or None."""

    role: Role
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    flat: tuple[int, int]
    rows_in: int | None
    unit: int


@lru_cache
def stored_tensors(scheme: Scheme, n: int, k: int) -> tuple[StoredTensor, ...]:
    """Of a matrix (n, k). Raises CheckpointError where the format cannot hold that shape."""
    form = scheme.format
    found = [_codes(form, n, k), _scales(scheme, n, k)]
    groups = _blocks(k, form.columns)
    per_word = 32 // _bits(form)
    if form.zero == "rows":
        found.append(_plain("zeros", ("I32",), (_blocks(n, per_word), groups), 0, unit=per_word))
    elif form.packing != "rows":  # GPTQ's are there also where they say nothing
        _check_multiple(scheme, n, per_word, "rows")
        found.append(_plain("zeros", ("I32",), (groups, n // per_word), 1, unit=per_word))
    if form.has_groups:
        found.append(StoredTensor("groups", ("I32",), ((k,),), (1, k), None, 1))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class RowSet:
    """Rows of a stored matrix (n, k): `first + i * step` for i below `count`; with `stacks`, those
    of each of so many equal ranges of rows, `stride` long."""

    n: int
    k: int
    first: int
    count: int
    step: int = 1
    stacks: int | None = None
    stride: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        own = (self.count, self.k)
        return own if self.stacks is None else (self.stacks, *own)


def row_set(shape: tuple[int, ...], ops: tuple[ViewOp, ...]) -> RowSet | None:
    """Which rows of the stored matrix the views of a plain tensor choose; None where they do
    anything else. Formats store (outputs, inputs) whatever the plain tensor is."""
    if len(shape) != 2:
        return None
    flipped = bool(ops) and isinstance(ops[-1], Transpose)
    n, k = shape[::-1] if flipped else shape
    rows = RowSet(n, k, 0, n)
    for op in ops[:-1] if flipped else ops:
        dim = 0 if rows.stacks is None else 1
        match op:
            case Take(d, start, stop, step) if d == (1 if flipped else dim):
                first = rows.first + start * rows.step
                count = len(range(start, stop, step))
                rows = RowSet(n, k, first, count, rows.step * step, rows.stacks, rows.stride)
            case Reshape((stacks, stride, width)) if (
                (rows.count, rows.stacks, width) == (n, None, k) and not flipped
            ):  # fmt: skip
                rows = RowSet(n, k, 0, stride, 1, stacks, stride)
            case _:
                return None
    return rows


def whole_rows(scheme: Scheme, rows: RowSet) -> int | None:
    """Into multiples of how many rows the matrix can be cut so that each part is one contiguous
    range of every tensor; None where it cannot."""
    tensors = stored_tensors(scheme, rows.n, rows.k)
    if any(tensor.rows_in == 1 for tensor in tensors):
        return None
    return lcm(*(tensor.unit for tensor in tensors if tensor.rows_in == 0))


def packed_pieces(
    name: str, tensor: str, scheme: Scheme, rows: RowSet, *, index: int = 0
) -> list[Piece]:
    """Pieces of the canonical matrix `name`, whose plain tensor would be called `tensor`. `index`:
    of the expert in stacked tensors. Raises CheckpointError where rows cut a block."""
    packed = PackedShape(scheme.format, rows.shape)
    pieces = []
    for stored in stored_tensors(scheme, rows.n, rows.k):
        stored_name = tensor_name(scheme.naming, stored.role, tensor)
        start, stop, shape, ops = _part(stored_name, stored, rows)
        begin = index * prod(stored.flat)
        pieces.append(
            Piece(name, stored_name, begin + start, begin + stop, shape, ops, stored.role, packed)
        )
    return pieces


def _part(
    name: str, stored: StoredTensor, rows: RowSet
) -> tuple[int, int, tuple[int, ...], tuple[ViewOp, ...]]:
    """(start, stop, shape, views) of the part of a tensor that belongs to `rows`."""
    high, wide = stored.flat
    if stored.rows_in is None:
        return 0, high * wide, stored.flat if stored.role != "groups" else (wide,), ()
    first, count, stride = _in_units(name, stored, rows)
    take = (first, first + (count - 1) * rows.step + 1, rows.step)
    if stored.rows_in == 1:
        if rows.stacks is not None:
            views = (Reshape((high, rows.stacks, stride)), Take(2, *take))
            return 0, high * wide, stored.flat, views
        return 0, high * wide, stored.flat, () if count == wide else (Take(1, *take),)
    if rows.stacks is not None:
        views = (Reshape((rows.stacks, stride, wide)), Take(1, *take))
        return 0, high * wide, stored.flat, views
    if rows.step == 1:
        return first * wide, (first + count) * wide, (count, wide), ()
    return 0, high * wide, stored.flat, (Take(0, *take),)


def _in_units(name: str, stored: StoredTensor, rows: RowSet) -> tuple[int, int, int]:
    """First, count and stride of `rows` in entries of the tensor."""
    unit = stored.unit
    reaches_end = rows.stacks is None and rows.first + rows.count == rows.n
    is_whole = rows.first % unit == 0 and (rows.count % unit == 0 or reaches_end)
    if unit > 1 and (not is_whole or rows.step != 1 or rows.stride % unit):
        raise CheckpointError(
            f"tensor {name}: an entry stands for {unit} rows, but the model needs"
            f" {rows.count} from {rows.first} on"
            + (f" of every {rows.stride}" if rows.stacks is not None else "")
            + (f" in steps of {rows.step}" if rows.step > 1 else "")
            + f"; allowed multiples of {unit}"
        )
    return rows.first // unit, -(-rows.count // unit), rows.stride // unit


# --- one tensor -----------------------------------------------------------------------------------


def _bits(form: WeightFormat) -> int:
    return 4 if form.code in ("int4", "e2m1") else 8


def _blocks(size: int, of: int) -> int:
    return -(-size // of) if of else 1


def _plain(
    role: Role, dtypes: tuple[str, ...], shape: tuple[int, int], rows_in: int, *, unit: int = 1
) -> StoredTensor:
    return StoredTensor(role, dtypes, (shape,), shape, rows_in, unit)


def _codes(form: WeightFormat, n: int, k: int) -> StoredTensor:
    if form.code == "e4m3":
        return _plain("codes", ("F8_E4M3",), (n, k), 0)
    if form.code == "e2m1":
        if k % form.columns:
            raise CheckpointError(
                f"a matrix with rows of {k}: allowed a multiple of {form.columns} in mxfp4"
            )
        blocks = (n, k // form.columns, form.columns // 2)
        return StoredTensor("codes", ("U8",), (blocks,), (n, k // 2), 0, 1)
    per_word = 32 // _bits(form)
    if form.packing == "rows":
        return _plain("codes", ("I32",), (n, _blocks(k, per_word)), 0)
    if form.packing == "gptq":
        _check_multiple(Scheme("gptq", form), k, per_word, "columns")
        return _plain("codes", ("I32",), (k // per_word, n), 1)
    _check_multiple(Scheme("awq", form), n, per_word, "rows")
    return _plain("codes", ("I32",), (k, n // per_word), 1, unit=per_word)


def _scales(scheme: Scheme, n: int, k: int) -> StoredTensor:
    form = scheme.format
    if form.rows == 0:
        return StoredTensor("scales", _FLOATS, ((1,), (), (1, 1)), (1, 1), None, 1)
    shape = (_blocks(n, form.rows), _blocks(k, form.columns))
    if form.packing != "rows":
        return _plain("scales", _FLOATS, shape[::-1], 1)
    types = {"mxfp4": ("U8",), "fp8": (*_FLOATS, "F8_E8M0")}.get(scheme.naming, _FLOATS)
    return _plain("scales", types, shape, 0, unit=form.rows)


def _check_multiple(scheme: Scheme, size: int, of: int, what: str) -> None:
    if size % of:
        raise CheckpointError(
            f"a matrix with {size} {what}: allowed a multiple of {of} in {scheme.naming}"
        )

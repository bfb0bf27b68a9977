"""Where a matrix lies in every slot of an arena, and what its codes mean, as arguments of a kernel.

Slots of one kind are laid out alike, so one `Matrix`, made of any slot's tensors, stands for all:
a kernel adds a slot's address. Offsets are bytes from the slot's first, best multiples of 16 (8
bytes off make a copy of 16 bytes eight of 2); strides are in those of `element`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from windlass.formats import WeightFormat
from windlass.tensors import Packed, PackedStack, Weight

TYPES: dict[torch.dtype, Any] = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.uint8: tl.uint8,
    torch.int32: tl.int32,
}
SLOT_BYTES = 256  # that addresses which offsets count from are multiples of
MAX_BLOCK = 128  # columns of a tile at most; blocks of weights as wide or wider are a tile's own
MIN_BLOCK = 16  # columns that a dot takes at least


class Matrix(NamedTuple):
    """(N, K) of a type or a format (formats.py), by its place in a slot.

    `scaling`: "none"; "end": one scale for a row's whole sum; "sums": for the sum of each block of
    columns; "spread": on each number, by blocks; "gathered": on each number, by its column's group.
    All but the last two leave codes as they are, which any type holds exactly. `is_transposed`:
    codes and scales are those of the transpose (K, N), what is said here of n and k is said of its,
    and scales are on each number.
    """

    at: int
    sn: int  # of codes along n: for "awq", along words
    sk: int  # along k: for others that pack, along words or bytes
    element: Any  # type of codes as loaded
    code: Any  # "plain", "e4m3", "e2m1", "int8", "int4"
    packing: Any  # "rows", "gptq", "awq"
    scaling: Any
    is_power: Any  # scales are powers of two
    rows: Any  # of a block; 0: all
    columns: Any
    zero: Any  # "none" or how words of zero points are ordered: "low" first or "awq"
    zero_add: Any
    has_groups: Any
    is_transposed: Any
    scales_at: int = 0
    scales_sn: int = 0
    scales_sk: int = 0
    scale_type: Any = tl.constexpr(tl.float32)
    zeros_at: int = 0
    zeros_sn: int = 0  # along words of n
    zeros_sk: int = 0  # along groups
    groups_at: int = 0

    def moved(self, num_bytes: int) -> "Matrix":
        """So many bytes further on."""
        places = {n: getattr(self, n) for n in ("at", "scales_at", "zeros_at", "groups_at")}
        return self._replace(**{name: at + num_bytes for name, at in places.items()})


class Vector(NamedTuple):
    """A bias by its place in a slot, or none."""

    at: int
    stride: int
    element: Any
    is_there: Any

    def moved(self, num_bytes: int) -> "Vector":
        return self._replace(at=self.at + num_bytes)


NO_VECTOR = Vector(0, 1, tl.constexpr(tl.float32), tl.constexpr(False))


def matrix_at(w: Weight, slot: int, compute: torch.dtype) -> Matrix:
    """Of a matrix in the slot at address `slot`, for products in the type `compute`."""
    if isinstance(w, torch.Tensor):
        is_held = compute in (w.dtype, torch.float32)
        assert is_held, f"weights: got {w.dtype} for products in {compute}, which would round them"
        n, k = w.stride()
        return _matrix(w.data_ptr() - slot, n, k, w.dtype)
    assert isinstance(w, Packed), "kernels take one matrix"
    form = w.format
    sn, sk = w.codes.stride() if form.packing == "rows" else w.codes.stride()[::-1]
    found = _matrix(w.codes.data_ptr() - slot, sn, sk, _bytes_or_words(w.codes))
    is_power = w.scales.dtype == torch.uint8
    scaling = _scaling(form, is_power=is_power, compute=compute)
    found = found._replace(
        code=tl.constexpr(form.code),
        packing=tl.constexpr(form.packing),
        scaling=tl.constexpr(scaling),
        is_transposed=tl.constexpr(w.is_transposed),
        is_power=tl.constexpr(is_power),
        rows=tl.constexpr(form.rows),
        columns=tl.constexpr(form.columns),
        zero_add=tl.constexpr(form.zero_add),
        scales_at=w.scales.data_ptr() - slot,
        scales_sn=w.scales.stride(0),
        scales_sk=w.scales.stride(1),
        scale_type=tl.constexpr(TYPES[w.scales.dtype]),
    )
    if w.zeros is not None:
        zn, zk = w.zeros.stride() if form.zero == "rows" else w.zeros.stride()[::-1]
        order = "awq" if form.zero == "awq" else "low"
        found = found._replace(
            zero=tl.constexpr(order), zeros_at=w.zeros.data_ptr() - slot, zeros_sn=zn, zeros_sk=zk
        )
    if w.groups is not None:
        assert w.groups.is_contiguous(), "groups of columns: not contiguous"
        found = found._replace(has_groups=tl.constexpr(True), groups_at=w.groups.data_ptr() - slot)
    return found


def vector_at(v: torch.Tensor | None, slot: int) -> Vector:
    """Of a bias in the slot at address `slot`."""
    if v is None:
        return NO_VECTOR
    return Vector(
        v.data_ptr() - slot, v.stride(0), tl.constexpr(TYPES[v.dtype]), tl.constexpr(True)
    )


def tensors_of(w: Weight) -> list[torch.Tensor]:
    """What it is stored in."""
    if isinstance(w, torch.Tensor):
        return [w]
    if isinstance(w, PackedStack):
        return [x for matrix in w.matrices for x in tensors_of(matrix)]
    return [x for x in (w.codes, w.scales, w.zeros, w.groups) if x is not None]


def memory_of(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes (uint8) that hold them all, of one storage, from a multiple of SLOT_BYTES in it."""
    storage = parts[0].untyped_storage()
    start = storage.data_ptr()
    is_one = all(x.untyped_storage().data_ptr() == start for x in parts)
    assert is_one, "tensors of one launch: in two allocations"
    whole = torch.empty(0, dtype=torch.uint8, device=parts[0].device).set_(storage)
    return whole[(min(x.data_ptr() for x in parts) - start) // SLOT_BYTES * SLOT_BYTES :]


def block_columns(w: Matrix, wanted: int) -> int:
    """Columns of a tile whose sum has one scale for each row: `wanted` at most."""
    return min(wanted, int(w.columns.value)) if w.scaling.value == "sums" else wanted


def _matrix(at: int, sn: int, sk: int, dtype: torch.dtype) -> Matrix:
    """Of plain numbers."""
    names = dict(code="plain", packing="rows", scaling="none", zero="none")
    numbers = dict(
        is_power=False, rows=1, columns=0, zero_add=0, has_groups=False, is_transposed=False
    )
    words = {name: tl.constexpr(value) for name, value in {**names, **numbers}.items()}
    return Matrix(at, sn, sk, tl.constexpr(TYPES[dtype]), **words)


def _bytes_or_words(codes: torch.Tensor) -> torch.dtype:
    return torch.int32 if codes.dtype == torch.int32 else torch.uint8


def _scaling(form: WeightFormat, *, is_power: bool, compute: torch.dtype) -> str:
    columns = form.columns
    if form.has_groups:
        return "gathered"
    if not columns:
        return "end"
    is_regular = columns & (columns - 1) == 0 and columns >= MIN_BLOCK
    if not is_regular:
        return "gathered"
    # a power of two times a code is exact in all that has the range of fp32
    return "spread" if is_power and columns < MAX_BLOCK and compute != torch.float16 else "sums"

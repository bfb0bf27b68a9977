"""Tensors and packed matrices as the C structure `wl_matrix`. Pointers only: whoever keeps a
structure keeps the tensors of the weight it was made of."""

import torch

from windlass.kernels.cpu import library as lib
from windlass.kernels.dequantise import dequantise
from windlass.tensors import Packed, PackedStack, Weight

# Numbers as the library calls them; uint8 are codes of int8.
TYPES = {torch.float32: lib.CODES["f32"], torch.bfloat16: lib.CODES["bf16"],
         torch.float16: lib.CODES["f16"], torch.uint8: lib.CODES["int8"]}  # fmt: skip
_SCALES = {torch.float32: lib.SCALES["f32"], torch.bfloat16: lib.SCALES["bf16"],
           torch.float16: lib.SCALES["f16"], torch.uint8: lib.SCALES["e8m0"]}  # fmt: skip
_WHOLE = 1 << 40  # a block that no matrix exceeds
_WORD_CODES = {"e4m3": 4, "int8": 4, "int4": 8, "e2m1": 8}  # codes that are unpacked together


def matrices_of(w: Weight) -> list[lib.Matrix]:
    """`w` (E, D), or (g, n, D) with E = g n: one matrix, or one for each g where strides differ."""
    if isinstance(w, Packed):
        return [_packed(w)]
    if isinstance(w, PackedStack):
        return [_packed(one) for one in w.matrices]
    if w.dim() == 2:
        return [_dense(w)]
    if w.stride(0) != w.shape[1] * w.stride(1) and w.shape[0] > 1:
        return [_dense(one) for one in w]
    merged = (w.shape[0] * w.shape[1], w.shape[2])
    return [_dense(w.as_strided(merged, w.stride()[1:], w.storage_offset()))]


def heads_of(w: torch.Tensor | PackedStack) -> list[lib.Matrix]:
    """One matrix for each head of (H, b, a)."""
    if isinstance(w, PackedStack):
        return [_packed(one) for one in w.matrices]
    return [_dense(one) for one in w]


def floats(x: torch.Tensor) -> torch.Tensor:
    """Contiguous fp32."""
    return x.float().contiguous()


def elements_together(x: torch.Tensor) -> torch.Tensor:
    """Rows whose elements lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _dense(w_ED: torch.Tensor) -> lib.Matrix:
    item = w_ED.itemsize
    (n, k), (stride_n, stride_k) = w_ED.shape, w_ED.stride()
    return lib.Matrix(
        code=TYPES[w_ED.dtype], n=n, k=k, codes=w_ED.data_ptr(),
        stride_n=stride_n * item, stride_k=item if k == 1 else stride_k * item,
        block_n=1, block_k=_WHOLE,
    )  # fmt: skip


def _packed(w: Packed) -> lib.Matrix:
    if not _is_native(w):
        wide = dequantise(w, 0, w.shape[0])
        matrix = _dense(wide)
        matrix.copy = wide
        return matrix
    form, (n, k) = w.format, w.shape
    is_wide_gptq = form.packing == "gptq" and form.code == "int8"
    matrix = lib.Matrix(
        code=lib.CODES[form.code], packing=lib.PACKINGS["gptq8" if is_wide_gptq else form.packing],
        scale_type=_SCALES[w.scales.dtype], zero_type=lib.ZEROS[form.zero], n=n, k=k,
        codes=w.codes.data_ptr(), scales=w.scales.data_ptr(),
        scale_stride_n=_step(w.scales, 0), scale_stride_k=_step(w.scales, 1),
        block_n=form.rows or _WHOLE, block_k=form.columns or _WHOLE, zero_add=form.zero_add,
    )  # fmt: skip
    if form.packing == "rows":
        matrix.stride_n, matrix.stride_k = w.codes.stride(0), w.codes.stride(1)
    else:
        matrix.stride_k = 4 * w.codes.stride(0)
    if w.zeros is not None:
        matrix.zeros, matrix.zero_stride = w.zeros.data_ptr(), w.zeros.stride(0)
    if w.groups is not None:
        matrix.groups = w.groups.data_ptr()
    if w.is_transposed:
        matrix.stride_n, matrix.stride_k = matrix.stride_k, matrix.stride_n
        matrix.scale_stride_n, matrix.scale_stride_k = matrix.scale_stride_k, matrix.scale_stride_n
        matrix.block_n, matrix.block_k = matrix.block_k, matrix.block_n
    return matrix


def _is_native(w: Packed) -> bool:
    """Whether the library can read `w` in place; else it is widened for the call."""
    form = w.format
    if w.is_transposed:  # bytes of a column; groups and zeros of columns are not read across
        return form.packing == "rows" and form.code in ("e4m3", "int8") and w.zeros is None
    is_whole_words = form.columns % _WORD_CODES[form.code] == 0 or w.groups is not None
    tensors = [w.codes, *(t for t in (w.zeros, w.groups) if t is not None)]
    return is_whole_words and all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in tensors)


def _step(scales: torch.Tensor, dim: int) -> int:
    return scales.stride(dim) if scales.shape[dim] > 1 else 0

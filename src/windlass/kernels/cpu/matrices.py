"""Tensors and packed matrices as the C structure `wl_matrix`. Pointers only: the caller keeps the
tensors alive."""

import torch

from windlass.kernels.base import Matrix as StoredMatrix
from windlass.kernels.cpu import library as lib
from windlass.packed import Packed

_CODES = {torch.float32: lib.CODES["f32"], torch.bfloat16: lib.CODES["bf16"],
          torch.float16: lib.CODES["f16"]}  # fmt: skip
_SCALES = {torch.float32: lib.SCALES["f32"], torch.bfloat16: lib.SCALES["bf16"],
           torch.float16: lib.SCALES["f16"], torch.uint8: lib.SCALES["e8m0"]}  # fmt: skip
_WHOLE = 1 << 40  # block size that no matrix exceeds


def matrices_of(w: StoredMatrix) -> list[lib.Matrix]:
    """`w` (E, D), or (g, n, D) with E = g n: one matrix, or one for each g where strides differ."""
    if isinstance(w, Packed):
        return [_packed(w)]
    if w.dim() == 3:
        if w.shape[0] > 1 and w.stride(0) != w.shape[1] * w.stride(1):
            return [dense(one) for one in w]
        w = w.flatten(0, 1) if w.is_contiguous() else w.as_strided(
            (w.shape[0] * w.shape[1], w.shape[2]), w.stride()[1:], w.storage_offset()
        )  # fmt: skip
    return [dense(w)]


def dense(w_ED: torch.Tensor) -> lib.Matrix:
    """A floating matrix with any strides."""
    item = w_ED.itemsize
    (n, k), (stride_n, stride_k) = w_ED.shape, w_ED.stride()
    return lib.Matrix(
        code=_CODES[w_ED.dtype], n=n, k=k, codes=w_ED.data_ptr(),
        stride_n=stride_n * item, stride_k=item if k == 1 else stride_k * item,
        block_n=1, block_k=_WHOLE,
    )  # fmt: skip


def _packed(w: Packed) -> lib.Matrix:
    raise NotImplementedError


def floats(x: torch.Tensor) -> torch.Tensor:
    """Contiguous fp32."""
    return x.float().contiguous()

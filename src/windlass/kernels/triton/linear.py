"""Products of rows with stored matrices, plain or packed, whose sums are taken in one order of k.

A library's product has other bits with other numbers of rows; here a row's are its own, whether it
comes alone or among thousands, in tiles of 16 or 32 rows. The kernel for few rows uses no dot:
other sums, so a mode of its own, chosen by the plan. Shape legend: kernels/interface.py; G matrices
that lie alike, one for each head or group of features.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from windlass.kernels.triton import unpack
from windlass.kernels.triton.launch import Tile
from windlass.kernels.triton.matrix import Matrix, block_columns, matrix_at, memory_of, tensors_of
from windlass.tensors import Packed, PackedStack, Weight

FEW = Tile(features=8, columns=512)  # of the kernel without a dot


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """G matrices (N, K), each `step` bytes behind the one before."""

    memory: torch.Tensor  # uint8
    matrix: Matrix  # the first, in `memory`
    num: int
    step: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, w: Weight, compute: torch.dtype) -> "Linear":
        """Of (N, K) or plain (G, N, K), for rows in the type `compute`."""
        assert not isinstance(w, PackedStack), "a stack of packed matrices: one at a time"
        first: torch.Tensor | Packed
        if isinstance(w, Packed):
            num, step, first = 1, 0, w
        else:
            w = w if w.dim() == 3 else w[None]
            first = w[0]
            num, step = len(w), w.stride(0) * w.itemsize
        memory = memory_of(tensors_of(w))
        matrix = matrix_at(first, memory.data_ptr(), compute)
        shape = first.shape[0], first.shape[1]
        return cls(memory=memory, matrix=matrix, num=num, step=step, shape=shape)

    def on(self, memory: torch.Tensor) -> "Linear":
        """The same in a copy of its memory, at an address as even."""
        return replace(self, memory=memory)


@triton.jit
def linear_tiles(
    x, memory, w, step, bias, out, T, N, K, x_row, x_matrix, out_row, out_matrix,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out (T, G, N), fp32 = x (T, K) or (T, G, K) . w.T + bias (G, N)."""
    g = tl.program_id(2).to(tl.int64)
    base = memory + g * step
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    is_alive = row < T
    n0 = tl.program_id(1) * BN
    TYPE: tl.constexpr = x.dtype.element_ty
    x_rows = x + g * x_matrix + row[:, None] * x_row
    y = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        ok = is_alive[:, None]
        if not EVEN:
            ok = ok & (k < K)[None, :]
        a = tl.load(x_rows + k[None, :], mask=ok, other=0.0)
        y = unpack.add_dot(y, a, base, w, n0, k0, N, K, TYPE, BN, BK, EVEN)
    y = y * unpack.row_scales(base, w, n0, N, BN)[None, :]
    n = n0 + tl.arange(0, BN)
    if bias is not None:
        y += tl.load(bias + g * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = out + g * out_matrix + row[:, None] * out_row + n[None, :]
    tl.store(at, y, mask=is_alive[:, None] & (n < N)[None, :])


@triton.jit
def linear_few(
    x, memory, w, step, bias, out, N, K, x_row, x_matrix, out_row, out_matrix,
    BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The same, of one row per program."""
    g = tl.program_id(2).to(tl.int64)
    base = memory + g * step
    t = tl.program_id(1).to(tl.int64)
    n0 = tl.program_id(0) * BN
    x_rows = x + g * x_matrix + t * x_row
    y = tl.zeros((BN,), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        if EVEN:
            a = tl.load(x_rows + k).to(tl.float32)
        else:
            a = tl.load(x_rows + k, mask=k < K, other=0.0).to(tl.float32)
        y = unpack.add_product(y, a, base, w, n0, k0, N, K, BN, BK, EVEN)
    y = y * unpack.row_scales(base, w, n0, N, BN)
    n = n0 + tl.arange(0, BN)
    if bias is not None:
        y += tl.load(bias + g * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + g * out_matrix + t * out_row + n, y, mask=n < N)


def run_linear(
    x: torch.Tensor,
    w: Linear,
    bias: torch.Tensor | None,
    tile: Tile,
    *,
    few: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (T, K), or for each matrix its own (T, G, K), times the matrices -> (T, G, N) fp32, in
    `out` where it is given. `bias`: (G * N,), contiguous. `few`: as the plan has it."""
    features, width = w.shape
    if out is None:
        out = torch.empty(len(x), w.num, features, dtype=torch.float32, device=x.device)
    strides = (x.stride(0), x.stride(1) if x.dim() == 3 else 0, out.stride(0), out.stride(1))
    assert x.stride(-1) == 1 and out.stride(2) == 1, "rows of a product: columns lie apart"
    columns = tile.columns if few else block_columns(w.matrix, tile.columns)
    blocks = dict(BN=tile.features, BK=columns, EVEN=width % columns == 0)
    options = dict(num_warps=tile.warps, num_stages=tile.stages)
    across = triton.cdiv(features, tile.features)
    if few:
        linear_few[across, len(x), w.num](
            x, w.memory, w.matrix, w.step, bias, out, features, width, *strides, **blocks, **options
        )
    else:
        linear_tiles[triton.cdiv(len(x), tile.rows), across, w.num](
            x, w.memory, w.matrix, w.step, bias, out, len(x), features, width, *strides,
            BM=tile.rows, **blocks, **options,
        )  # fmt: skip
    return out

"""The native kernels behind the `Kernels` protocol: tensors to pointers, nothing else.

Sums of a row run in an order that depends on nothing but the inner width (native/src/gemm.h), so
there is no row ladder. Shape legend: kernels/base.py.
"""

import ctypes as c
from collections.abc import Sequence

import torch

from windlass.device.host import empty
from windlass.kernels.base import (
    AttentionOptions,
    AttentionWork,
    ExpertRows,
    Tensors,
)
from windlass.kernels.cpu import library as lib
from windlass.kernels.cpu.matrices import floats, heads_of, matrices_of
from windlass.kernels.reference import TorchKernels
from windlass.packed import PackedStack, PagedRows, StoredTensors, Weight, plain_or_none
from windlass.spec.model import Activation, ClampedSwiGlu, Norm, RmsNorm, Rope

_TILE_ITEMS = 64  # rows times heads of a group that attention takes together (MQ in attention.h)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 5}
_FFN = ("gate", "up", "down")


class NativeKernels(TorchKernels):
    """Implements `Kernels` with the native library; what that lacks, torch computes. Called from
    one thread; the library's own pool of `threads` takes part. `bf16_rows`: products round their
    rows to bf16, as models that compute in bf16 do; sums are fp32 all the same."""

    def __init__(self, library: c.CDLL, *, threads: int, bf16_rows: bool = False) -> None:
        super().__init__(bf16_rows=bf16_rows)
        self._lib = library
        self._precision = int(bf16_rows)
        # of the last call: the layers of a pass share their work
        self._tiles: tuple[AttentionWork | None, int, c.Array[lib.Tile] | None, object] = (
            None, 0, None, None,
        )  # fmt: skip
        lib.check(library.wl_set_threads(threads), "threads")

    @property
    def name(self) -> str:
        return "cpu"

    def linear(
        self, x_TD: torch.Tensor, w: Weight, bias_E: torch.Tensor | None = None
    ) -> torch.Tensor:
        x_TD = _rows(x_TD)
        parts = matrices_of(w)
        out_TE = empty(len(x_TD), sum(m.n for m in parts))
        bias = None if bias_E is None else floats(bias_E)
        products = (lib.Product * len(parts))()
        column = 0
        for product, m in zip(products, parts, strict=True):
            product.x, product.ldx = x_TD.data_ptr(), x_TD.stride(0)
            product.w = c.pointer(m)
            product.bias = None if bias is None else bias.data_ptr() + 4 * column
            product.out, product.ldo = out_TE.data_ptr() + 4 * column, out_TE.stride(0)
            column += m.n
        lib.check(self._lib.wl_products(products, len(parts), len(x_TD), self._precision), "linear")
        return out_TE

    def batched_linear(
        self, x_THa: torch.Tensor, w_Hba: torch.Tensor | PackedStack
    ) -> torch.Tensor:
        num_rows, heads, _ = x_THa.shape
        if x_THa.stride(2) != 1:
            x_THa = x_THa.contiguous()
        matrices = heads_of(w_Hba)
        out_THb = empty(num_rows, heads, matrices[0].n)
        products = (lib.Product * heads)()
        for head, (product, m) in enumerate(zip(products, matrices, strict=True)):
            product.x = x_THa.data_ptr() + 4 * head * x_THa.stride(1)
            product.ldx = x_THa.stride(0)
            product.w = c.pointer(m)
            product.out = out_THb.data_ptr() + 4 * head * m.n
            product.ldo = heads * m.n
        # always exact: the matrices may be recurrent states
        lib.check(self._lib.wl_products(products, heads, num_rows, 0), "batched_linear")
        return out_THb

    def expert_ffn(self, x_ND: torch.Tensor, w: Tensors, activation: Activation) -> torch.Tensor:
        x_ND = _rows(x_ND)
        network = _network(w)
        out_ND = empty(len(x_ND), network.struct.down.contents.n)
        one = lib.Expert.from_buffer_copy(network.struct)
        one.num_rows = len(x_ND)
        self._run_experts(x_ND, (lib.Expert * 1)(one), activation, out_ND)
        return out_ND

    def experts(
        self,
        x_TD: torch.Tensor,
        work: Sequence[ExpertRows],
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        x_TD = _rows(x_TD)
        experts = (lib.Expert * len(work))()
        kept = []  # what the structures point to
        for i, (w, rows, places) in enumerate(work):
            network = _network(w)
            kept.append(network)
            experts[i] = network.struct
            experts[i].rows, experts[i].places = rows.data_ptr(), places.data_ptr()
            experts[i].num_rows = len(rows)
        self._run_experts(x_TD, experts, activation, out)

    def _run_experts(
        self,
        x: torch.Tensor,
        experts: "c.Array[lib.Expert]",
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        kind, alpha, limit = 0, 0.0, 0.0
        if isinstance(activation, ClampedSwiGlu):
            kind, alpha, limit = 1, activation.alpha, activation.limit
        code = self._lib.wl_experts(
            x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), experts, len(experts),
            kind, alpha, limit, self._precision,
        )  # fmt: skip
        lib.check(code, "experts")

    def attention(
        self,
        q_THd: torch.Tensor,
        keys: PagedRows,
        values: PagedRows,
        work: AttentionWork,
        options: AttentionOptions,
    ) -> torch.Tensor:
        q_THd = q_THd.contiguous()
        num_rows, num_heads, key_dim = q_THd.shape
        out_THv = empty(num_rows, num_heads, options.value_dim)
        kv_heads, page_tokens = keys.rows_PKBd.shape[1:3]
        tiles = self._tiles_of(work, max(1, _TILE_ITEMS // (num_heads // kv_heads)))
        sinks = None if options.sinks_H is None else floats(options.sinks_H)
        attention = lib.Attention(
            q=q_THd.data_ptr(), out=out_THv.data_ptr(),
            num_heads=num_heads, num_kv_heads=kv_heads,
            key_dim=key_dim, value_dim=options.value_dim,
            scale=options.scale, window=options.window or 0,
            sinks=None if sinks is None else sinks.data_ptr(), page_tokens=page_tokens,
            keys=_cache(keys), values=_cache(values),
            tiles=c.addressof(tiles), num_tiles=len(tiles),
        )  # fmt: skip
        lib.check(self._lib.wl_attend(c.byref(attention)), "attention")
        return out_THv

    def _tiles_of(self, work: AttentionWork, most: int) -> "c.Array[lib.Tile]":
        last, last_most, tiles, _ = self._tiles
        if last is not work or last_most != most or tiles is None:
            tiles, kept = _tiles(work, most)
            self._tiles = (work, most, tiles, kept)
        return tiles

    def normalise(
        self, norm: Norm, weight_D: torch.Tensor, bias_D: torch.Tensor | None, x: torch.Tensor
    ) -> torch.Tensor:
        if not isinstance(norm, RmsNorm):
            return super().normalise(norm, weight_D, bias_D, x)
        width = x.shape[-1]
        rows = _rows(x.reshape(-1, width))
        y = empty(*x.shape)
        weight_D = weight_D.contiguous()
        code = self._lib.wl_rms_norm(
            rows.data_ptr(), rows.stride(0), y.data_ptr(), width, len(rows), width,
            weight_D.data_ptr(), _TYPES[weight_D.dtype], float(norm.plus_one), norm.eps,
        )  # fmt: skip
        lib.check(code, "normalise")
        return y

    def rotate(
        self, x_THd: torch.Tensor, cos_Tf: torch.Tensor, sin_Tf: torch.Tensor, rope: Rope
    ) -> torch.Tensor:
        y_THd = empty(*x_THd.shape).copy_(x_THd)
        assert cos_Tf.stride() == sin_Tf.stride() and cos_Tf.stride(1) == 1
        code = self._lib.wl_rotate(
            y_THd.data_ptr(), y_THd.stride(0), y_THd.stride(1), *y_THd.shape[:2], rope.dim // 2,
            cos_Tf.data_ptr(), sin_Tf.data_ptr(), cos_Tf.stride(0), rope.interleaved,
        )  # fmt: skip
        lib.check(code, "rotate")
        return y_THd

    def accumulate(self, hidden_TD: torch.Tensor, y_TD: torch.Tensor, multiplier: float) -> None:
        ones_T1 = torch.ones(len(y_TD), 1)
        self.combine(ones_T1, y_TD.contiguous()[:, None], None, hidden_TD, multiplier)

    def combine(
        self,
        weights_TA: torch.Tensor,
        outputs_TAD: torch.Tensor,
        shared_TD: torch.Tensor | None,
        hidden_TD: torch.Tensor,
        multiplier: float,
    ) -> None:
        assert outputs_TAD.is_contiguous() and hidden_TD.is_contiguous()
        weights_TA = weights_TA.contiguous()
        shared_TD = None if shared_TD is None else shared_TD.contiguous()
        code = self._lib.wl_combine(
            outputs_TAD.data_ptr(), weights_TA.data_ptr(),
            None if shared_TD is None else shared_TD.data_ptr(),
            hidden_TD.data_ptr(), hidden_TD.data_ptr(), *outputs_TAD.shape, multiplier,
        )  # fmt: skip
        lib.check(code, "combine")


class _Network:
    """The matrices of one expert or dense network as a structure, and what it points to."""

    __slots__ = ("struct", "_kept")

    def __init__(self, w: Tensors) -> None:
        matrices = [_single(w[name]) for name in _FFN]
        stored = [plain_or_none(w, f"{name}_bias") for name in _FFN]
        biases = [None if b is None else floats(b) for b in stored]
        self._kept = (matrices, biases)
        self.struct = lib.Expert(
            *(c.pointer(m) for m in matrices),
            *(None if b is None else b.data_ptr() for b in biases),
        )


def _single(w: Weight) -> lib.Matrix:
    (matrix,) = matrices_of(w)
    return matrix


def _network(w: Tensors) -> _Network:
    """Made once for as long as the tensors stay in their slot."""
    if not isinstance(w, StoredTensors):
        return _Network(w)
    network = w.prepared.get("network")
    if network is None:
        network = w.prepared["network"] = _Network(w)
    assert isinstance(network, _Network)
    return network


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Rows whose elements lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _cache(store: PagedRows) -> lib.Cache:
    rows, scales = store.rows_PKBd, store.scales_PKB
    page, head, token, one = rows.stride()
    assert one == 1, "rows of keys and values lie side by side"
    assert scales is None or scales.is_contiguous(), "a scale for each row, in their order"
    item = rows.itemsize
    return lib.Cache(
        data=rows.data_ptr(), page_stride=page * item, head_stride=head * item,
        token_stride=token * item, width=token, type=_TYPES[rows.dtype],
        scales=None if scales is None else scales.data_ptr(),
    )  # fmt: skip


def _tiles(work: AttentionWork, most: int) -> tuple["c.Array[lib.Tile]", list[torch.Tensor]]:
    """All rows in tiles of at most `most`, longest contexts first, and the page lists they use."""
    found = []
    kept = []
    for i, num_rows in enumerate(work.num_rows):
        pages = torch.tensor(work.pages[i], dtype=torch.int64)
        kept.append(pages)
        for offset in range(0, num_rows, most):
            rows = min(most, num_rows - offset)
            position = work.first_position[i] + offset
            found.append((-position, work.first_row[i] + offset, rows, position, pages.data_ptr()))
    found.sort()
    tiles = (lib.Tile * len(found))(*(lib.Tile(*one[1:]) for one in found))
    return tiles, kept

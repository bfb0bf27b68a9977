"""The native kernels behind the `Kernels` protocol: tensors to pointers, nothing else.

Sums of a row run in an order that depends on nothing but the inner width (native/src/gemm.h), so
there is no row ladder. Shape legend: kernels/base.py.
"""

import ctypes as c
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch

from windlass.device.recycle import Recycler
from windlass.kernels.base import (
    AttentionOptions,
    AttentionWork,
    ExpertRows,
    Groups,
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
        self._memory = Recycler()
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
        return self._products(x_TD, _Linears([(w, bias_E)]))[0]

    def linears(self, x_TD: torch.Tensor, w: Tensors, names: Sequence[str]) -> list[torch.Tensor]:
        def make() -> _Linears:
            return _Linears(
                [(w[f"{name}.weight"], plain_or_none(w, f"{name}.bias")) for name in names]
            )

        return self._products(x_TD, _prepared(w, names, make))

    def _products(self, x_TD: torch.Tensor, linears: "_Linears") -> list[torch.Tensor]:
        x_TD = _rows(x_TD)
        num_rows = x_TD.shape[0]
        outs = [self._memory.empty(num_rows, width) for width in linears.widths]
        products = (lib.Product * len(linears.products)).from_buffer_copy(linears.products)
        x, ldx = x_TD.data_ptr(), x_TD.stride(0)
        pointers = [out.data_ptr() for out in outs]
        for product, (index, column) in zip(products, linears.places, strict=True):
            product.x, product.ldx = x, ldx
            product.out = pointers[index] + 4 * column
        code = self._lib.wl_products(products, len(products), num_rows, self._precision)
        lib.check(code, "linear")
        return outs

    def batched_linear(
        self, x_THa: torch.Tensor, w_Hba: torch.Tensor | PackedStack
    ) -> torch.Tensor:
        num_rows, heads, _ = x_THa.shape
        if x_THa.stride(2) != 1:
            x_THa = x_THa.contiguous()
        matrices = heads_of(w_Hba)
        out_THb = self._memory.empty(num_rows, heads, matrices[0].n)
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
        out_ND = self._memory.empty(len(x_ND), network.struct.down.contents.n)
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
            experts[i].num_rows = rows.shape[0]
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
        out_THv = self._memory.empty(num_rows, num_heads, options.value_dim)
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
        y = self._memory.empty(*x.shape)
        weight_D = weight_D.contiguous()
        code = self._lib.wl_rms_norm(
            rows.data_ptr(), rows.stride(0), y.data_ptr(), width, rows.shape[0], width,
            weight_D.data_ptr(), _TYPES[weight_D.dtype], float(norm.plus_one), norm.eps,
        )  # fmt: skip
        lib.check(code, "normalise")
        return y

    def rotate(
        self, x_THd: torch.Tensor, cos_Tf: torch.Tensor, sin_Tf: torch.Tensor, rope: Rope
    ) -> None:
        row, head, one = x_THd.stride()
        table, unit = cos_Tf.stride()
        assert cos_Tf.stride() == sin_Tf.stride() and unit == one == 1, "elements lie side by side"
        code = self._lib.wl_rotate(
            x_THd.data_ptr(), row, head, *x_THd.shape[:2], rope.dim // 2,
            cos_Tf.data_ptr(), sin_Tf.data_ptr(), table, rope.interleaved,
        )  # fmt: skip
        lib.check(code, "rotate")

    def write_rows(
        self, store: PagedRows, pages_T: torch.Tensor, offsets_T: torch.Tensor, x_TKd: torch.Tensor
    ) -> None:
        if store.scales_PKB is not None:
            super().write_rows(store, pages_T, offsets_T, x_TKd)
            return
        x_TKd = _rows(x_TKd)
        row, head, _ = x_TKd.stride()
        code = self._lib.wl_write_rows(
            x_TKd.data_ptr(), row, head, *x_TKd.shape, c.byref(_cache(store)),
            pages_T.data_ptr(), offsets_T.data_ptr(),
        )  # fmt: skip
        lib.check(code, "write_rows")

    def group(self, ids_TA: torch.Tensor, num_experts: int) -> Groups:
        ids_TA = ids_TA.contiguous()
        num, per_row = ids_TA.numel(), ids_TA.shape[1]
        order, rows = torch.empty(2, num, dtype=torch.int64)
        counts = (c.c_int64 * num_experts)()
        code = self._lib.wl_group(
            ids_TA.data_ptr(), num, per_row, num_experts, order.data_ptr(), rows.data_ptr(), counts
        )
        lib.check(code, "group")
        return Groups(order, rows, list(counts))

    def accumulate(self, hidden_TD: torch.Tensor, y_TD: torch.Tensor, multiplier: float) -> None:
        y_TD = y_TD.contiguous()
        hidden = hidden_TD.data_ptr()
        code = self._lib.wl_combine(
            None, None, y_TD.data_ptr(), hidden, hidden, y_TD.shape[0], 0, y_TD.shape[1], multiplier
        )
        lib.check(code, "accumulate")

    def read(self, x: torch.Tensor) -> None:
        code = self._lib.wl_read(x.data_ptr(), x.numel() * x.itemsize, c.byref(c.c_float()))
        lib.check(code, "read")

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


class _Linears:
    """Matrices that meet the same rows, as structures, and what those point to."""

    __slots__ = ("products", "places", "widths", "has_copies", "_kept")

    def __init__(self, parts: Sequence[tuple[Weight, torch.Tensor | None]]) -> None:
        self.widths: list[int] = []  # of each result
        self.places: list[tuple[int, int]] = []  # of each product: its result, first column
        self.has_copies = False  # beside the stored weights
        self._kept: list[object] = []
        products = []
        for index, (w, bias_E) in enumerate(parts):
            bias = None if bias_E is None else floats(bias_E)
            matrices = matrices_of(w)
            width = sum(m.n for m in matrices)
            column = 0
            for m in matrices:
                start = None if bias is None else bias.data_ptr() + 4 * column
                products.append(lib.Product(w=c.pointer(m), bias=start, ldo=width))
                self.places.append((index, column))
                self.has_copies |= m.copy is not None
                column += m.n
            self.widths.append(width)
            self._kept.append((matrices, bias))
        self.products = (lib.Product * len(products))(*products)


class _Network:
    """The matrices of one expert or dense network as a structure, and what it points to."""

    __slots__ = ("struct", "has_copies", "_kept")

    def __init__(self, w: Tensors) -> None:
        matrices = [_single(w[name]) for name in _FFN]
        stored = [plain_or_none(w, f"{name}_bias") for name in _FFN]
        biases = [None if b is None else floats(b) for b in stored]
        self._kept = (matrices, biases)
        self.has_copies = any(m.copy is not None for m in matrices)
        self.struct = lib.Expert(
            *(c.pointer(m) for m in matrices),
            *(None if b is None else b.data_ptr() for b in biases),
        )


def _single(w: Weight) -> lib.Matrix:
    (matrix,) = matrices_of(w)
    return matrix


def _network(w: Tensors) -> _Network:
    return _prepared(w, "network", lambda: _Network(w))


_Made = TypeVar("_Made", _Linears, _Network)


def _prepared(w: Tensors, key: object, make: Callable[[], _Made]) -> _Made:
    """What is derived from a part: kept for as long as its tensors stay in their slot, unless it
    has copies of them, which no slot is planned for."""
    if not isinstance(w, StoredTensors):
        return make()
    found = cast("_Made | None", w.prepared.get(key))
    if found is None:
        found = make()
        if not found.has_copies:
            w.prepared[key] = found
    return found


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

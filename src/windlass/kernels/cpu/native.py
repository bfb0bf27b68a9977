"""The native kernels behind the `Kernels` protocol: tensors to pointers, nothing else.

Sums of a row run in an order that depends on nothing but the inner width (native/src/gemm.h), so
there is no row ladder. Shape legend: kernels/interface.py.
"""

import ctypes as c
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from windlass.device.recycle import Recycler
from windlass.kernels.cpu import library as lib
from windlass.kernels.cpu.capture_calls import CapturedCalls, NativeCapture, Scratch
from windlass.kernels.cpu.matrices import floats, heads_of
from windlass.kernels.cpu.prepared import Linears, network_of, prepared, routing_of
from windlass.kernels.cpu.tiles import Tiles
from windlass.kernels.interface import AttentionOptions, AttentionWork, ExpertGroups
from windlass.kernels.reference import TorchKernels
from windlass.models.spec import (
    Activation,
    ClampedSwiGlu,
    Norm,
    RmsNorm,
    Rope,
    Routing,
    SparseMixer,
)
from windlass.tensors import PackedStack, PagedRows, Tensors, Weight, plain_or_none

_TILE_ITEMS = 64  # rows times heads of a group that attention takes together (MQ in attention.h)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 5}


class NativeKernels(TorchKernels):
    """Implements `Kernels` with the native library; what that lacks, torch computes. Called from
    one thread; the library's own pool of `threads` takes part. `bf16_activations`: products round
    their rows to bf16, as models that compute in bf16 do; sums are fp32 all the same."""

    def __init__(self, library: c.CDLL, *, threads: int, bf16_activations: bool = False) -> None:
        super().__init__(bf16_activations=bf16_activations)
        self._lib = library
        self._memory: Recycler | Scratch = Recycler()
        self._precision = int(bf16_activations)
        self._tiles = Tiles()
        self._captured: CapturedCalls | None = None  # where calls are noted
        self._results = Scratch()  # of all captures: one layer runs at a time
        lib.check(library.wl_set_threads(threads), "threads")

    @property
    def name(self) -> str:
        return "cpu"

    def capture(self, label: Callable[[], str]) -> NativeCapture:
        return NativeCapture(self._lib, self._recording, self._results, label)

    @contextmanager
    def _recording(self, captured: CapturedCalls, tiles: Tiles) -> Iterator[None]:
        usual = self._memory, self._tiles
        self._captured, self._memory, self._tiles = captured, self._results, tiles
        try:
            yield
        finally:
            self._captured, (self._memory, self._tiles) = None, usual

    def _call(self, name: str, *arguments: Any, keep: object = None) -> None:
        """`keep`: what structures among the arguments point to, where nothing else keeps it."""
        if self._captured is not None:
            self._captured.add(name, arguments, keep)
        lib.check(getattr(self._lib, name)(*arguments), name)

    def linear(
        self,
        x_TD: torch.Tensor,
        w: Weight,
        bias_E: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        linears = Linears([(w, bias_E)])
        if out is None:
            return self._products(x_TD, linears)[0]
        assert out.stride(1) == 1, "elements of a row lie side by side"
        self._multiply(x_TD, linears, [out])
        return out

    def linears(self, x_TD: torch.Tensor, w: Tensors, names: Sequence[str]) -> list[torch.Tensor]:
        def make() -> Linears:
            return Linears(
                [(w[f"{name}.weight"], plain_or_none(w, f"{name}.bias")) for name in names]
            )

        return self._products(x_TD, prepared(w, names, make))

    def _products(self, x_TD: torch.Tensor, linears: Linears) -> list[torch.Tensor]:
        outs = [self._memory.empty(x_TD.shape[0], width) for width in linears.widths]
        self._multiply(x_TD, linears, outs)
        return outs

    def _multiply(self, x_TD: torch.Tensor, linears: Linears, outs: Sequence[torch.Tensor]) -> None:
        x_TD = _rows(x_TD)
        products = (lib.Product * len(linears.products)).from_buffer_copy(linears.products)
        x, ldx = x_TD.data_ptr(), x_TD.stride(0)
        places = [(out.data_ptr(), out.stride(0)) for out in outs]
        for product, (index, column) in zip(products, linears.places, strict=True):
            start, ldo = places[index]
            product.x, product.ldx = x, ldx
            product.out, product.ldo = start + 4 * column, ldo
        num_rows = x_TD.shape[0]
        self._call("wl_products", products, len(products), num_rows, self._precision, keep=linears)

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
        self._call("wl_products", products, heads, num_rows, 0, keep=matrices)
        return out_THb

    def expert_ffn(self, x_ND: torch.Tensor, w: Tensors, activation: Activation) -> torch.Tensor:
        x_ND = _rows(x_ND)
        network = network_of(w)
        out_ND = self._memory.empty(x_ND.shape[0], network.struct.down.contents.n)
        one = (lib.Expert * 1)(network.struct)
        one[0].num_rows = x_ND.shape[0]
        self._call(
            "wl_experts",
            x_ND.data_ptr(), x_ND.stride(0), out_ND.data_ptr(), out_ND.stride(0), one, 1,
            *_activation(activation), self._precision, keep=network,
        )  # fmt: skip
        return out_ND

    def experts(
        self,
        x_TD: torch.Tensor,
        experts: Mapping[int, Tensors],
        groups: ExpertGroups,
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        x_TD = _rows(x_TD)
        num_experts = groups.counts_E.shape[0]
        table = (c.c_void_p * num_experts)()
        networks = []
        for expert, w in experts.items():
            network = network_of(w)
            networks.append(network)
            table[expert] = network.address
        self._call(
            "wl_routed",
            x_TD.data_ptr(), x_TD.stride(0), out.data_ptr(), out.stride(0), table, num_experts,
            groups.counts_E.data_ptr(), groups.rows.data_ptr(), groups.order.data_ptr(),
            *_activation(activation), self._precision, keep=networks,
        )  # fmt: skip

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
        tiles = self._tiles.of(work, max(1, _TILE_ITEMS // (num_heads // kv_heads)))
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
        self._call("wl_attend", attention, keep=sinks)
        return out_THv

    def normalise(
        self, norm: Norm, weight_D: torch.Tensor, bias_D: torch.Tensor | None, x: torch.Tensor
    ) -> torch.Tensor:
        if not isinstance(norm, RmsNorm):
            return super().normalise(norm, weight_D, bias_D, x)
        width = x.shape[-1]
        rows = _rows(x.reshape(-1, width))
        y = self._memory.empty(*x.shape)
        weight_D = weight_D.contiguous()
        self._call(
            "wl_rms_norm",
            rows.data_ptr(), rows.stride(0), y.data_ptr(), width, rows.shape[0], width,
            weight_D.data_ptr(), _TYPES[weight_D.dtype], float(norm.plus_one), norm.eps,
        )  # fmt: skip
        return y

    def rotate(
        self, x_THd: torch.Tensor, cos_Tf: torch.Tensor, sin_Tf: torch.Tensor, rope: Rope
    ) -> None:
        row, head, one = x_THd.stride()
        table, unit = cos_Tf.stride()
        assert cos_Tf.stride() == sin_Tf.stride() and unit == one == 1, "elements lie side by side"
        self._call(
            "wl_rotate",
            x_THd.data_ptr(), row, head, *x_THd.shape[:2], rope.dim // 2,
            cos_Tf.data_ptr(), sin_Tf.data_ptr(), table, rope.interleaved,
        )  # fmt: skip

    def write_rows(
        self, store: PagedRows, pages_T: torch.Tensor, offsets_T: torch.Tensor, x_TKd: torch.Tensor
    ) -> None:
        x_TKd = _rows(x_TKd)
        row, head, _ = x_TKd.stride()
        self._call(
            "wl_write_rows",
            x_TKd.data_ptr(), row, head, *x_TKd.shape, _cache(store),
            pages_T.data_ptr(), offsets_T.data_ptr(), store.rows_PKBd.shape[2],
        )  # fmt: skip

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        num_rows, num_heads, _ = parts[0].shape
        widths = [part.shape[2] for part in parts]
        out = self._memory.empty(num_rows, num_heads, sum(widths))
        row, head, _ = out.stride()
        column = out.data_ptr()
        for part, width in zip(parts, widths, strict=True):
            part = _rows(part)
            self._call(
                "wl_copy_rows",
                part.data_ptr(), part.stride(0), part.stride(1), num_rows, num_heads, width,
                column, row, head,
            )  # fmt: skip
            column += 4 * width
        return out

    def gate(self, x: torch.Tensor, gate: torch.Tensor) -> None:
        assert x.is_contiguous(), "rows are gated in place"
        gate = gate.contiguous()
        num_rows, width = x.shape[0], x[0].numel()
        is_one = gate.numel() == num_rows and width > 1
        self._call("wl_gate", x.data_ptr(), num_rows, width, gate.data_ptr(), is_one)

    def route(
        self,
        routing: Routing,
        top_k: int,
        logits_TE: torch.Tensor,
        bias_E: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(routing, SparseMixer):
            return super().route(routing, top_k, logits_TE, bias_E)
        logits_TE = logits_TE.contiguous()
        num_rows, num_experts = logits_TE.shape
        weights_TA = torch.empty(num_rows, top_k)
        ids_TA = torch.empty(num_rows, top_k, dtype=torch.int64)
        structure = routing_of(routing, top_k, bias_E)
        self._call(
            "wl_route", logits_TE.data_ptr(), num_rows, num_experts, structure,
            weights_TA.data_ptr(), ids_TA.data_ptr(), keep=(weights_TA, ids_TA, bias_E),
        )  # fmt: skip
        return weights_TA, ids_TA

    def group(self, ids_TA: torch.Tensor, num_experts: int) -> ExpertGroups:
        ids_TA = ids_TA.contiguous()
        num, per_row = ids_TA.numel(), ids_TA.shape[1]
        order, rows = torch.empty(2, num, dtype=torch.int64)
        counts_E = torch.empty(num_experts, dtype=torch.int64)
        self._call(
            "wl_group", ids_TA.data_ptr(), num, per_row, num_experts,
            order.data_ptr(), rows.data_ptr(), counts_E.data_ptr(), keep=(order, rows, counts_E),
        )  # fmt: skip
        return ExpertGroups(order, rows, counts_E)

    def accumulate(self, hidden_TD: torch.Tensor, y_TD: torch.Tensor, multiplier: float) -> None:
        y_TD = y_TD.contiguous()
        hidden, (num_rows, width) = hidden_TD.data_ptr(), y_TD.shape
        self._call(
            "wl_combine",
            None, None, y_TD.data_ptr(), hidden, hidden, num_rows, 0, width, multiplier,
        )  # fmt: skip

    def read(self, x: torch.Tensor) -> None:
        self._call("wl_read", x.data_ptr(), x.numel() * x.itemsize, c.c_float())

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
        self._call(
            "wl_combine",
            outputs_TAD.data_ptr(), weights_TA.data_ptr(),
            None if shared_TD is None else shared_TD.data_ptr(),
            hidden_TD.data_ptr(), hidden_TD.data_ptr(), *outputs_TAD.shape, multiplier,
        )  # fmt: skip


def _activation(activation: Activation) -> tuple[int, float, float]:
    if isinstance(activation, ClampedSwiGlu):
        return 1, activation.alpha, activation.limit
    return 0, 0.0, 0.0


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

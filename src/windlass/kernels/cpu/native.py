"""The native kernels behind the `Kernels` protocol: tensors to pointers, nothing else.

Sums of a row run in an order that depends on nothing but the inner width (native/src/gemm.h), so
there is no row ladder. Shape legend: kernels/interface.py.
"""

import ctypes as c
from collections.abc import Callable, Mapping, Sequence

import torch

from windlass.kernels.cpu import native_attention as attention
from windlass.kernels.cpu import native_sums as sums
from windlass.kernels.cpu import products
from windlass.kernels.cpu.matrices import TYPES, elements_together
from windlass.kernels.cpu.native_capture import NativeCapture
from windlass.kernels.cpu.prepared import routing_of
from windlass.kernels.cpu.session import Session
from windlass.kernels.interface import AttentionOptions, AttentionWork, ExpertGroups, Routes
from windlass.kernels.reference import TorchKernels
from windlass.models.spec import Activation, Norm, RmsNorm, Rope, Routing, SparseMixer
from windlass.tensors import PackedStack, PagedRows, Tensors, Weight


class NativeKernels(TorchKernels):
    """Implements `Kernels` with the native library; what that lacks, torch computes. Called from
    one thread; the library's own pool of `threads` takes part. `bf16_activations`: products round
    what they multiply to bf16, as models that compute in bf16 do; sums are fp32 all the same."""

    def __init__(self, library: c.CDLL, *, threads: int, bf16_activations: bool = False) -> None:
        super().__init__(bf16_activations=bf16_activations)
        self._session = Session(library, threads=threads, precision=int(bf16_activations))
        self._ones: dict[int, torch.Tensor] = {}  # weights of norms without any, by width

    @property
    def name(self) -> str:
        return "cpu"

    @property
    def rows_are_alike(self) -> bool:
        return True  # one path for both (attention.h), sums in a fixed order

    def capture(self, label: Callable[[], str]) -> NativeCapture:
        return NativeCapture(self._session, label)

    def linear(
        self,
        x_TD: torch.Tensor,
        w: Weight,
        bias_E: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return products.linear(self._session, x_TD, w, bias_E, out)

    def linears(self, x_TD: torch.Tensor, w: Tensors, names: Sequence[str]) -> list[torch.Tensor]:
        return products.linears(self._session, x_TD, w, names)

    def batched_linear(
        self, x_THa: torch.Tensor, w_Hba: torch.Tensor | PackedStack
    ) -> torch.Tensor:
        return products.batched_linear(self._session, x_THa, w_Hba)

    def expert_ffn(self, x_ND: torch.Tensor, w: Tensors, activation: Activation) -> torch.Tensor:
        return products.expert_ffn(self._session, x_ND, w, activation)

    def experts(
        self,
        x_TD: torch.Tensor,
        experts: Mapping[int, Tensors],
        groups: ExpertGroups,
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        products.experts(self._session, x_TD, experts, groups, activation, out)

    def attention(
        self,
        q_THd: torch.Tensor,
        keys: PagedRows,
        values: PagedRows,
        work: AttentionWork,
        options: AttentionOptions,
    ) -> torch.Tensor:
        return attention.attention(self._session, q_THd, keys, values, work, options)

    def normalise(
        self,
        norm: Norm,
        weight_D: torch.Tensor | None,
        bias_D: torch.Tensor | None,
        x: torch.Tensor,
    ) -> torch.Tensor:
        if not isinstance(norm, RmsNorm):
            return super().normalise(norm, weight_D, bias_D, x)
        width, plus_one = x.shape[-1], norm.plus_one
        if weight_D is None:
            plus_one, weight_D = False, self._ones.get(width)
            if weight_D is None:
                weight_D = self._ones[width] = torch.ones(width)
        rows = elements_together(x.reshape(-1, width))
        y = self._session.empty(*x.shape)
        weight_D = weight_D.contiguous()
        self._session.call(
            "wl_rms_norm",
            rows.data_ptr(), rows.stride(0), y.data_ptr(), width, rows.shape[0], width,
            weight_D.data_ptr(), TYPES[weight_D.dtype], float(plus_one), norm.eps,
        )  # fmt: skip
        return y

    def rotate(
        self, x_THd: torch.Tensor, cos_Tf: torch.Tensor, sin_Tf: torch.Tensor, rope: Rope
    ) -> None:
        row, head, one = x_THd.stride()
        table, unit = cos_Tf.stride()
        assert cos_Tf.stride() == sin_Tf.stride() and unit == one == 1, "elements lie side by side"
        self._session.call(
            "wl_rotate",
            x_THd.data_ptr(), row, head, *x_THd.shape[:2], rope.dim // 2,
            cos_Tf.data_ptr(), sin_Tf.data_ptr(), table, rope.interleaved,
        )  # fmt: skip

    def write_rows(
        self, store: PagedRows, pages_T: torch.Tensor, offsets_T: torch.Tensor, x_TKd: torch.Tensor
    ) -> None:
        attention.write_rows(self._session, store, pages_T, offsets_T, x_TKd)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        num_rows, num_heads, _ = parts[0].shape
        widths = [part.shape[2] for part in parts]
        out = self._session.empty(num_rows, num_heads, sum(widths))
        row, head, _ = out.stride()
        column = out.data_ptr()
        for part, width in zip(parts, widths, strict=True):
            part = elements_together(part)
            self._session.call(
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
        self._session.call("wl_gate", x.data_ptr(), num_rows, width, gate.data_ptr(), is_one)

    def route(
        self,
        routing: Routing,
        top_k: int,
        logits_TE: torch.Tensor,
        bias_E: torch.Tensor | None,
        scale_E: torch.Tensor | None = None,
        *,
        wants_scores: bool = False,
    ) -> Routes:
        if isinstance(routing, SparseMixer):
            return super().route(routing, top_k, logits_TE, bias_E, wants_scores=wants_scores)
        logits_TE = logits_TE.contiguous()
        num_rows, num_experts = logits_TE.shape
        weights_TA = torch.empty(num_rows, top_k)
        ids_TA = torch.empty(num_rows, top_k, dtype=torch.int64)
        scores_TE = self._session.empty(num_rows, num_experts) if wants_scores else None
        structure = routing_of(routing, top_k, bias_E)
        structure.factors = None if scale_E is None else scale_E.data_ptr()
        self._session.call(
            "wl_route", logits_TE.data_ptr(), num_rows, num_experts, structure,
            weights_TA.data_ptr(), ids_TA.data_ptr(),
            None if scores_TE is None else scores_TE.data_ptr(),
            keep=(weights_TA, ids_TA, bias_E, scale_E),
        )  # fmt: skip
        return Routes(weights_TA, ids_TA, scores_TE)

    def group(self, ids_TA: torch.Tensor, num_experts: int) -> ExpertGroups:
        ids_TA = ids_TA.contiguous()
        num, per_row = ids_TA.numel(), ids_TA.shape[1]
        order, rows = torch.empty(2, num, dtype=torch.int64)
        counts_E = torch.empty(num_experts, dtype=torch.int64)
        self._session.call(
            "wl_group", ids_TA.data_ptr(), num, per_row, num_experts,
            order.data_ptr(), rows.data_ptr(), counts_E.data_ptr(), keep=(order, rows, counts_E),
        )  # fmt: skip
        return ExpertGroups(order, rows, counts_E)

    def accumulate(self, hidden_TD: torch.Tensor, y_TD: torch.Tensor, multiplier: float) -> None:
        sums.accumulate(self._session, hidden_TD, y_TD, multiplier)

    def scale(self, hidden_TD: torch.Tensor, multiplier: torch.Tensor) -> None:
        sums.scale(self._session, hidden_TD, multiplier.item())

    def weighted_sum(
        self,
        weights_TA: torch.Tensor,
        outputs_TAD: torch.Tensor,
        shared_TD: torch.Tensor | None,
    ) -> torch.Tensor:
        return sums.weighted_sum(self._session, weights_TA, outputs_TAD, shared_TD)

    def read(self, x: torch.Tensor) -> None:
        self._session.call("wl_read", x.data_ptr(), x.numel() * x.itemsize, c.c_float())

    def combine(
        self,
        weights_TA: torch.Tensor,
        outputs_TAD: torch.Tensor,
        shared_TD: torch.Tensor | None,
        hidden_TD: torch.Tensor,
        multiplier: float,
    ) -> None:
        sums.combine(self._session, weights_TA, outputs_TAD, shared_TD, hidden_TD, multiplier)

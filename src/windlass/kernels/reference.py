"""Torch kernels: stored weights are widened to fp32, packed ones dequantised, tile by tile, and
multiplied by the BLAS.

A tile of widened weights stays in the last-level cache, is filled once per call and used by all
row blocks. Sums of a row never depend on other rows: products go through a `RowLadder`,
transcendental functions through `pointwise`. Shape legend: kernels/interface.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from windlass.kernels import routing as routes
from windlass.kernels import rowwise
from windlass.kernels.interface import (
    AttentionOptions,
    AttentionWork,
    Capture,
    ExpertGroups,
    RoutedIds,
    Routes,
    RowTiles,
)
from windlass.kernels.limits import TILE_BYTES
from windlass.kernels.logit_scan import scan_logits
from windlass.kernels.row_counts import RowLadder, pad_rows
from windlass.kernels.torch_attention import paged_attention
from windlass.kernels.widened import WidenedWeights, widened_heads
from windlass.models.spec import (
    Activation,
    ClampedSwiGlu,
    GeGlu,
    Norm,
    ReluSquared,
    Rope,
    Routing,
    SwiGlu,
)
from windlass.tensors import PackedStack, PagedRows, Tensors, Weight, plain_or_none

_FEW_ROWS = (12, 128)


def _matmul(x_TD: torch.Tensor, w_ED: torch.Tensor) -> torch.Tensor:
    # MKL is up to twice as fast with the larger matrix on the left; the row ladder checks that both
    # ways give the same bits
    if _FEW_ROWS[0] <= len(x_TD) <= _FEW_ROWS[1]:
        return torch.mm(w_ED, x_TD.t()).t()
    return torch.mm(x_TD, w_ED.t())


def _batched_matmul(x_HTa: torch.Tensor, w_Hba: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x_HTa, w_Hba.transpose(1, 2))


def _no_tiles(num_heads: int, keys: PagedRows) -> Sequence[RowTiles]:
    """`Kernels.row_tiles`: the work itself is read."""
    return ()


class TorchKernels:
    """Implements `Kernels` on a CPU. Owns one tile of widened weights; used by one thread at a
    time."""

    def __init__(self, *, bf16_activations: bool = False) -> None:
        """`bf16_activations`: products round what they multiply to bf16."""
        self._bf16_activations = bf16_activations
        self._rows = RowLadder(_matmul)
        self._batched_rows = RowLadder(_batched_matmul)
        self._widened = WidenedWeights()

    @property
    def name(self) -> str:
        return "torch"

    @property
    def rows_are_alike(self) -> bool:
        return False  # tiles of prompts and of generated rows are products of different shapes

    def capture(self, label: Callable[[], str]) -> Capture | None:
        return None

    def linear(
        self,
        x_TD: torch.Tensor,
        w: Weight,
        bias_E: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x_TD = self._narrow(x_TD)
        num_rows, width = x_TD.shape
        out_TE = x_TD.new_empty(num_rows, math.prod(w.shape[:-1])) if out is None else out
        column = 0
        for w_ED in self._widened.tiles(w, width):
            features = w_ED.shape[0]
            for first, last, count in self._rows.blocks(num_rows, tuple(w_ED.shape)):
                y = _matmul(pad_rows(x_TD[first:last], count), w_ED)
                out_TE[first:last, column : column + features] = y[: last - first]
            column += features
        return out_TE if bias_E is None else out_TE.add_(bias_E.float())

    def linears(self, x_TD: torch.Tensor, w: Tensors, names: Sequence[str]) -> list[torch.Tensor]:
        return [
            self.linear(x_TD, w[f"{name}.weight"], plain_or_none(w, f"{name}.bias"))
            for name in names
        ]

    def batched_linear(
        self, x_THa: torch.Tensor, w_Hba: torch.Tensor | PackedStack
    ) -> torch.Tensor:
        num_rows, heads, width = x_THa.shape
        features = w_Hba.shape[1]
        out_HTb = x_THa.new_empty(heads, num_rows, features)
        x_HTa = x_THa.transpose(0, 1)
        step = max(1, TILE_BYTES // (4 * width * features))
        for head in range(0, heads, step):
            group = slice(head, min(head + step, heads))
            w = pad_rows(widened_heads(w_Hba, group), features)
            for first, last, count in self._batched_rows.blocks(num_rows, tuple(w.shape)):
                y = _batched_matmul(pad_rows(x_HTa[group, first:last], count), w)
                out_HTb[group, first:last] = y[:, : last - first]
        return out_HTb.transpose(0, 1)

    def expert_ffn(self, x_ND: torch.Tensor, w: Tensors, activation: Activation) -> torch.Tensor:
        up_NI = self.linear(x_ND, w["up"], plain_or_none(w, "up_bias"))
        if isinstance(activation, ReluSquared):
            hidden_NI = up_NI.relu_().square_()
        else:
            gate_NI = self.linear(x_ND, w["gate"], plain_or_none(w, "gate_bias"))
            hidden_NI = self._activate(gate_NI, up_NI, activation)
        return self.linear(hidden_NI, w["down"], plain_or_none(w, "down_bias"))

    def experts(
        self,
        x_TD: torch.Tensor,
        experts: Mapping[int, Tensors],
        groups: ExpertGroups,
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        counts = groups.counts_E.tolist()
        rows_and_places = (torch.split(one, counts) for one in (groups.rows, groups.order))
        parts = zip(*rows_and_places, strict=True)
        for expert, (rows, places) in enumerate(parts):
            if expert in experts and len(rows):
                out[places] = self.expert_ffn(x_TD[rows], experts[expert], activation)

    def experts_by_row(
        self, x_TD: torch.Tensor, experts: Mapping[int, Tensors], routed: RoutedIds,
        activation: Activation, out: torch.Tensor,
    ) -> None:  # fmt: skip
        self.experts(x_TD, experts, self.group(*routed), activation, out)

    def normalise(
        self,
        norm: Norm,
        weight_D: torch.Tensor | None,
        bias_D: torch.Tensor | None,
        x: torch.Tensor,
    ) -> torch.Tensor:
        return rowwise.normalise(norm, weight_D, bias_D, x)

    def rotate(
        self, x_THd: torch.Tensor, cos_Tf: torch.Tensor, sin_Tf: torch.Tensor, rope: Rope
    ) -> None:
        rowwise.rotate(x_THd, cos_Tf, sin_Tf, rope)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(parts), dim=-1)

    def gate(self, x: torch.Tensor, gate: torch.Tensor) -> None:
        x *= self.pointwise(torch.sigmoid, gate)

    def write_rows(
        self, store: PagedRows, pages_T: torch.Tensor, offsets_T: torch.Tensor, x_TKd: torch.Tensor
    ) -> None:
        rowwise.write_rows(store, pages_T, offsets_T, x_TKd)

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
        found = routes.route(self.pointwise, routing, top_k, logits_TE, bias_E)
        if scale_E is not None:
            found = found._replace(weights_TA=found.weights_TA * scale_E[found.ids_TA])
        return found if wants_scores else found._replace(scores_TE=None)

    def group(self, ids_TA: torch.Tensor, num_experts: int) -> ExpertGroups:
        flat = ids_TA.flatten()
        order = torch.argsort(flat, stable=True)
        counts_E = torch.bincount(flat, minlength=num_experts)
        return ExpertGroups(order, order // ids_TA.shape[1], counts_E)

    def accumulate(self, hidden_TD: torch.Tensor, y_TD: torch.Tensor, multiplier: float) -> None:
        # in two steps: a fused multiply-add would round otherwise in a vector's tail
        hidden_TD += y_TD * multiplier

    def scale(self, hidden_TD: torch.Tensor, multiplier: torch.Tensor) -> None:
        hidden_TD *= multiplier

    def weighted_sum(
        self,
        weights_TA: torch.Tensor,
        outputs_TAD: torch.Tensor,
        shared_TD: torch.Tensor | None,
    ) -> torch.Tensor:
        y_TD = torch.zeros_like(outputs_TAD[:, 0])
        rowwise.combine(weights_TA, outputs_TAD, shared_TD, y_TD, 1.0)
        return y_TD

    def combine(
        self,
        weights_TA: torch.Tensor,
        outputs_TAD: torch.Tensor,
        shared_TD: torch.Tensor | None,
        hidden_TD: torch.Tensor,
        multiplier: float,
    ) -> None:
        rowwise.combine(weights_TA, outputs_TAD, shared_TD, hidden_TD, multiplier)

    def read(self, x: torch.Tensor) -> None:
        x.sum()

    def pointwise(
        self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        return rowwise.pointwise(function, x)

    scan_logits = staticmethod(scan_logits)
    row_tiles = staticmethod(_no_tiles)

    def attention(
        self,
        q_THd: torch.Tensor,
        keys: PagedRows,
        values: PagedRows,
        work: AttentionWork,
        options: AttentionOptions,
    ) -> torch.Tensor:
        return paged_attention(self.pointwise, q_THd, keys, values, work, options)

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float() if self._bf16_activations else x

    def _activate(
        self, gate: torch.Tensor, up: torch.Tensor, activation: SwiGlu | ClampedSwiGlu | GeGlu
    ) -> torch.Tensor:
        if isinstance(activation, ClampedSwiGlu):
            gate = gate.clamp(max=activation.limit)
            up = up.clamp(-activation.limit, activation.limit)
            return (up + 1) * gate * self.pointwise(torch.sigmoid, activation.alpha * gate)
        function = gelu if isinstance(activation, GeGlu) else torch.nn.functional.silu
        return self.pointwise(function, gate).mul_(up)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """In its tanh form."""
    return torch.nn.functional.gelu(x, approximate="tanh")

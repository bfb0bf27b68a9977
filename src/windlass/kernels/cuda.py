"""The kernels of a CUDA device behind the `Kernels` protocol: Triton's, and the device's BLAS where
it keeps a row's bits. docs/gpu.md says which serves what.

Nothing waits for the device and nothing is decided by what tensors contain, but for a shape of the
BLAS when it is first met. Shape legend: kernels/interface.py.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from windlass.device.base import Allocator
from windlass.errors import UsageError
from windlass.kernels import rowwise
from windlass.kernels.cuda_graphs import GraphCaptures, RowTables
from windlass.kernels.interface import (
    AttentionOptions,
    AttentionWork,
    Capture,
    ExpertGroups,
    RoutedIds,
    Routes,
    RowTiles,
)
from windlass.kernels.logit_scan import scan_logits
from windlass.kernels.triton import launch, routing, small
from windlass.kernels.triton.attention import CudaAttention, Table
from windlass.kernels.triton.expert_table import experts_by_row, grouped_experts
from windlass.kernels.triton.products import Products
from windlass.models.spec import Activation, Norm, ReluSquared, Rope, Routing
from windlass.tensors import PackedStack, PagedRows, Tensors, Weight, plain_or_none

_FIRST_BF16 = 80  # the first architecture that multiplies bf16
_KEPT_TABLES = 256  # of slots: of all layers whose experts stay


class _Tables:
    """Makes small tables of numbers, int32, where kernels read them."""

    def __init__(self, captures: GraphCaptures | None, memory: Allocator | None) -> None:
        self._captures = captures
        self._memory = memory
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}  # the last one used last

    def new(self, like: torch.Tensor) -> Table:
        """Where `like` is."""
        if self._captures is not None:
            return self._captures.tensor
        if self._memory is not None:
            return partial(self._memory.tensor, dtype=torch.int32)
        return partial(like.new_tensor, dtype=torch.int32)

    def kept(self, like: torch.Tensor) -> Table:
        """The same, of numbers that may be those of an earlier call: experts that stay where they
        are. A graph keeps its own."""
        make = self.new(like)
        if self._captures is not None and self._captures.rows is not None:
            return make

        def table(numbers: Sequence[int]) -> torch.Tensor:
            key = tuple(numbers)
            found = self._kept.pop(key, None)
            self._kept[key] = found = make(numbers) if found is None else found
            if len(self._kept) > _KEPT_TABLES:
                del self._kept[next(iter(self._kept))]
            return found

        return table


class CudaKernels:
    """Implements `Kernels` on one device. Used by one thread at a time, in a stream.

    Products multiply in fp32 and, with `bf16_activations`, in 16 bits: rows are rounded to the type
    of the weights, or to bf16 where those are packed; fp32 weights meet rows rounded to bf16, as
    elsewhere. Sums are fp32 always, weights are never rounded. One kind of instruction and one
    order of sums for all numbers of rows.
    """

    def __init__(
        self,
        capability: int,
        *,
        bf16_activations: bool = False,
        captures: GraphCaptures | None = None,
        memory: Allocator | None = None,
    ) -> None:
        """`capability`: 90 for sm_90. Raises UsageError where it has no bf16. `captures`: of graphs
        of the device, None where it is to have none. `memory`: of the device; without it and
        `captures` torch copies small tables, and waits for each."""
        if bf16_activations and capability < _FIRST_BF16:
            raise UsageError(
                f"dtype: got 'bfloat16', but sm_{capability} multiplies no bf16: allowed are 'auto'"
                " and 'float32'"
            )
        self._products = Products(is_narrow=bf16_activations)
        self._attention = CudaAttention(is_narrow=bf16_activations)
        self._captures = captures
        self._tables = _Tables(captures, memory)

    @property
    def name(self) -> str:
        return "triton"

    @property
    def rows_are_alike(self) -> bool:
        return False  # tiles of prompts and of generated rows have sizes of their own

    def capture(self, label: Callable[[], str]) -> Capture | None:
        return None if self._captures is None else self._captures.new()

    # --- products ---------------------------------------------------------------------------------

    def linear(
        self,
        x_TD: torch.Tensor,
        w: Weight,
        bias_E: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._products.linear(self._products.rows(x_TD, w), w, bias_E, out)

    def linears(self, x_TD: torch.Tensor, w: Tensors, names: Sequence[str]) -> list[torch.Tensor]:
        return self._products.linears(x_TD, w, names)

    def batched_linear(
        self, x_THa: torch.Tensor, w_Hba: torch.Tensor | PackedStack
    ) -> torch.Tensor:
        return self._products.batched_linear(x_THa, w_Hba)

    def expert_ffn(self, x_ND: torch.Tensor, w: Tensors, activation: Activation) -> torch.Tensor:
        up_NI = self.linear(x_ND, w["up"], plain_or_none(w, "up_bias"))
        gate_NI = up_NI
        if not isinstance(activation, ReluSquared):
            gate_NI = self.linear(x_ND, w["gate"], plain_or_none(w, "gate_bias"))
        hidden_NI = launch.activate(gate_NI, up_NI, activation)
        return self.linear(hidden_NI, w["down"], plain_or_none(w, "down_bias"))

    def experts(
        self,
        x_TD: torch.Tensor,
        experts: Mapping[int, Tensors],
        groups: ExpertGroups,
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        if experts and len(x_TD):
            x_TD = self._products.rows(x_TD, next(iter(experts.values()))["up"])
            table = self._tables.kept(x_TD)
            grouped_experts(x_TD, experts, groups, activation, out, table)

    def experts_by_row(
        self,
        x_TD: torch.Tensor,
        experts: Mapping[int, Tensors],
        routed: RoutedIds,
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        if experts and len(x_TD):
            x_TD = self._products.rows(x_TD, next(iter(experts.values()))["up"])
            experts_by_row(x_TD, experts, routed, activation, out, self._tables.kept(x_TD))

    # --- attention --------------------------------------------------------------------------------

    def attention(
        self,
        q_THd: torch.Tensor,
        keys: PagedRows,
        values: PagedRows,
        work: AttentionWork,
        options: AttentionOptions,
    ) -> torch.Tensor:
        fixed: RowTables | None = None if self._captures is None else self._captures.rows
        table = self._tables.new(q_THd)
        return self._attention(q_THd, (keys, values), work, options, table, fixed)

    def row_tiles(self, num_heads: int, keys: PagedRows) -> Sequence[RowTiles]:
        return self._attention.row_tiles(num_heads, keys)

    def rotate(
        self, x_THd: torch.Tensor, cos_Tf: torch.Tensor, sin_Tf: torch.Tensor, rope: Rope
    ) -> None:
        small.rotate(x_THd, cos_Tf, sin_Tf, rope)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(parts), dim=-1)

    def write_rows(
        self, store: PagedRows, pages_T: torch.Tensor, offsets_T: torch.Tensor, x_TKd: torch.Tensor
    ) -> None:
        small.write_rows(store, pages_T, offsets_T, x_TKd)

    # --- routing ----------------------------------------------------------------------------------

    def route(
        self,
        routing_: Routing,
        top_k: int,
        logits_TE: torch.Tensor,
        bias_E: torch.Tensor | None,
        scale_E: torch.Tensor | None = None,
        *,
        wants_scores: bool = False,
    ) -> Routes:
        logits_TE = logits_TE.contiguous()
        return routing.route(routing_, top_k, logits_TE, bias_E, scale_E, wants_scores=wants_scores)

    def group(self, ids_TA: torch.Tensor, num_experts: int) -> ExpertGroups:
        ids_P = ids_TA.flatten()
        order = torch.argsort(ids_P, stable=True)
        # bincount would wait for the device; integers may be added in any order
        counts_E = ids_P.new_zeros(num_experts).scatter_add_(0, ids_P, torch.ones_like(ids_P))
        return ExpertGroups(order, order // ids_TA.shape[1], counts_E)

    # --- rows -------------------------------------------------------------------------------------

    def normalise(
        self,
        norm: Norm,
        weight_D: torch.Tensor | None,
        bias_D: torch.Tensor | None,
        x: torch.Tensor,
    ) -> torch.Tensor:
        rows = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous()
        vectors = [None if v is None else v.contiguous() for v in (weight_D, bias_D)]
        return small.normalise(norm, vectors[0], vectors[1], rows)

    def gate(self, x: torch.Tensor, gate: torch.Tensor) -> None:
        x *= self.pointwise(torch.sigmoid, gate)

    def accumulate(self, hidden_TD: torch.Tensor, y_TD: torch.Tensor, multiplier: float) -> None:
        hidden_TD += y_TD if multiplier == 1 else y_TD * multiplier

    def scale(self, hidden_TD: torch.Tensor, multiplier: torch.Tensor) -> None:
        hidden_TD *= multiplier

    scan_logits = staticmethod(scan_logits)

    def weighted_sum(
        self,
        weights_TA: torch.Tensor,
        outputs_TAD: torch.Tensor,
        shared_TD: torch.Tensor | None,
    ) -> torch.Tensor:
        y_TD = torch.zeros_like(outputs_TAD[:, 0])
        self.combine(weights_TA, outputs_TAD, shared_TD, y_TD, 1.0)
        return y_TD

    def combine(
        self,
        weights_TA: torch.Tensor,
        outputs_TAD: torch.Tensor,
        shared_TD: torch.Tensor | None,
        hidden_TD: torch.Tensor,
        multiplier: float,
    ) -> None:
        launch.combine(outputs_TAD, weights_TA, shared_TD, hidden_TD, multiplier)

    def read(self, x: torch.Tensor) -> None:
        x.sum()

    def pointwise(
        self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        # a device computes each element alone; the interpreter's tensors are a CPU's
        return function(x) if x.is_cuda else rowwise.pointwise(function, x)

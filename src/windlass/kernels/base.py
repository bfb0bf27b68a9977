"""What a kernel backend offers: arithmetic whose result for one row never depends on other rows.

Shape legend (everywhere in kernels/ and decoder/): T rows of a call, D hidden, E output features,
I intermediate, H query heads, K key/value heads, d head dim, v value dim, N rows of one expert,
P pages, B tokens of a page, S sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch

from windlass.packed import PackedStack, PagedRows, Weight
from windlass.packed import Tensors as Tensors
from windlass.spec.model import Activation, Norm, Rope, Routing


class ExpertRows(NamedTuple):
    """One expert's weights, and its rows: `rows` of the input go to `places` of the output (int64,
    equally many)."""

    w: Tensors
    rows: torch.Tensor
    places: torch.Tensor


class Groups(NamedTuple):
    """Places (row * A + slot) of rows with A experts each, sorted by expert, stable."""

    order: torch.Tensor  # (T * A,) int64
    rows: torch.Tensor  # of `order`
    counts_E: torch.Tensor  # int64: places of each expert


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """The rows of one attention call, sequence by sequence, as plain integers.

    Rows of a sequence are consecutive in the call and consecutive in position. `is_prompt` tells
    whether they are prompt tokens; a sequence has rows of one kind in a call.
    """

    first_row: tuple[int, ...]  # of each sequence
    num_rows: tuple[int, ...]
    first_position: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]  # page ids of each sequence, oldest first
    is_prompt: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """What the softmax of one layer needs. `sinks_H` is fp32 or None."""

    scale: float
    value_dim: int
    window: int | None = None
    sinks_H: torch.Tensor | None = None


_Result = TypeVar("_Result")


class Recorder(Protocol):
    """Repeats what was computed for an earlier pass of as many rows, each of another sequence, in
    tensors that are where they were."""

    def begin(self, work: AttentionWork) -> None:
        """A pass begins, and this is what its rows attend to."""
        ...

    def run(self, name: str, layer: int, w: Tensors, body: Callable[[], _Result]) -> _Result:
        """What `body` gives. It may be run, or what it computed at an earlier time with the same
        `w` may be computed again: then its result is the same object with new contents. It only
        calls kernels, and decides nothing by what tensors contain."""
        ...


class Kernels(Protocol):
    """Activations are fp32; weights come in their stored type, possibly as strided views, and
    quantised ones packed as they are."""

    @property
    def name(self) -> str:
        """Of the backend, as `moe_backend` has it."""
        ...

    def recorder(self) -> Recorder | None:
        """A new one; None where nothing would be gained by it."""
        ...

    def linear(
        self, x_TD: torch.Tensor, w: Weight, bias_E: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x @ w.T + bias -> (T, E). `w` is (E, D), or (g, n, D) with E = g n."""
        ...

    def linears(self, x_TD: torch.Tensor, w: Tensors, names: Sequence[str]) -> list[torch.Tensor]:
        """`linear` of the same rows with several of a part's matrices: `{name}.weight`, with
        `{name}.bias` where the part has it."""
        ...

    def batched_linear(
        self, x_THa: torch.Tensor, w_Hba: torch.Tensor | PackedStack
    ) -> torch.Tensor:
        """One matrix per head: (T, H, a) x (H, b, a) -> (T, H, b)."""
        ...

    def expert_ffn(self, x_ND: torch.Tensor, w: Tensors, activation: Activation) -> torch.Tensor:
        """gate, up, activation, down. `w`: `gate` (I, D), `up` (I, D), `down` (D, I) and, where the
        experts have biases, `gate_bias`, `up_bias`, `down_bias`."""
        ...

    def experts(
        self,
        x_TD: torch.Tensor,
        work: Sequence[ExpertRows],
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        """`expert_ffn` of several experts over gathered rows, written to their places of `out`."""
        ...

    def normalise(
        self, norm: Norm, weight_D: torch.Tensor, bias_D: torch.Tensor | None, x: torch.Tensor
    ) -> torch.Tensor:
        """Normalises the last dimension of `x`."""
        ...

    def rotate(
        self, x_THd: torch.Tensor, cos_Tf: torch.Tensor, sin_Tf: torch.Tensor, rope: Rope
    ) -> None:
        """Rotates the first `rope.dim` dimensions of each head in place; the others stay."""
        ...

    def write_rows(
        self, store: PagedRows, pages_T: torch.Tensor, offsets_T: torch.Tensor, x_TKd: torch.Tensor
    ) -> None:
        """Writes each row's heads at its offset of its page, rounded to the store's type."""
        ...

    def route(
        self,
        routing: Routing,
        top_k: int,
        logits_TE: torch.Tensor,
        bias_E: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each row: weights (T, A) fp32 and ids (T, A) int64, best first. `bias_E`
        (fp32) is what `select_bias` speaks of."""
        ...

    def group(self, ids_TA: torch.Tensor, num_experts: int) -> Groups:
        """Who has which expert, of the ids (int64) that rows were routed to."""
        ...

    def accumulate(self, hidden_TD: torch.Tensor, y_TD: torch.Tensor, multiplier: float) -> None:
        """Adds `multiplier` times `y_TD` to `hidden_TD`, in place."""
        ...

    def combine(
        self,
        weights_TA: torch.Tensor,
        outputs_TAD: torch.Tensor,
        shared_TD: torch.Tensor | None,
        hidden_TD: torch.Tensor,
        multiplier: float,
    ) -> None:
        """Adds `multiplier` times (the weighted sum of each row's expert outputs, in the row's
        routing order, plus the shared expert's) to `hidden_TD`, in place."""
        ...

    def read(self, x: torch.Tensor) -> None:
        """Reads a contiguous `x` once and does nothing else: what memory gives at most."""
        ...

    def pointwise(
        self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """An elementwise transcendental function (exp, sigmoid, silu, softplus, ...), computed so
        that an element's bits do not depend on where in the tensor it lies."""
        ...

    def attention(
        self,
        q_THd: torch.Tensor,
        keys: PagedRows,
        values: PagedRows,
        work: AttentionWork,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Causal softmax attention of every row over its sequence's pages -> (T, H, v).

        Rows may be wider than d and `options.value_dim` (zeros), so that they are aligned.
        `values` may be a view of the keys (MLA: their first v columns).
        """
        ...

"""What a kernel backend offers: arithmetic whose result for one row never depends on other rows.

Shape legend (everywhere in kernels/ and decoder/): T rows of a call, D hidden, E output features,
I intermediate, H query heads, K key/value heads, d head dim, v value dim, N rows of one expert,
P pages, B tokens of a page, S sequences.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch

from windlass.models.spec import Activation, Norm, Rope, Routing
from windlass.tensors import PackedStack, PagedRows, Tensors, Weight


class ExpertGroups(NamedTuple):
    """Places (row * A + slot) of rows with A experts each, sorted by expert, stable. All int64 and
    contiguous."""

    order: torch.Tensor  # (T * A,)
    rows: torch.Tensor  # of `order`
    counts_E: torch.Tensor  # places of each expert

    @classmethod
    def even(cls, experts: int, rows: int) -> "ExpertGroups":
        """Of rows that have one expert each, equally many of each expert, in their order."""
        places = torch.arange(experts * rows)
        return cls(places, places, torch.full((experts,), rows))


class RoutedIds(NamedTuple):
    """Which of `num_experts` experts rows have."""

    ids_TA: torch.Tensor  # int64 and contiguous
    num_experts: int


class RowTiles(NamedTuple):
    """How a kernel takes rows of one kind: of a sequence up to `rows` at once."""

    is_prompt: bool
    rows: int


class AttentionTile(NamedTuple):
    """Consecutive rows of a sequence."""

    sequence: int
    first_row: int  # of the call
    num_rows: int
    first_position: int
    place: int  # of the first row, among the rows of all tiles of the kind


class WorkTables(NamedTuple):
    """What kernels of a device read of an `AttentionWork`, in its memory; int64 and contiguous."""

    pages_SP: torch.Tensor  # of each sequence, oldest first, filled up with pages that nobody reads
    sequences_T: torch.Tensor  # that each row belongs to
    lengths_T: torch.Tensor  # positions that each row sees, its own the last
    tiles: Mapping[RowTiles, torch.Tensor] = {}  # `AttentionWork.tiles` of each kind: (5, M)

    def by_row(self) -> "WorkTables":
        """Each row as if it were a sequence of its own."""
        each_T = torch.arange(len(self.sequences_T), device=self.sequences_T.device)
        return WorkTables(self.pages_SP[self.sequences_T], each_T, self.lengths_T)


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """The rows of one attention call, sequence by sequence, as plain integers.

    Rows of a sequence are consecutive in the call and consecutive in position. `is_prompt` tells
    whether they are prompt tokens; a sequence has rows of one kind in a call. `tables`: the same
    for kernels that do not run on the host, as far as a pass has sent it; None for those that do.
    """

    first_row: tuple[int, ...]  # of each sequence
    num_rows: tuple[int, ...]
    first_position: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]  # page ids of each sequence, oldest first
    is_prompt: tuple[bool, ...]
    tables: WorkTables | None = None

    def tiles(self, kind: RowTiles) -> list[AttentionTile]:
        """Of all rows of that kind, in their order."""
        found, place = [], 0
        for i, count in enumerate(self.num_rows):
            for row in range(0, count if self.is_prompt[i] is kind.is_prompt else 0, kind.rows):
                own, first = min(kind.rows, count - row), self.first_row[i] + row
                found.append(AttentionTile(i, first, own, self.first_position[i] + row, place))
                place += own
        return found

    def by_row(self) -> "AttentionWork":
        """The same rows, each as if it were a sequence of its own: of another form only for whom
        the number of sequences matters."""
        if all(count == 1 for count in self.num_rows):
            return self
        each = [(i, row) for i, count in enumerate(self.num_rows) for row in range(count)]
        return AttentionWork(
            first_row=tuple(self.first_row[i] + row for i, row in each),
            num_rows=(1,) * len(each),
            first_position=tuple(self.first_position[i] + row for i, row in each),
            pages=tuple(self.pages[i] for i, _ in each),
            is_prompt=tuple(self.is_prompt[i] for i, _ in each),
            tables=None if self.tables is None else self.tables.by_row(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """What the softmax of one layer needs. `sinks_H` is fp32 or None."""

    scale: float
    value_dim: int
    window: int | None = None
    sinks_H: torch.Tensor | None = None


class Routes(NamedTuple):
    """The experts of each row, best first."""

    weights_TA: torch.Tensor  # fp32
    ids_TA: torch.Tensor  # int64
    scores_TE: torch.Tensor | None  # fp32, of all experts; None where they are not wanted


class LogitScan(NamedTuple):
    """What is known of rows' logits while ranges of the vocabulary go by, in the order of tokens.
    Where no targets are given only `tops_R` and `ids_R` are wanted, and the others mean nothing."""

    tops_R: torch.Tensor  # fp32: the largest so far; no number once one was
    ids_R: torch.Tensor  # int64: its token, the first of equals
    totals_R: torch.Tensor  # fp64: sum of exp(logit - top)
    own_R: torch.Tensor  # fp32: the logit of the row's target
    targets_R: torch.Tensor | None  # int64
    # Of the likeliest tokens so far, logit and token as one number (`kernels/logit_scan.py`), the
    # largest first, int64; None where only the one is wanted
    best_RK: torch.Tensor | None = None

    def rows(self, some: slice) -> "LogitScan":
        """Of those rows, which a change of it changes."""
        return LogitScan(*(None if one is None else one[some] for one in self))  # type: ignore[arg-type]


_Result = TypeVar("_Result")


class CapturedExperts(Mapping[int, Tensors]):
    """Experts of a layer for a captured call of `Kernels.experts`; those held when it is replayed
    are computed."""

    @abstractmethod
    def hold(self, experts: Mapping[int, Tensors]) -> None:
        """These from now on, in place of others."""


class Capture(Protocol):
    """Captures layers of a pass and replays them for later ones: of as many rows, each of
    another sequence, whose hidden states, attention metadata and weights lie where they lay."""

    def begin(self, work: AttentionWork) -> None:
        """A pass begins, and this is what its rows attend to."""
        ...

    def run(
        self, key: object, body: Callable[[], _Result], *, continues: bool = False
    ) -> _Result | None:
        """What the `body` of `key` (a layer, or a piece of one) computes, which only calls kernels
        and decides nothing by what tensors contain: by running it, or by replaying what it did for
        an earlier pass, and then its result is that of then with new contents. None, and nothing is
        computed, where it cannot be captured because it does more than that. `continues`: results
        of the last run are read, and last as long as this one's."""
        ...

    def experts(self, num_experts: int) -> CapturedExperts:
        """Room for the experts of a layer; it holds none."""
        ...

    def empty(self, *shape: int) -> torch.Tensor:
        """Within a body: memory of a result, fp32, that lasts until the next layer."""
        ...

    def seconds(self) -> dict[str, float]:
        """What replays took since this was last asked, by the label at the time of the capture."""
        ...


class Kernels(Protocol):
    """Activations are fp32; weights come in their stored type, possibly as strided views, and
    quantised ones packed as they are."""

    @property
    def name(self) -> str:
        """Of the backend, as `moe_backend` has it."""
        ...

    @property
    def rows_are_alike(self) -> bool:
        """Whether attention gives a generated row the bits that it would have in a prompt."""
        ...

    def capture(self, label: Callable[[], str]) -> Capture | None:
        """A new one; None where nothing would be gained by it. `label`: what is being computed."""
        ...

    def linear(
        self,
        x_TD: torch.Tensor,
        w: Weight,
        bias_E: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x @ w.T + bias -> (T, E), in `out` where it is given. `w` is (E, D), or (g, n, D) with
        E = g n."""
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
        """gate, up, activation, down. `w`: `gate` (I, D) where the activation has one, `up` (I, D),
        `down` (D, I) and, where the experts have biases, `gate_bias`, `up_bias`, `down_bias`."""
        ...

    def experts(
        self,
        x_TD: torch.Tensor,
        experts: Mapping[int, Tensors],
        groups: ExpertGroups,
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        """`expert_ffn` of some experts, each over its rows of `x_TD`, written to their places (as
        `groups.order` has them) of `out` (T * A, D). Those without rows cost nothing."""
        ...

    def experts_by_row(
        self,
        x_TD: torch.Tensor,
        experts: Mapping[int, Tensors],
        routed: RoutedIds,
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        """The same for few rows, each by itself: perhaps other sums, so other bits than those of
        `experts`, and as independent of other rows."""
        ...

    def normalise(
        self,
        norm: Norm,
        weight_D: torch.Tensor | None,
        bias_D: torch.Tensor | None,
        x: torch.Tensor,
    ) -> torch.Tensor:
        """Normalises the last dimension of `x`; without a weight the result is as it is."""
        ...

    def rotate(
        self, x_THd: torch.Tensor, cos_Tf: torch.Tensor, sin_Tf: torch.Tensor, rope: Rope
    ) -> None:
        """Rotates the first `rope.dim` dimensions of each head in place; the others stay."""
        ...

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """(T, H, a), (T, H, b), ... side by side -> (T, H, a + b + ...)."""
        ...

    def gate(self, x: torch.Tensor, gate: torch.Tensor) -> None:
        """Multiplies a contiguous `x` (T, ...) by the sigmoid of `gate`, of its shape or one number
        for each row, in place."""
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
        scale_E: torch.Tensor | None = None,
        *,
        wants_scores: bool = False,
    ) -> Routes:
        """The experts of each row. `bias_E` (fp32) is what `select_bias` speaks of, `scale_E`
        (fp32) what `expert_scale` does. The scores are what experts are chosen by, before that
        bias and before groups are dropped: probabilities of `SoftmaxTopK`, sigmoids of
        `SigmoidTopK`, the logits themselves of `TopKSoftmax` and `SparseMixer`. They may be a view
        of the logits."""
        ...

    def group(self, ids_TA: torch.Tensor, num_experts: int) -> ExpertGroups:
        """Who has which expert, of the ids (int64) that rows were routed to."""
        ...

    def accumulate(self, hidden_TD: torch.Tensor, y_TD: torch.Tensor, multiplier: float) -> None:
        """Adds `multiplier` times `y_TD` to `hidden_TD`, in place."""
        ...

    def scale(self, hidden_TD: torch.Tensor, multiplier: torch.Tensor) -> None:
        """Multiplies `hidden_TD` by the only element of `multiplier`, in place."""
        ...

    def weighted_sum(
        self,
        weights_TA: torch.Tensor,
        outputs_TAD: torch.Tensor,
        shared_TD: torch.Tensor | None,
    ) -> torch.Tensor:
        """What `combine` adds with a multiplier of 1 -> (T, D)."""
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

    def scan_logits(self, scan: LogitScan, logits_RC: torch.Tensor, first: int) -> None:
        """Takes the logits of the tokens from `first` on into `scan`, in place. They may be
        overwritten."""
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

    def row_tiles(self, num_heads: int, keys: PagedRows) -> Sequence[RowTiles]:
        """How rows of so many query heads are taken over such keys, for tables of a device
        (`WorkTables.tiles`); none where kernels read the work itself."""
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

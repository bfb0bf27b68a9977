"""What a pass needs of the machine. Two implementations are foreseen: a device, and a clock."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from windlass.ids import WeightKey
from windlass.schedule.batch import Batch, MicroBatch, RowGroup


@dataclass(frozen=True, slots=True)
class Routed:
    """A group's rows on their way through the experts of a layer. `data` belongs to the runtime."""

    experts: tuple[int, ...]  # with at least one row, ascending
    data: Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a pass gives: logits (rows of which they are wanted, vocabulary); of each target, in
    segment order, its log-probability, the likeliest tokens in its place (targets, K) and
    theirs; of each row of which only the likeliest token is wanted, that and its logit
    (`Batch.whole_and_likeliest_rows`); the last states of all rows, where a layer that drafts wants
    them; and ranks of targets, where they are wanted."""

    logits: Any
    logprobs: Any
    best: Any
    best_logprobs: Any
    likeliest: Any = None
    likeliest_logits: Any = None
    states: Any = None
    ranks: Any = None


class Runtime(Protocol):
    """About ten calls. Hidden states and leases are opaque to the schedule."""

    def begin(self, batch: Batch) -> Any:
        """Embeds the tokens -> hidden states."""
        ...

    def prefetch(self, layer: int) -> None:
        """The pass enters `layer` (len(layers) for the head) with its last group: forecast what
        comes and fetch it."""
        ...

    def replay(self, layer: int) -> bool:
        """Computes a whole layer of the pass at once, if all its weights are in memory for good and
        the device can do what it did for the last pass. False: nothing is done, the schedule has
        to."""
        ...

    def replay_block(self, layer: int) -> Routed | None:
        """The same of all that comes before the experts of `layer`, if the block's weights are in
        memory for good. None: nothing is done."""
        ...

    def lease(self, key: WeightKey) -> AbstractContextManager[Any]:
        """The part's weights, waiting for them if need be."""
        ...

    def arrivals(self, keys: Sequence[WeightKey]) -> Iterator[Any]:
        """Leases of all `keys`, several at once: resident ones first, then as they arrive; each
        until the next are asked for."""
        ...

    def attend(self, layer: int, weights: Any, hidden: Any, rows: MicroBatch) -> Any:
        """Begins norm and attention of a micro-batch's rows; keys and values are written when it
        returns, or before any later call needs them -> what `attended` wants to know."""
        ...

    def attended(self, layer: int, weights: Any, hidden: Any, rows: MicroBatch, begun: Any) -> None:
        """Waits for what `attend` has `begun`; projection and residual, in place."""
        ...

    def enter_experts(self, layer: int, weights: Any, hidden: Any, group: RowGroup) -> Routed:
        """Norm and routing of the group's rows, and the shared expert where there is one."""
        ...

    def experts(self, layer: int, arrived: Any, routed: Routed) -> None:
        """Experts that are there, each over all of the group's rows that chose it."""
        ...

    def leave_experts(self, layer: int, routed: Routed) -> None:
        """Adds every row's expert outputs, in its own routing order, and the residual, in place."""
        ...

    def enter_dense(self, layer: int, weights: Any, hidden: Any, group: RowGroup) -> Any:
        """Norm of the group's rows before a dense feed-forward network."""
        ...

    def dense(self, layer: int, weights: Any, normed: Any) -> None:
        """Dense feed-forward network and residual of the rows `normed`, in place."""
        ...

    def enter_head(self, hidden: Any, batch: Batch) -> Any:
        """Last norm of the rows whose logits or scores are wanted."""
        ...

    def head(self, weights: Any, final: Any) -> None:
        """Logits of one chunk of the vocabulary. Once all were there they may come again, for the
        ranks of targets."""
        ...

    def finish(self, final: Any) -> Outcome:
        """What the head gave."""
        ...


class DraftRuntime(Runtime, Protocol):
    """The same where a layer drafts."""

    def join(self, weights: Any, states: Any, rows: Sequence[int], batch: Batch) -> Any:
        """Embeds the tokens and joins each with the state of the one before, those `rows` of
        `states` -> hidden states of the layer that drafts."""
        ...

    def enter_draft_head(self, weights: Any, hidden: Any, batch: Batch) -> Any:
        """That layer's last norm of the rows whose logits are wanted."""
        ...

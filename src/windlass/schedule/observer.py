"""What routers decide, for whoever records it or learns from it. Knows no kernels: arrays are the
runtime's own (numpy reads them without a copy).

T tokens of a pass, E experts of a layer, A experts of a token, D hidden.
"""

from typing import Any, NamedTuple, Protocol

from windlass.models.spec import Moe, Norm
from windlass.schedule.batch import Batch


class RoutedTokens(NamedTuple):
    """The tokens of a pass at the router of one layer, in the order of the batch, which knows the
    sequence and position of each. Arrays are valid until `observe` returns and are not written to:
    the next layer takes their memory. Tokens of a preempted sequence are routed again; guesses
    (`Segment.num_drafts`) are routed too, those that were wrong at positions that come again. What
    is None nobody wanted, or a clock that only counts does not know."""

    layer: int
    batch: Batch
    counts_E: Any  # int64: tokens of each expert
    ids_TA: Any = None  # int64: chosen experts, best first
    scores_TE: Any = None  # fp32, as `Kernels.route` defines them
    h_TD: Any = None  # fp32: what the router read
    residual_TD: Any = None  # fp32: the hidden states before the router's norm


class RouterWeights(NamedTuple):
    """What a layer's router multiplies: its logits are those of the residual stream, normalised
    as `norm` does without weights, times `weight_DE` plus `bias_E`. fp32; whoever gets them may
    keep them."""

    layer: int
    moe: Moe
    norm: Norm
    weight_DE: Any
    bias_E: Any
    select_bias_E: Any  # added to the scores for the choice only; None where there is none


class RouterReader(Protocol):
    """Wants the weights of all routers."""

    def set_router(self, router: RouterWeights) -> None:
        """Of a layer, once, before the layer's first `observe`."""
        ...


class RoutingObserver(Protocol):
    """Is told of every pass, and of every layer with experts in it, in order, by the thread that
    computes."""

    @property
    def wants_scores(self) -> bool:
        """Asked once, at the start. Scores are computed for all observers if one wants them."""
        ...

    @property
    def wants_states(self) -> bool:
        """Asked once, at the start: whether `residual_TD` is wanted of every layer. Layers are not
        captured then: those that are have no such rows to show."""
        ...

    def begin(self, batch: Batch, embedded_TD: Any) -> None:
        """A pass begins; its rows as they enter the first layer, fp32."""
        ...

    def observe(self, tokens: RoutedTokens) -> None:
        """One layer has routed the tokens of a pass; its experts may or may not have run yet."""
        ...

    def end(self, final_TD: Any) -> None:
        """The last layer is done: its rows, fp32, before the last norm."""
        ...

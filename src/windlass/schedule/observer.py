"""What routers decide, for whoever records it or learns from it. Knows no kernels: arrays are the
runtime's own (numpy reads them without a copy).

T tokens of a pass, E experts of a layer, A experts of a token, D hidden.
"""

from typing import Any, NamedTuple, Protocol

from windlass.schedule.batch import Batch


class RoutedTokens(NamedTuple):
    """The tokens of a pass at the router of one layer, in the order of the batch, which knows the
    sequence and position of each. Arrays are valid until `observe` returns and are not written to:
    the next layer takes their memory. Tokens of a preempted sequence are routed again."""

    layer: int
    batch: Batch
    h_TD: Any  # fp32: what the router read
    ids_TA: Any  # int64: chosen experts, best first
    scores_TE: Any | None  # fp32, as `Kernels.route` defines them; None where nobody wants them


class RoutingObserver(Protocol):
    """Is told of every layer with experts of every pass, in order, by the thread that computes."""

    @property
    def wants_scores(self) -> bool:
        """Asked once, at the start. Scores are computed for all observers if one wants them."""
        ...

    def observe(self, tokens: RoutedTokens) -> None:
        """One layer has routed the tokens of a pass; its experts may or may not have run yet."""
        ...

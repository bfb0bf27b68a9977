"""What is expected of each expert, and who expects it. Numbers over ids alone, by numpy.

All vectors are flat: experts of all layers, layer by layer (`ExpertTable`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from windlass.ids import Part, WeightKey
from windlass.models.spec import ModelSpec, Moe
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens

CERTAIN = 0.999  # beyond, a use is taken as certain: such reads are no speculation

Floats = NDArray[np.float64]


class ExpertTable:
    """Where the experts of each layer lie in flat vectors."""

    def __init__(self, num_experts: Sequence[int], top_k: int) -> None:
        """`num_experts`: one number per layer, 0 where a layer has none. `top_k`: experts of a
        token, of all layers the most."""
        assert top_k >= 1, f"top_k: got {top_k}, allowed at least 1"
        self.num_experts = tuple(num_experts)
        self.top_k = top_k
        self.layers = tuple(layer for layer, count in enumerate(num_experts) if count)
        ends = np.cumsum(num_experts, dtype=np.int64)
        self.first = (ends - np.array(num_experts, dtype=np.int64)).tolist()
        self.layer_of = np.repeat(np.arange(len(num_experts)), num_experts)
        self.keys = [
            WeightKey(Part.EXPERT, layer, expert)
            for layer, count in enumerate(num_experts)
            for expert in range(count)
        ]
        self.uniform = np.minimum(
            1.0, top_k / np.repeat(np.maximum(1, np.array(num_experts)), num_experts)
        )

    @classmethod
    def of(cls, spec: ModelSpec) -> "ExpertTable":
        """Of a model that has experts."""
        networks = [block.ffn for block in spec.blocks]
        top_k = max(ffn.top_k for ffn in networks if isinstance(ffn, Moe))
        return cls([ffn.num_experts if isinstance(ffn, Moe) else 0 for ffn in networks], top_k)

    def __len__(self) -> int:
        return len(self.keys)

    def slice(self, layer: int) -> slice:
        """Places of the experts of `layer`."""
        first: int = self.first[layer]
        return slice(first, first + self.num_experts[layer])

    def place(self, key: WeightKey) -> int:
        """Of an expert."""
        return int(self.first[key.layer]) + key.index


class Outlook:
    """What is expected, in vectors that change with what is observed. `now`: the probability that
    the pass under way uses an expert; 0 or 1 where its layer has routed. `next`: that the pass
    after it does. `usage`: that a later pass does, on average. `version` grows with every change.

    Of a pass in several groups, `layer` is where the last of them is, None in other passes, where
    uses tell; while it `is_open`, some groups have routed there and others have not: what was used
    may be wanted again.
    """

    def __init__(self, table: ExpertTable) -> None:
        self.table = table
        self.now: Floats = table.uniform.copy()
        self.next: Floats = table.uniform.copy()
        self.usage: Floats = table.uniform.copy()
        self.version = 0
        self.layer: int | None = None
        self.is_open = False


class Candidates(NamedTuple):
    """Experts that are worth a speculative read: places, and the value of each, the larger the
    sooner. Some may be resident."""

    places: NDArray[np.int64]
    values: Floats


class ExpertForecast(Protocol):
    """Expects uses of experts. Told of all passes by the thread that computes, in order, as a
    `RoutingObserver` is. It must not hold what it is given: arrays are overwritten."""

    @property
    def wants_scores(self) -> bool: ...

    @property
    def wants_states(self) -> bool:
        """Whether hidden states are to be given; the same always."""
        ...

    @property
    def outlook(self) -> Outlook: ...

    speculates: bool
    """Whether candidates are asked for at present: what serves nothing else may be left out."""

    threshold: float | None
    """Probability of a use that is worth a read ahead; None where candidates are chosen otherwise.
    Whoever knows the link may raise it for a while."""

    def begin(self, batch: Batch, embedded_TD: Any) -> None:
        """A pass over `batch` begins. `embedded_TD`: its rows as they enter the first layer, fp32;
        None where nobody wants states, or there are none."""
        ...

    def observe(self, tokens: RoutedTokens) -> None:
        """A layer has routed."""
        ...

    def end(self, final_TD: Any) -> None:
        """The pass has left the last layer with these states, fp32, before the last norm."""
        ...

    def work(self) -> bool:
        """Does a piece of arithmetic that was put off, some 100 us of it; False: there is none.
        Called while weights are waited for; what is not done in time may be dropped."""
        ...

    def candidates(self, layer: int) -> Candidates:
        """What to read ahead of its gate while the pass is in `layer`."""
        ...


def likely(outlook: Outlook, layer: int, *, at_least: float) -> Candidates:
    """Experts from this layer on whose use in this pass, and of those before whose use in the next,
    has at least this probability, but is not certain. Their value is the probability over the
    layers until then (PRI of FineMoE section 4.5)."""
    table = outlook.table
    first = table.first[layer] if layer < len(table.first) else len(table)
    # experts lie in the order of their layers: those before are of the next pass
    chances = np.concatenate((outlook.next[:first], outlook.now[first:]))
    places = ((chances >= at_least) & (chances < CERTAIN)).nonzero()[0]
    distance = (table.layer_of[places] - layer) % len(table.num_experts)
    return Candidates(places, chances[places] / np.maximum(distance, 1))

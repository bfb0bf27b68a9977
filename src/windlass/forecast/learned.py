"""The forecast of experts that is used by default: gates that learn where they have spoken, what
each sequence used lately elsewhere.

Off the critical path: `observe` copies a few rows and queues; products with matrices and changes of
them wait for `work`. For each layer of 2048 dimensions and 128 experts and one token, on two shared
cores (`bench/forecast_cost.py`): 0.05 ms for `observe`, 0.04 ms for begin and end; 0.3 ms for each
of five forecasts and 0.5 ms for each of as many lessons, when there is time.

n tokens of a pass that are looked at (at most `MOST_TOKENS`), D hidden, E experts of a layer.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from windlass.forecast.gate import (
    BY_WORTH,
    FIXED,
    MOST_TOKENS,
    Gate,
    Source,
    gate_bytes,
    make_gate,
    normalised,
    targets,
)
from windlass.forecast.interface import (
    CERTAIN,
    Candidates,
    ExpertForecast,
    ExpertTable,
    Floats,
    likely,
)
from windlass.forecast.pace import Pace
from windlass.forecast.selection import Singles, logits_of
from windlass.forecast.sequence_usage import SequenceUsage, usage_bytes
from windlass.forecast.source_guard import WINDOW, SourceGuards
from windlass.forecast.states import Claim, PassStates
from windlass.models.spec import Norm
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens, RouterWeights

STEP = 0.3  # 0.2 to 0.4 are as good; 0.1 and 0.8 lose a point or two of recall
WORTH_A_READ = 0.4  # probability of a use
_SURE = CERTAIN - 1e-3  # no forecast of a gate is certain


class _Due(NamedTuple):
    """What the routing of a layer teaches of a source."""

    source: Source
    layer: int
    seen: PassStates
    last: PassStates | None


class _Following(NamedTuple):
    """What follows from a layer's routing, as long as the same sources speak and are believed."""

    ahead: list[tuple[Source, int]]  # layers that it foretells, the next one at the end
    better: set[int]  # of those, what is foretold no worse from here
    has_next: bool  # whether it foretells itself
    sources: list[Source]  # that learn from it


class LearnedForecast:
    """Implements `ExpertForecast` and `RouterReader`.

    A piece of `work` is one product with a matrix, or one change of one: first what is said of the
    next layers, then of the next token, then of the rest of this one; then what is learnt. What is
    said of a layer that has passed is dropped unsaid, and usage stands in its place; lessons wait
    until the next pass, and the oldest are dropped when more than those of a pass have come. Passes
    of many tokens are learnt from, but not foretold: they use most experts anyway.

    A source whose words are no nearer to what comes than what stood in their place (those of a
    source further off, what the token before foretold, or usage) is neither asked nor taught
    (`SourceGuard`).
    """

    wants_states = True

    def __init__(
        self,
        table: ExpertTable,
        hidden: int,
        *,
        limit_bytes: int | None = None,
        is_fixed: bool = False,
        clock: Callable[[], float] | None = None,
        window: int = WINDOW,
    ) -> None:
        """`limit_bytes`: of all that it holds; decides what it foretells from (`sources_within`).
        `is_fixed`: gates stay the routers' own matrices. With a `clock` (seconds) the next layer is
        foretold at once, waited for or not, where that takes little of a layer's time; without one
        nothing depends on time. `window`: passes after which sources are judged."""
        fit = sources_within(table, hidden, limit_bytes, is_fixed=is_fixed)
        self.sources = tuple(source for source in fit if targets(table, source))
        self.wants_scores = not is_fixed
        self.threshold: float | None = WORTH_A_READ
        self.speculates = True
        self._table = table
        self._step = 0.0 if is_fixed else STEP
        self._usage = SequenceUsage(table)
        self.outlook = self._usage.outlook
        self._norm: Norm | None = None  # until a router is known
        self._gates: dict[tuple[Source, int], Gate] = {}
        self._follows: dict[int, _Following] = {}
        self._index = {layer: i for i, layer in enumerate(table.layers)}
        self._pass: PassStates | None = None
        self._last: PassStates | None = None  # the one before it
        # what is to be said, the most urgent at the end
        self._ahead: list[tuple[Source, int]] = []
        self._next: list[int] = []
        self._start: list[int] = []
        self._lessons: deque[_Due] = deque(maxlen=len(self.sources) * len(table.layers))
        self._pace = Pace(clock)
        self._guards = SourceGuards(self.sources, window=window)

    def words(self) -> str:
        """Which sources are on and off, for people; empty where all are on."""
        return self._guards.words()

    def seed(self, counts: Floats, num_tokens: float) -> None:
        """What earlier runs saw (`SharedUsage.seed`); before the first pass."""
        self._usage.seed(counts, num_tokens)

    def set_router(self, router: RouterWeights) -> None:
        layer, layers = router.layer, self._table.layers
        self._norm = router.norm
        for source in self.sources:
            if layer in targets(self._table, source):
                gate = make_gate(router, source, is_first=layer == layers[0], step=self._step)
                self._gates[source, layer] = gate
        self._follows.clear()

    # --- told of a pass ---------------------------------------------------------------------------

    def begin(self, batch: Batch, embedded_TD: Any) -> None:
        last = self._last = self._pass
        seen = self._pass = PassStates(batch, last, self._normalised)
        while self._lessons and self._lessons[0].seen is not last:
            self._lessons.popleft()  # of passes before the last one nothing is held
        self._usage.begin(batch)
        asked = self.sources if self.speculates else (Source.TOKEN_BEFORE,)
        if seen.is_whole and self._guards.turn(asked):
            self._follows.clear()
        if seen.is_foretold and last is not None:
            self._recall(last)
        self._ahead, self._next, self._start = [], [], []
        if embedded_TD is None or self._norm is None or not self.speculates:
            return
        if Source.START not in self.sources or not self._guards.of(Source.START).speaks:
            return
        if seen.begin(np.asarray(embedded_TD), last) and seen.is_whole:
            gates = self._gates
            self._start = [at for at in reversed(self._table.layers) if (Source.START, at) in gates]

    def observe(self, tokens: RoutedTokens) -> None:
        self._usage.observe(tokens)
        seen, layer = self._pass, tokens.layer
        if seen is None or self._norm is None or tokens.residual_TD is None:
            return
        seen.observe(tokens)
        self._queue(seen, layer)
        self._pace.layer_done()
        if self._ahead and self._pace.has_time:
            self.work()

    def end(self, final_TD: Any) -> None:
        self._usage.end()
        self._pace.pass_done()
        if self._pass is not None and final_TD is not None and self._norm is not None:
            self._pass.end(np.asarray(final_TD))

    def candidates(self, layer: int) -> Candidates:
        return likely(self.outlook, layer, at_least=self.threshold or 1.0)

    # --- what was put off -------------------------------------------------------------------------

    def work(self) -> bool:
        seen = self._pass
        if seen is None:
            return False
        if self._ahead:
            with self._pace.forecast():
                source, layer = self._ahead.pop()
                self._say(seen, source, layer, seen.states(self._states_of(source, layer)))
        elif self._next:
            layer = self._next.pop()
            x_nD = seen.states(layer)
            self._say(seen, Source.TOKEN_BEFORE, layer, None if x_nD is None else x_nD[seen.ends_n])
        elif self._start:
            self._say(seen, Source.START, self._start.pop(), seen.start_n2D)
        elif self._lessons:
            self._learn(self._lessons.popleft())
        else:
            return False
        return True

    def _recall(self, last: PassStates) -> None:
        """What the last pass foretold of this one."""
        for (source, at), claim in last.claims.items():
            if source is Source.TOKEN_BEFORE and self._guards.of(source).is_on:
                self.outlook.now[self._table.slice(at)] = claim.said_E

    def _normalised(self, x_nD: Singles) -> Singles:
        assert self._norm is not None, "states before any router was known"
        return normalised(self._norm, x_nD)

    def _states_of(self, source: Source, layer: int) -> int:
        """The layer whose states `source` reads to foretell this one."""
        return self._table.layers[self._index[layer] - source.layers_before]

    def _queue(self, seen: PassStates, layer: int) -> None:
        """What follows from `layer` having routed."""
        follows = self._follows.get(layer)
        if follows is None:
            follows = self._follows[layer] = self._following(layer)
        if seen.is_whole and self.speculates:
            self._ahead = list(follows.ahead)
            self._start = [at for at in self._start if at > layer and at not in follows.better]
        if seen.ends_n is not None and follows.has_next:
            self._next.append(layer)
        sources = follows.sources
        if not self.speculates:  # what is kept goes by the next token, and by nothing else
            sources = [source for source in sources if source is Source.TOKEN_BEFORE]
        self._lessons.extend(_Due(source, layer, seen, self._last) for source in sources)

    def _following(self, layer: int) -> "_Following":
        index, layers, guards = self._index[layer], self._table.layers, self._guards
        speaking = [source for source in self.sources if guards.of(source).speaks]
        ahead = [
            (source, layers[index + source.layers_before])
            for source in reversed(FIXED)
            if source in speaking and index + source.layers_before < len(layers)
        ]
        ahead = [asked for asked in ahead if asked in self._gates]
        sources = [source for source in speaking if (source, layer) in self._gates]
        better = {at for source, at in ahead if guards.of(source).is_on}
        return _Following(ahead, better, Source.TOKEN_BEFORE in sources, sources)

    def _learn(self, due: "_Due") -> None:
        source, layer, seen, last = due
        lesson = seen.lesson(source, layer, self._states_of(source, layer), last)
        if lesson is None:
            return
        gate, scores_nE = self._gates[source, layer], lesson.scores_nE
        logits_nE = None if scores_nE is None else logits_of(gate.routing, scores_nE)
        used_nE = np.zeros((len(lesson.x_nD), self._table.num_experts[layer]), bool)
        used_nE[np.arange(len(used_nE))[:, None], lesson.ids_nA] = True
        if (claim := lesson.claim) is not None:
            self._guards.of(source).add(claim.stood_E, claim.said_E, used_nE.max(0))
        gate.learn(lesson.x_nD, claim and claim.foretold, logits_nE, used_nE)

    def _say(self, seen: PassStates, source: Source, layer: int, x_nD: Singles | None) -> None:
        assert x_nD is not None, "asked of states that were not seen"
        gate, outlook = self._gates[source, layer], self.outlook
        foretold = gate.foretell(x_nD, self._usage.chances(layer) if gate.has_rates else None)
        said_E = np.minimum(1.0 - (1.0 - foretold.said.chances_TE).prod(0), _SURE)
        into = outlook.next if source is Source.TOKEN_BEFORE else outlook.now
        standing_E = into[self._table.slice(layer)]
        seen.claims[source, layer] = Claim(foretold, standing_E.copy(), said_E)
        if self._guards.of(source).is_on:
            standing_E[:] = said_E
            outlook.version += 1


def source_words(forecast: ExpertForecast) -> str:
    """Which sources of a forecast are on and off, for people; empty where all are on, or it has
    none."""
    return forecast.words() if isinstance(forecast, LearnedForecast) else ""


def forecast_bytes(table: ExpertTable, hidden: int, sources: Sequence[Source] = BY_WORTH) -> int:
    """What a forecast holds that foretells from `sources` (none: `SequenceUsage`), at `hidden`
    dimensions: matrices, states and choices of three passes, uses of sequences."""
    held = usage_bytes(table) + gate_bytes(table, hidden, sources)
    if sources:
        of_a_token = (len(table.layers) + 3) * hidden * 4 + (len(sources) + 3) * len(table) * 8
        held += 3 * MOST_TOKENS * of_a_token
    return held


def sources_within(
    table: ExpertTable, hidden: int, limit_bytes: int | None, *, is_fixed: bool = False
) -> tuple[Source, ...]:
    """What fits, without a limit all: the token's start goes first, what is nearest last. A fixed
    gate has one matrix for all of its own."""
    if is_fixed:
        least = forecast_bytes(table, hidden, FIXED[:1])
        return FIXED if limit_bytes is None or least <= limit_bytes else ()
    for count in range(len(BY_WORTH), 0, -1):
        sources = BY_WORTH[:count]
        if limit_bytes is None or forecast_bytes(table, hidden, sources) <= limit_bytes:
            return sources
    return ()

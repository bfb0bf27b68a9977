"""Whether guesses pay: how often they are right, what a row of a pass costs, and windows with and
without them compared. Knows seconds and counts only; all of it decides about speed alone.

A pass of n sequences takes T seconds and gives n tokens. With r guessed rows it takes
T (1 + r c / n) and gives a token more for each guess that is right, so a guess pays where its
chance exceeds c, the marginal cost of a row in tokens of the pass that it joins.
"""

from collections.abc import Sequence

_HALF_LIFE = 16.0  # tokens, of what is known of guesses
_DOUBT = 2.0  # tokens' worth of what is known of other sequences, or of nothing
_PASS_HALF_LIFE = 32.0
_FEW_PASSES = 4  # fewer say nothing
_HELD_UP = 3.0  # times the mean: no pass counts more
WINDOW = 8  # passes that are compared
_MOST_WINDOWS = 128
_FIRST_PATIENCE, _FIRST_TRUST, _SETTLING = 2, 4, 1  # windows
# Break-even chance of a guess where nothing is read, and where passes only wait for reads: replayed
# traces of two trained models with 20 to 50 % of their experts in memory (docs/batch.md).
_COST_IN_MEMORY, _COST_OF_LINK = 0.5, 0.93
_MUCH = 0.85  # of the rate without: a trial ends early
# Share of what a row is believed to cost: with less chance nothing is tried.
_HOPE_IN_MEMORY, _HOPE_OF_LINK = 0.4, 0.8


class Mean:
    """Exponential average."""

    def __init__(self, half_life: float) -> None:
        self._keep = 0.5 ** (1 / half_life)
        self._sum = self.weight = 0.0

    def add(self, value: float) -> None:
        self._sum = self._keep * self._sum + value
        self.weight = self._keep * self.weight + 1.0

    def value(self, doubt: float = 0.0, instead: float = 0.0) -> float:
        """`doubt`: values' worth of `instead`."""
        weight = self.weight + doubt
        return (self._sum + doubt * instead) / weight if weight else instead


class Chances:
    """How often guesses of a sequence are right, by their kind and by how many before them were.
    Begins with what is known of `others`, or with `believed`."""

    def __init__(self, others: "Chances | None" = None, *, believed: float = 0.0) -> None:
        self._others = others
        self._believed = believed
        self._seen: dict[tuple[int, int], Mean] = {}

    def add(self, kind: int, place: int, is_right: bool) -> None:
        self._seen.setdefault((kind, place), Mean(_HALF_LIFE)).add(float(is_right))
        if self._others is not None:
            self._others.add(kind, place, is_right)

    def of(self, kind: int, place: int) -> float:
        """Of the guess at `place`, if all before it are right."""
        before = self._others.of(kind, place) if self._others is not None else self._believed
        seen = self._seen.get((kind, place))
        return before if seen is None else seen.value(_DOUBT, before)

    def together(self, kind: int, count: int) -> list[float]:
        """Chance of each of `count` guesses to be right with all before it."""
        found: list[float] = []
        chance = 1.0
        for place in range(count):
            chance *= self.of(kind, place)
            found.append(chance)
        return found


def most_useful(chances: Sequence[float], cost: float) -> int:
    """How many guesses bring most tokens per second; 0 where all that they bring is lost."""
    best, found, tokens = 1.0, 0, 1.0
    for number, chance in enumerate(chances, start=1):
        tokens += chance
        rate = tokens / (1 + number * cost)
        if rate > best:
            best, found = rate, number
    return found


class RowCost:
    """What a guessed row costs in passes of `sequences` sequences."""

    def __init__(self, sequences: int) -> None:
        self._sequences = sequences
        self._plain, self._with_rows, self._rows, self._waiting = (
            Mean(_PASS_HALF_LIFE) for _ in range(4)
        )

    def add(self, seconds: float, waiting_s: float, rows: int) -> float:
        """A pass with `rows` guesses took `seconds`, of which it waited for weights. What counts of
        them: other programs may have held it up."""
        mean = self._with_rows if rows else self._plain
        if mean.weight >= _FEW_PASSES - 0.5:
            seconds = min(seconds, _HELD_UP * mean.value())
        mean.add(seconds)
        if rows:
            self._rows.add(rows)
        else:
            self._waiting.add(min(seconds, waiting_s))
        return seconds

    @property
    def is_measured(self) -> bool:
        return min(self._plain.weight, self._with_rows.weight) >= _FEW_PASSES - 0.5

    @property
    def expected(self) -> float:
        """Before anything is measured."""
        return self._by_link(_COST_IN_MEMORY, _COST_OF_LINK)

    def _by_link(self, in_memory: float, of_link: float) -> float:
        """Between two values, by the share of passes that waits for the link."""
        plain = self._plain.value()
        waiting = min(1.0, self._waiting.value() / plain) if plain else 0.0
        return in_memory + (of_link - in_memory) * waiting

    def value(self) -> float:
        """In tokens, as measured, else as expected."""
        if not self.is_measured:
            return self.expected
        more = self._with_rows.value() / self._plain.value() - 1
        return max(0.0, more / self._rows.value() * self._sequences)

    @property
    def hoped(self) -> float:
        """The chance below which trying is not worth its cost: what is believed may be wrong, of
        computing more than of reading."""
        return self._by_link(_HOPE_IN_MEMORY, _HOPE_OF_LINK) * min(self.value(), self.expected)


class Guard:
    """Takes turns between windows of passes without and with guesses, and lets the faster have the
    longer ones: guesses that lose come back for one window after 2, 8, 32 ... without; those that
    win are left out after 4, 8, 16 ... with, to be compared again. Only passes count in which
    something could be guessed, and none of the first window after guesses: they may have cost it
    memory."""

    def __init__(self) -> None:
        self.is_on = False
        self.is_trial = True  # the next window with guesses is
        self._left = WINDOW
        self._windows = 1  # in a row until what is on goes off, or comes on
        self._patience, self._trust = _FIRST_PATIENCE, _FIRST_TRUST
        self._is_settling = False
        self._num_rows = 0
        self._seconds = {True: 0.0, False: 0.0}
        self._tokens = {True: 0.0, False: 0.0}

    def add(self, seconds: float, tokens: int, rows: int) -> None:
        """A pass in which something could be guessed; `rows` guesses were computed."""
        if not self._is_settling:
            self._seconds[self.is_on] += seconds
            self._tokens[self.is_on] += tokens
        self._num_rows += rows
        self._left -= 1
        is_hopeless = self._left == WINDOW // 2 and self._is_losing(by=_MUCH)
        if not self._left or (self.is_on and self.is_trial and is_hopeless):
            self._turn()

    def _turn(self) -> None:
        self._left, self._is_settling = WINDOW, False
        self._windows -= 1
        if not self.is_on:
            if not self._windows:
                self.is_on, self._windows = True, 1 if self.is_trial else self._trust
        elif self._is_losing():
            self._rest(self._patience)
            self._patience = min(_MOST_WINDOWS, 4 * self._patience)
            self._trust, self.is_trial = _FIRST_TRUST, True
        elif self.is_trial:
            self._windows, self.is_trial = self._trust, False
        elif not self._windows:
            self._rest(_SETTLING + 1)
            self._patience = _FIRST_PATIENCE
            self._trust = min(_MOST_WINDOWS, 2 * self._trust)
        self._num_rows = 0
        for sums in (self._seconds, self._tokens):  # what is older counts half
            sums[self.is_on] /= 2

    def _rest(self, windows: int) -> None:
        self.is_on, self._windows, self._is_settling = False, windows, True

    def _is_losing(self, *, by: float = 1.0) -> bool:
        """Also where nothing was found worth a guess, so that costs are measured again one day."""
        with_guesses = self._tokens[True] * self._seconds[False]
        without = self._tokens[False] * self._seconds[True]
        return not self._num_rows or with_guesses <= by * without

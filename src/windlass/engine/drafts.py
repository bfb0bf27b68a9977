"""Guesses of what a sequence goes on with, out of its own tokens. Knows no model and no clock."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from windlass.speculative import SpeculativeConfig

_FACTOR = 0x9E3779B1  # of a hash by multiplication (Knuth)
_SMALLEST = 1 << 8  # entries of a table
_ENTRY_BYTES = 4


class Guess(NamedTuple):
    """Tokens that may follow, perhaps none. `kind` tells guesses apart that are right more or less
    often."""

    token_ids: tuple[int, ...]
    kind: int


class Drafter(Protocol):
    """Guesses for one sequence."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """The sequence has grown by these."""
        ...

    def guess(self, count: int) -> Guess:
        """At most `count` tokens that may follow all that are known."""
        ...


class PromptLookup:
    """Proposes what came last time after the last n tokens, of the largest n that has been seen
    (prompt lookup, as vLLM's `ngram`). A guess that reaches the end of what is known goes on with
    itself, as repetitions do.

    For each n a table by hash: where what followed those tokens last begins. An entry that another
    one has overwritten is a guess less (of 100,000 tokens one of five, halfway back); what
    is found is compared with the tokens. Takes `bytes_per_known_token`, and as long as n however
    much is known.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self._orders = range(config.prompt_lookup_max, config.prompt_lookup_min - 1, -1)
        self._tokens = array("i")
        self._tables = {n: array("i", bytes(4 * _SMALLEST)) for n in self._orders}

    def extend(self, token_ids: Sequence[int]) -> None:
        first = len(self._tokens)
        self._tokens.extend(token_ids)
        size = len(self._tables[self._orders[0]])
        if 2 * len(self._tokens) > size:
            while 2 * len(self._tokens) > size:
                size *= 2
            self._tables = {n: array("i", bytes(4 * size)) for n in self._orders}
            first = 0
        for n, table in self._tables.items():
            # what follows n tokens is known when the next one is
            begin = max(n, first)
            if len(self._tokens) - begin > _SMALLEST:
                self._enter_many(n, begin, table)
                continue
            for place in range(begin, len(self._tokens)):
                table[self._hash(place, n, len(table))] = place

    def guess(self, count: int) -> Guess:
        tokens, end = self._tokens, len(self._tokens)
        for n in self._orders:
            if end <= n:
                continue
            table = self._tables[n]
            place = table[self._hash(end, n, len(table))]
            if place >= n and tokens[place - n : place] == tokens[end - n :]:
                found = list(tokens[place : place + count])
                while len(found) < count:
                    found.append(found[place - end])
                return Guess(tuple(found), n)
        return Guess((), 0)

    def _hash(self, end: int, n: int, size: int) -> int:
        """Of the n tokens before `end`."""
        value = 0
        for token in self._tokens[end - n : end]:
            value = ((value ^ token) * _FACTOR) & 0xFFFFFFFF
        return (value >> 8) & (size - 1)

    def _enter_many(self, n: int, begin: int, table: "array[int]") -> None:
        """The same for all places from `begin`, at once; of equal ones the last stays."""
        tokens = np.frombuffer(self._tokens, np.int32).astype(np.uint64)
        num = len(tokens) - begin
        values: NDArray[np.uint64] = np.zeros(num, np.uint64)
        for i in range(n):
            part = tokens[begin - n + i : begin - n + i + num]
            values = ((values ^ part) * np.uint64(_FACTOR)) & np.uint64(0xFFFFFFFF)
        slots = (values >> np.uint64(8)) & np.uint64(len(table) - 1)
        np.frombuffer(table, np.int32)[slots.astype(np.int64)] = np.arange(
            begin, len(tokens), dtype=np.int32
        )


class LayerGuess:
    """Proposes what the model's own layer has guessed after all that is known."""

    def __init__(self) -> None:
        self._guess: tuple[int, ...] = ()

    def extend(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            self._guess = ()

    def hear(self, token_id: int) -> None:
        """The layer's guess."""
        self._guess = (token_id,)

    def guess(self, count: int) -> Guess:
        return Guess(self._guess[:count], 1)


def bytes_per_known_token(config: SpeculativeConfig) -> int:
    """What a drafter keeps of a token at most: of prompt lookup itself, and in each table two to
    four places."""
    if config.method == "mtp":
        return 0
    orders = config.prompt_lookup_max - config.prompt_lookup_min + 1
    return _ENTRY_BYTES * (2 + 4 * orders)  # arrays grow by more than they need

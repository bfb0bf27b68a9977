"""Who watches the server, and what is kept for them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from windlass.engine.expectation import Rates
from windlass.engine.service import Service
from windlass.server.errors import HttpError

_MOST = 8  # pages at once
_KEPT = 0.93  # of the warmth of an expert from one look to the next: half is gone after 5 s
_WARMTHS = 9


@dataclass(slots=True)
class Warmth:
    """How recently experts were used, for one who watches."""

    before: dict[int, list[int]] = field(default_factory=dict)
    warm: dict[int, list[float]] = field(default_factory=dict)

    def look(self, uses: Mapping[int, list[int]]) -> list[str]:
        """A string for each layer, a digit for each expert: 9 is the warmest of all."""
        for layer, counts in uses.items():
            before = self.before.get(layer, counts)
            warm = self.warm.get(layer, [0.0] * len(counts))
            self.warm[layer] = [
                _KEPT * old + (now - then)
                for old, now, then in zip(warm, counts, before, strict=True)
            ]
        self.before = dict(uses)
        most = max((max(row, default=0.0) for row in self.warm.values()), default=0.0) or 1.0
        return [
            "".join(str(round(_WARMTHS * (one / most) ** 0.5)) for one in row)
            for row in self.warm.values()
        ]


class Watchers:
    """Of one server: how many there are, and what the planner expects, asked for once."""

    def __init__(self) -> None:
        self.count = 0
        self._rates: dict[int, Rates | None] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While one watches. Raises HttpError 429 where there are too many."""
        if self.count >= _MOST:
            raise HttpError(
                429, f"stats: got {self.count + 1} streams, allowed {_MOST}",
                code="rate_limit_exceeded", headers={"retry-after": "5"},
            )  # fmt: skip
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    def rates(self, service: Service, running: int) -> Rates | None:
        """For about as many sequences: the next power of two."""
        sequences = 1 << max(0, running - 1).bit_length()
        if sequences not in self._rates:
            self._rates[sequences] = service.rates(sequences)
        return self._rates[sequences]

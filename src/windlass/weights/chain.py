"""Parts that come from the tier below: a fetch borrows its part there for as long as it is copied.
Knows caches and tickets, no bytes; a clock could use it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic

from windlass.ids import Route, WeightKey
from windlass.weights.cache import WeightCache
from windlass.weights.demand import Demand
from windlass.weights.io_queue import B, IoQueue, Priority, Ticket
from windlass.weights.residency import Entry


class _Fetch(Generic[B]):
    """Of one part."""

    __slots__ = ("pieces", "demand", "ticket", "lent")

    def __init__(self, pieces: Callable[[Entry], Sequence[B]]) -> None:
        self.pieces = pieces
        self.demand = Demand()  # below, as long as the part is not there
        self.ticket: Ticket[B] | None = None
        self.lent: Entry | None = None

    def borrow(self, entry: Entry) -> Sequence[B]:
        """What is to be moved of its part, leased below as `entry`."""
        self.lent = entry
        entry.lent += 1
        return self.pieces(entry)


class Chain(Generic[B]):
    """The way from the cache `below` along `route` of the queue that both tiers share, so that one
    lock guards both. All calls under it.

    Who fetches has its own slot already, and a slot below is lent only while it is copied, which
    ends by itself: so the tier below never waits for this one, and one slot of it is enough. A
    fetch that is cancelled before its part has come ends the demand below.
    """

    def __init__(self, below: WeightCache, queue: IoQueue[B], route: Route) -> None:
        self.below = below
        self.route = route
        self._queue = queue
        self._waiting: dict[WeightKey, _Fetch[B]] = {}  # for their parts
        below.feed.tell(self._came)

    def fetch(
        self,
        key: WeightKey,
        pieces: Callable[[Entry], Sequence[B]],
        *,
        priority: Priority,
        on_done: Callable[[], None],
    ) -> Ticket[B]:
        """Begins to copy `key`, demanding it below where it is not there. `pieces`: what is to be
        moved, from where it lies then."""
        fetch = _Fetch(pieces)
        done = partial(self._ended, key, fetch, on_done)
        entry = self.below.take_resident(key, to_copy=True)
        if entry is not None:
            ready = fetch.borrow(entry)
            return self._queue.enqueue(self.route, ready, priority=priority, on_done=done)
        assert priority is Priority.DEMAND, f"{key}: a hint was not to come before its part"
        fetch.demand = self.below.begin((key,), settles=False)
        fetch.ticket = self._queue.reserve(self.route, priority=priority, on_done=done)
        self._waiting[key] = fetch
        return fetch.ticket

    def check(self) -> None:
        """What waits for a part below is demanded there, and the part has not come."""
        for key, fetch in self._waiting.items():
            assert fetch.lent is None and not fetch.demand.is_over, f"{key}: lost below"
            assert not self.below.feed.has(key), f"{key}: came below, and was not copied"

    def _came(self, key: WeightKey) -> None:
        """`key` is resident below."""
        fetch = self._waiting.pop(key, None)
        if fetch is None:
            return
        # somebody else's read may have brought it before the demand had a slot
        (entry,) = self.below.ready(fetch.demand, 1, to_copy=True) or (
            self.below.take_resident(key, to_copy=True),
        )
        assert entry is not None and fetch.ticket is not None, f"{key}: said to be there"
        self.below.abandon(fetch.demand)
        self._queue.supply(fetch.ticket, fetch.borrow(entry))

    def _ended(self, key: WeightKey, fetch: _Fetch[B], on_done: Callable[[], None]) -> None:
        if fetch.lent is None:
            del self._waiting[key]
        on_done()  # first: what comes back below is known to be here
        if fetch.lent is None:
            self.below.abandon(fetch.demand)
        else:
            fetch.lent.lent -= 1
            self.below.release((fetch.lent,))

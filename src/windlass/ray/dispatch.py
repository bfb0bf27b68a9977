"""Who gets which rows. Knows no cluster, no clock of its own and no results: only which rows wait,
who has which, and how many each has finished."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from windlass.batch.jobfile import JobRow
from windlass.ray.begins import Begins

_MOST_WAITING = 4096  # rows read ahead, at most
_MOST_WAITING_BYTES = 64 << 20  # of long rows among them
_CHUNK = 64  # rows read at a time
_MOST_OWNED = 100_000  # beginnings whose owner is remembered


@dataclass(slots=True, eq=False)
class _Hand:
    """What one replica has. `done`, `busy_s`: rows that it has finished, and in how long."""

    window: int
    flying: dict[int, JobRow] = field(default_factory=dict)  # without bodies, by index
    done: int = 0
    busy_s: float = 0.0

    @property
    def rate(self) -> float | None:
        return self.done / self.busy_s if self.done and self.busy_s > 0 else None


class Dispatch:
    """Gives `rows`, `num_rows` in all, to replicas that join and leave, named by numbers. `again`:
    the rows of these indices once more, with their bodies, which nobody holds while a replica has
    them.

    A row is with one replica at a time, and ends once. A replica gets at most its window; near the
    end its share of what is left by its speed, so that all end together. Rows that begin alike go
    to who had such a row before, unless somebody would have none.
    """

    def __init__(
        self,
        rows: Iterator[JobRow],
        num_rows: int,
        again: Callable[[Sequence[int]], list[JobRow]],
    ) -> None:
        self._rows = rows
        self._again = again
        self._left = num_rows  # without a result
        self._waiting = _Waiting()
        self._hands: dict[int, _Hand] = {}

    @property
    def num_left(self) -> int:
        return self._left

    def join(self, name: int, window: int) -> None:
        """`window`: rows that keep it busy, twice as many as it runs at once."""
        self._hands[name] = _Hand(window)

    def leave(self, name: int) -> int:
        """Its rows wait again; how many they are."""
        hand = self._hands.pop(name)
        if hand.flying:
            self._waiting.add(self._again(sorted(hand.flying)), first=True)
        self._waiting.disown(name)
        return len(hand.flying)

    def num_flying(self, name: int) -> int:
        return len(self._hands[name].flying)

    def next_rows(self, name: int) -> list[JobRow]:
        """What it is to get now."""
        hand = self._hands[name]
        found: list[JobRow] = []
        most = self._allowed(hand)
        while len(hand.flying) < most and (row := self._next(name)) is not None:
            hand.flying[row.index] = JobRow(row.index, row.line, row.digest, row.custom_id)
            found.append(row)
        return found

    def end(self, name: int, index: int) -> JobRow | None:
        """A row of its that has ended; None of one that it does not have."""
        hand = self._hands[name]
        row = hand.flying.pop(index, None)
        if row is not None:
            hand.done += 1
            self._left -= 1
        return row

    def spend(self, name: int, seconds: float) -> None:
        """It had rows for so long."""
        self._hands[name].busy_s += seconds

    def _allowed(self, hand: _Hand) -> int:
        rates = [one.rate for one in self._hands.values()]
        known = [rate for rate in rates if rate is not None]
        if hand.rate is None:
            # until it has shown how fast it is: half of an even share, and what it runs at once
            window, share = hand.window // 2, 0.5 / len(self._hands)
        else:
            mean = sum(known) / len(known)
            total = sum(mean if rate is None else rate for rate in rates)
            window, share = hand.window, hand.rate / total
        return max(1, min(window, -int(-self._left * share // 1)))

    def _next(self, name: int) -> JobRow | None:
        while self._waiting.has_room:
            # read in chunks: the beginnings of neighbours are compared
            if not (chunk := list(islice(self._rows, _CHUNK))):
                break
            self._waiting.add(chunk)
        return self._waiting.take(name)


class _Waiting:
    """Rows that nobody has, in queues of those that begin alike."""

    def __init__(self) -> None:
        self._begins = Begins()
        self._queues: dict[bytes, deque[JobRow]] = {}
        self._owners: dict[bytes, int] = {}
        self._owned: dict[int, dict[bytes, None]] = {}  # of each owner, its queues with rows
        self._free: dict[bytes, None] = {}  # queues with rows that nobody owns
        self._num_rows = self._num_bytes = 0

    @property
    def has_room(self) -> bool:
        return self._num_rows < _MOST_WAITING and self._num_bytes < _MOST_WAITING_BYTES

    def add(self, rows: Sequence[JobRow], *, first: bool = False) -> None:
        """`first`: before those of the same beginning."""
        for row, name in zip(rows, self._begins.names(rows), strict=True):
            queue = self._queues.get(name)
            if queue is None:
                queue = self._queues[name] = deque()
                owner = self._owners.get(name)
                owned = self._free if owner is None else self._owned.setdefault(owner, {})
                owned[name] = None
            if first:
                queue.appendleft(row)
            else:
                queue.append(row)
            self._num_rows += 1
            self._num_bytes += _long_bytes(row)

    def take(self, taker: int) -> JobRow | None:
        """A row of a queue that it owns, else of one that nobody does and that it owns from now on,
        else of somebody else's."""
        mine, theirs = self._owned.get(taker), next(filter(None, self._owned.values()), None)
        for names in (mine, self._free, theirs):
            if names:
                name = next(iter(names))
                if names is self._free:
                    self._own(name, taker)
                return self._pop(name)
        return None

    def disown(self, owner: int) -> None:
        """Its queues are nobody's."""
        self._owners = {name: one for name, one in self._owners.items() if one != owner}
        self._free.update(self._owned.pop(owner, {}))

    def _own(self, name: bytes, owner: int) -> None:
        if len(self._owners) >= _MOST_OWNED:
            for old in list(islice(self._owners, _MOST_OWNED // 2)):
                if old not in self._queues:
                    del self._owners[old]
        self._owners[name] = owner
        del self._free[name]
        self._owned.setdefault(owner, {})[name] = None

    def _pop(self, name: bytes) -> JobRow:
        queue = self._queues[name]
        row = queue.popleft()
        if not queue:
            del self._queues[name]
            owner = self._owners.get(name)
            del (self._free if owner is None else self._owned[owner])[name]
        self._num_rows -= 1
        self._num_bytes -= _long_bytes(row)
        return row


def _long_bytes(row: JobRow) -> int:
    return 0 if row.long is None else row.long.body_bytes

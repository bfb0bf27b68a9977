"""What waits to be admitted, and who is next. Knows no memory."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from itertools import islice

from windlass.engine.request import WINDOW, Request
from windlass.engine.sequence import QueuedSequence, Sequence
from windlass.ids import Home
from windlass.kvcache.pages import num_alike

_LOOKED_AT = 16  # of those that find no pages in a pass, before the rest are left for the next


class WaitingQueue:
    """Newcomers in the order they came, behind sequences that were preempted: those return first
    and in the order of age. Those of batches are behind all others, in the same order among
    themselves. `most`: sequences that may run at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: deque[QueuedSequence | Sequence] = deque()
        self._last_keys: tuple[bytes, ...] = ()  # of the prompt that was taken last
        self._num_passed_over = 0  # times in a row that the first in the queue was
        self.num_batch = 0  # of those who wait

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[QueuedSequence | Sequence]:
        return iter(self._waiting)

    @property
    def is_batch(self) -> bool:
        """Whether only batches have something left that waits."""
        return self.num_batch == len(self._waiting)

    def add(self, queued: QueuedSequence) -> None:
        place = len(self._waiting) - (0 if queued.is_batch else self.num_batch)
        self._waiting.insert(place, queued)
        self.num_batch += queued.is_batch

    def put_back(self, sequence: Sequence) -> None:
        """A sequence that was preempted; of several the youngest comes first."""
        place = len(self._waiting) - self.num_batch if sequence.is_batch else 0
        self._waiting.insert(place, sequence)
        self.num_batch += sequence.is_batch

    def drop(self, request: Request) -> None:
        """Forgets all sequences of `request`."""
        self._waiting = deque(one for one in self._waiting if one.request is not request)
        self.num_batch = sum(one.is_batch for one in self._waiting)

    def next(
        self, full: Collection[Home] = (), without: Collection[QueuedSequence | Sequence] = ()
    ) -> int | None:
        """Place in the queue of what is admitted next, of those whose home is not `full` and who
        are not among `without`: the first, or the first of those that begin most like the last that
        was admitted, so that fewer prefixes are held at once. What was preempted is not passed
        over, nothing is more often than there are places for sequences. None where nobody is
        left."""
        keys = self._last_keys
        is_due = self._num_passed_over >= self._most
        first: int | None = None
        most = 0
        # nobody of a batch is looked at while others wait
        many = len(self._waiting) - self.num_batch or self.num_batch
        for place, one in enumerate(islice(self._waiting, many)):
            if one.queued.home in full or one in without:
                continue
            if first is None:
                found = first = place
                if not keys or is_due or isinstance(one, Sequence):
                    break
            if place >= first + WINDOW * self._most:
                break
            alike = num_alike(keys, one.queued.block_keys)
            if alike > most:
                found, most = place, alike
        return None if first is None else found

    def __getitem__(self, place: int) -> QueuedSequence | Sequence:
        return self._waiting[place]

    def first_like(self, place: int) -> QueuedSequence | Sequence:
        """The first in the queue of the home of what waits at `place`."""
        home = self._waiting[place].queued.home
        return next(one for one in self._waiting if one.queued.home is home)

    def take(self, place: int) -> None:
        """What waits at `place` is admitted."""
        self._last_keys = self._waiting[place].queued.block_keys
        self._num_passed_over = self._num_passed_over + 1 if place else 0
        self.num_batch -= self._waiting[place].is_batch
        del self._waiting[place]


class Passing:
    """Lets newcomers by one that waits for pages, where there are enough for them. Those that pass
    the first of a home may together have so many tokens, prompts and answers, as that home has
    positions (`tokens`; nobody passes where that is empty): then nobody does until it is admitted,
    so it waits for no more than they take. Nobody passes what was preempted, which would not come
    to its end else, and no batch passes: its order is that of its file."""

    def __init__(self, tokens: Mapping[Home, int]) -> None:
        self._most = tokens
        self._passed: dict[Home, tuple[QueuedSequence, int]] = {}  # the first, tokens by it
        self.blocked: set[QueuedSequence | Sequence] = set()  # that found no pages in this pass

    def begin(self) -> None:
        """Another pass."""
        self.blocked.clear()

    def wait(self, one: QueuedSequence | Sequence) -> bool:
        """`one` found no pages; whether others of its home may be looked at."""
        self.blocked.add(one)
        can_pass = isinstance(one, QueuedSequence) and not one.is_batch
        return bool(self._most) and can_pass and len(self.blocked) < _LOOKED_AT

    def may(self, first: QueuedSequence | Sequence, one: QueuedSequence | Sequence) -> bool:
        """Whether `one` may be admitted before `first`, which is the first of its home."""
        return first not in self.blocked or self._after(first, one) <= self._most[one.queued.home]

    def admitted(self, first: QueuedSequence | Sequence, one: QueuedSequence | Sequence) -> None:
        """`one` was."""
        if first in self.blocked:
            self._passed[one.queued.home] = first.queued, self._after(first, one)

    def _after(self, first: QueuedSequence | Sequence, one: QueuedSequence | Sequence) -> int:
        passed, tokens = self._passed.get(one.queued.home, (first, 0))
        return one.max_total + (tokens if passed is first else 0)

"""Rounds of attention whose keys and values come to the device for it: consecutive sequences of a
micro-batch whose pages have room there together. Which pages they want, and where these are put.
Knows numbers, no memory; the clock uses it too."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from windlass.models.spec import Gqa, Mla, ModelSpec
from windlass.schedule.batch import MicroBatch, Segment
from windlass.units import MIB

Wait = Callable[[], None]
_HALF_BYTES = 64 * MIB  # 5 ms of a link of 12 GB/s


class Run(NamedTuple):
    """Pages side by side, and the slots side by side that they have on the device."""

    page: int
    slot: int
    num_pages: int


class Round(NamedTuple):
    """Rows of a micro-batch, and whose they are."""

    first_row: int
    num_rows: int
    segments: tuple[Segment, ...]


def half_pages(bytes_per_token: int, page_tokens: int, context: int) -> int:
    """Pages that one of the two places on the device has (kvcache/staging.py): those of a sequence
    of `context` tokens, or of several. `bytes_per_token`: in such a place."""
    usual = _HALF_BYTES // max(1, page_tokens * bytes_per_token)
    return max(usual, -(-context // page_tokens) + 1)  # guesses may be behind the end


def half_bytes(bytes_per_token: int, page_tokens: int, context: int) -> int:
    """What such a place takes, with a page of zeros."""
    pages = 1 + half_pages(bytes_per_token, page_tokens, context)
    return pages * page_tokens * bytes_per_token + MIB


def windows_of(spec: ModelSpec) -> dict[int, int | None]:
    """Layers that keep keys and values: positions that a row sees there, None: all."""
    found = {layer: block.attention for layer, block in enumerate(spec.blocks)}
    return {
        layer: one.window if isinstance(one, Gqa) else None
        for layer, one in found.items()
        if isinstance(one, Gqa | Mla)
    }


def num_pages(segment: Segment, page_tokens: int) -> int:
    """That its rows see."""
    return -(-(segment.first_position + segment.num_tokens) // page_tokens)


def read_pages(segment: Segment, page_tokens: int, window: int | None) -> range:
    """Which of its pages have something that rows of the segment see and did not write."""
    first = segment.first_position
    oldest = 0 if window is None else max(0, first - window + 1)
    return range(oldest // page_tokens, -(-first // page_tokens))


def rounds_of(rows: MicroBatch, page_tokens: int, most: int) -> list[Round]:
    """As few as can be, each of at most `most` pages, or of one sequence."""
    found: list[Round] = []
    first_row = pages = count = 0
    held: list[Segment] = []
    for segment in rows.segments:
        own = num_pages(segment, page_tokens)
        if held and pages + own > most:
            found.append(Round(first_row, count, tuple(held)))
            first_row, pages, count, held = first_row + count, 0, 0, []
        held.append(segment)
        pages, count = pages + own, count + segment.num_tokens
    return [*found, Round(first_row, count, tuple(held))]


class Staged:
    """Where the pages of a round are on the device: of each a slot, the same in all layers. Slots
    of pages that nobody reads, and of none, are `nowhere`."""

    def __init__(self, one: Round, page_tokens: int, nowhere: int) -> None:
        self._segments = one.segments
        self._page_tokens = page_tokens
        self._nowhere = nowhere
        self._slots: dict[int, int] = {}
        fresh: set[int] = set()
        written: dict[int, None] = {}
        for segment in one.segments:
            for i in range(num_pages(segment, page_tokens)):
                page = segment.pages[i]
                self._slots.setdefault(page, len(self._slots))
                if i >= segment.first_position // page_tokens:
                    written[page] = None
                if i * page_tokens >= segment.first_position:
                    fresh.add(page)
        self._fresh = fresh
        self.written = written.keys()  # pages that rows of the round are written to

    @property
    def fresh(self) -> list[int]:
        """Slots of pages that have nothing yet."""
        return [slot for page, slot in self._slots.items() if page in self._fresh]

    def back(self) -> list[Run]:
        """What the round has written."""
        return self._runs(self.written)

    def wanted(self, window: int | None, late: Collection[int]) -> tuple[list[Run], list[Run]]:
        """What comes from the host for layers of such a window: what may come at any time, and what
        earlier rounds, which have written the pages `late`, must have sent back before."""
        pages = {
            segment.pages[i]: None
            for segment in self._segments
            for i in read_pages(segment, self._page_tokens, window)
        }
        some = [page for page in pages if page not in self._fresh]
        return (
            self._runs(page for page in some if page not in late),
            self._runs(page for page in some if page in late),
        )

    def table(self, window: int | None) -> list[tuple[int, ...]]:
        """Slots of each sequence's pages, oldest first."""
        found = []
        for segment in self._segments:
            first = read_pages(segment, self._page_tokens, window).start
            pages = segment.pages[first : num_pages(segment, self._page_tokens)]
            found.append((self._nowhere,) * first + tuple(self._slots[page] for page in pages))
        return found

    def places(self) -> tuple[list[int], list[int]]:
        """Slot, and offset in it, of each row."""
        at = [
            (self._slots[segment.pages[position // self._page_tokens]], position)
            for segment in self._segments
            for position in range(
                segment.first_position, segment.first_position + segment.num_tokens
            )
        ]
        return [slot for slot, _ in at], [position % self._page_tokens for _, position in at]

    def _runs(self, pages: Iterable[int]) -> list[Run]:
        runs: list[Run] = []
        for page in sorted(pages, key=self._slots.__getitem__):
            slot = self._slots[page]
            last = runs[-1] if runs else Run(-1, -1, 0)
            if (page, slot) == (last.page + last.num_pages, last.slot + last.num_pages):
                runs[-1] = last._replace(num_pages=last.num_pages + 1)
            else:
                runs.append(Run(page, slot, 1))
        return runs


class Ahead:
    """What a pass will want, one after the other: while one is used the next is on its way."""

    def __init__(self) -> None:
        self._todo: deque[Callable[[], Wait]] = deque()
        self._begun: deque[Wait] = deque()

    def begin(self, todo: Sequence[Callable[[], Wait]]) -> None:
        """Each of `todo` begins something, and returns what waits for it. The first begins now."""
        self._todo, self._begun = deque(todo), deque()
        self._next()

    def take(self) -> None:
        """The next begins; returns when the one before it, which is wanted now, is there."""
        self._next()
        self._begun.popleft()()

    def _next(self) -> None:
        if self._todo:
            self._begun.append(self._todo.popleft()())

"""Which rows the next pass computes: admission by key/value pages. Knows counts, no tensors.

Decode rows of running sequences go first, at least one of each whose turn it is (all, or one of
few: `engine/bursts.py`; who waits keeps its pages), and guesses of what follows
(`engine/drafting.py`) as far as nobody gives way for them, then chunks of prompts fill the
pass up to its row limit, the oldest first; a waiting sequence joins as soon as pages for its prompt
are free, those that begin alike one after the other. They share pages (`engine/prompt_pages.py`):
the first to come computes them, those behind it in the same pass or later ones read them. Pages
grow with the sequence; when none is left, the youngest sequence gives its pages back and is later
computed again from its tokens, which gives the same bits (prompt rows as prompt rows, generated
rows as generated rows). The oldest sequence never gives way while there is a younger one, and what
gave way returns first and in the order of age: the oldest comes to its end whatever the others do,
so all do. Where somebody waits for each answer, small newcomers pass one that waits for pages, as
far as `Passing` has it. Where sequences have several homes (`kvcache/kv_tiers.py`) each has pages
of its own, and all this holds within it; a home without room does not hold up the other.

Sequences of batches come behind all others, however old: they have the rows that those leave of a
pass, none begins while another waits, and where a place, a page or a state is wanting the youngest
of them gives way in the same pass. No row of theirs is in it yet then, so they can.
"""

from collections import Counter
from collections.abc import Iterable
from enum import Enum
from itertools import islice
from typing import NamedTuple, Protocol

from windlass.engine.answer_lengths import OutputLengths
from windlass.engine.bursts import Turns
from windlass.engine.drafting import Drafting
from windlass.engine.pace import Pace
from windlass.engine.prompt_pages import Known, PromptPages
from windlass.engine.request import Request
from windlass.engine.rows import ScheduledSequence, add_prompt, generated_row, with_drafts
from windlass.engine.sequence import QueuedSequence, Sequence
from windlass.engine.waiting_queue import Passing, WaitingQueue
from windlass.ids import Home
from windlass.kvcache.kv_tiers import KvTiers
from windlass.schedule.batch import CHUNK_TOKENS, fitting_rows, most_drafts

_PLACES = (Home.HOST, Home.DEVICE, Home.STREAMED)  # of rows in a pass


class Starts(Protocol):
    """Makes sequences of what leaves the queue."""

    def start(self, queued: QueuedSequence) -> Sequence: ...


class Decoding(NamedTuple):
    """Who decodes in a pass, what is guessed of what they go on with, and how many rows of prompts
    there are beside; None for all that there is room for. `keeps_answers`: for the next turn of a
    chat (`engine/prompt_pages.py`)."""

    turns: Turns
    drafting: Drafting | None = None
    pace: Pace | None = None
    keeps_answers: bool = False


class Lack(Enum):
    """What a newcomer waits for."""

    ROWS, PLACE, PAGES = range(3)


class Admission:
    """Owns the waiting and running sequences and their pages."""

    def __init__(
        self,
        kv: KvTiers,
        *,
        max_num_seqs: int,
        max_rows: int,
        long_rope_after: int | None,
        mixed_prefill_rows: int | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        """`long_rope_after`: sequences that may outgrow this many tokens use LongRoPE's long
        factors; None for other models. `mixed_prefill_rows`: prompt rows of a pass in which
        sequences decode, at most; None for no bound, 0 for waves: all prompts that there are pages
        for, then decoding to the last end. `decoding`: all in every pass, without guesses, if
        None."""
        assert max_rows >= max_num_seqs + CHUNK_TOKENS, "a pass must hold all sequences and a chunk"
        self._kv = kv
        self._max_num_seqs = max_num_seqs
        self._max_rows = max_rows
        self._mixed_prefill_rows = mixed_prefill_rows
        self.turns, self._drafting, self.pace, keeps = decoding or Decoding(Turns())
        self._most_drafts = most_drafts(max_num_seqs, self._drafting.most if self._drafting else 0)
        self.lengths = OutputLengths()
        self._is_filling = False  # a wave takes in prompts
        self.prompt_pages = PromptPages(kv, long_rope_after, keeps_answers=keeps)
        self.waiting = WaitingQueue(max_num_seqs)
        # where nobody waits for an answer the order is that of the requests
        self._passing = Passing({} if self.pace is None else kv.num_positions)
        self.running: list[Sequence] = []  # oldest first, those of batches behind the others
        self.num_preemptions = 0
        self._num_begun = 0

    @property
    def num_held_pages(self) -> dict[Home, int]:
        """Pages in use, by home."""
        return self._kv.num_held_pages

    def add(self, queued: QueuedSequence) -> None:
        self.waiting.add(queued)

    def remove(self, sequence: Sequence) -> None:
        """A running sequence has ended; its pages are free at once."""
        self.running.remove(sequence)
        self.prompt_pages.end(sequence)
        self._release(sequence)

    def drop(self, request: Request) -> None:
        """Forgets all sequences of `request`, running or waiting."""
        for sequence in [sequence for sequence in self.running if sequence.request is request]:
            self.remove(sequence)
        self.waiting.drop(request)

    def restart(self) -> None:
        """After a pass that failed: nothing of it counts, and all that run are computed again."""
        while self.running:
            self._preempt(self.running[-1])
        self.prompt_pages.forget_all()

    def compose(self, starts: Starts) -> list[ScheduledSequence]:
        """The rows of the next pass, those of the host first, so that it begins; empty only when
        there is nothing to do. `starts` makes the sequences of what is taken from the queue."""
        return sorted(self._compose(starts), key=_place)

    def _compose(self, starts: Starts) -> list[ScheduledSequence]:
        rows: list[ScheduledSequence] = []
        if self._mixed_prefill_rows == 0:
            only_batch = not self.running or self.running[0].is_batch
            self._is_filling |= not self.running or (only_batch and not self.waiting.is_batch)
            if self._is_filling:
                used = self._add_prompts(starts, self._max_rows, rows, is_batch=False)
                if used or only_batch:  # else those that are there do not wait for a batch's
                    self._add_prompts(starts, self._max_rows - used, rows, is_batch=True)
                self._is_filling = bool(rows)
            if rows:
                return rows
        decoding: list[Sequence] = []
        while not decoding and (able := {c.number: c for c in self.running if not c.in_prompt}):
            turn = self.turns.choose(list(able), [i for i, c in able.items() if not c.is_batch])
            # oldest first, at the cost of the youngest, which is in its prompt from then on
            decoding = [c for c in map(able.get, turn) if c and not c.in_prompt and self._grow(c)]
        room, mixed = self._max_rows, self._mixed_prefill_rows
        prompt_room = room if mixed is None or not decoding else mixed
        for is_batch in (False, True):
            # a newcomer may have driven some out
            mine = [c for c in decoding if c.is_batch == is_batch and not c.in_prompt][:room]
            for following, sequence in zip(range(len(mine))[::-1], mine, strict=True):
                rows.append(self._generated(sequence, room - following))  # a row for each to follow
                room -= rows[-1].segment.num_tokens
            paced = min(room, prompt_room)
            if self.pace is not None:
                newcomers = islice(self.waiting, self._max_num_seqs - len(self.running))
                wanted = _wanted((*self.running, *newcomers), is_batch=is_batch)
                paced = self.pace.split(wanted, paced, is_alone=not rows)
            used = self._add_prompts(starts, paced, rows, is_batch=is_batch)
            room, prompt_room = room - used, (paced if used else prompt_room) - used
        return rows

    def _add_prompts(
        self, starts: Starts, room: int, rows: list[ScheduledSequence], *, is_batch: bool
    ) -> int:
        """Prompt rows of those that run, then of newcomers; returns their number."""
        left = room
        for sequence in self.running:
            if sequence.in_prompt and sequence.is_batch == is_batch:
                left -= self._add_prompt(sequence, left, rows)
        full: set[Home] = set()
        passing = self._passing
        passing.begin()
        while left > 0 and self.waiting.is_batch == is_batch:
            if (place := self.waiting.next(full, passing.blocked)) is None:
                break
            newcomer, first = self.waiting[place], self.waiting.first_like(place)
            known = self._make_room(newcomer, left) if passing.may(first, newcomer) else Lack.PAGES
            if isinstance(known, Lack):
                if known is not Lack.PAGES or not passing.wait(newcomer):
                    full.add(newcomer.queued.home)
                continue
            self.waiting.take(place)
            passing.admitted(first, newcomer)
            sequence = starts.start(newcomer) if isinstance(newcomer, QueuedSequence) else newcomer
            self._admit(sequence, known)
            left -= self._add_prompt(sequence, left, rows)
        return room - left

    def _make_room(self, newcomer: QueuedSequence | Sequence, room: int) -> Known | Lack:
        """What is known of its prompt, if it may begin now, else what it lacks. Batches
        give way, youngest first."""
        while True:
            known = self.prompt_pages.find(newcomer.queued)
            left = newcomer.queued.num_tokens - self.prompt_pages.num_ready(newcomer.queued, known)
            if not fitting_rows(left, room):
                return Lack.ROWS
            has_seat = len(self.running) < self._max_num_seqs and self._kv.device.has_free_state
            held = self.prompt_pages.num_held(known)
            if has_seat and _fits(self._kv, self.lengths, self.running, newcomer, held):
                return known
            last = _last_of_batch(self.running, None if not has_seat else newcomer.queued.home)
            if newcomer.is_batch or last is None:
                return Lack.PAGES if has_seat else Lack.PLACE
            self._preempt(last)

    def _admit(self, sequence: Sequence, known: Known) -> None:
        self.prompt_pages.take(sequence, known)
        sequence.state_slot = self._kv.device.take_state()
        if sequence.number < 0:  # it has not run before
            sequence.number, self._num_begun = self._num_begun, self._num_begun + 1
        others = sum(not one.is_batch for one in self.running)
        self.running.insert(len(self.running) if sequence.is_batch else others, sequence)

    def _grow(self, sequence: Sequence) -> bool:
        """Pages for all of the sequence's tokens, at the cost of younger ones; False if it had to
        give way itself."""
        kv = self._kv.of(sequence.home)
        missing = kv.pages_for(sequence.num_tokens) - len(sequence.pages)
        while missing > kv.num_free_pages:
            youngest = next(one for one in reversed(self.running) if one.home is sequence.home)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        if missing > 0:
            sequence.pages.extend(kv.take_pages(missing))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        self.waiting.put_back(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        if self._drafting is not None:
            self._drafting.forget(sequence)
        self._kv.of(sequence.home).give_pages(sequence.pages)
        self._kv.device.give_state(sequence.state_slot)
        sequence.pages, sequence.state_slot = [], -1

    def _generated(self, sequence: Sequence, room: int) -> ScheduledSequence:
        """Rows of generated tokens: one, or several after a preemption, and drafted ones."""
        row = generated_row(self.prompt_pages, sequence, room)
        if self._drafting is None or not row.segment.wants_logits:
            return row
        # nobody gives way for a guess: there is still a chunk for prompts, a page for each
        most = min(
            room - row.segment.num_tokens - CHUNK_TOKENS, self._most_drafts // len(self.running)
        )
        drafts = self._drafting.propose(sequence)[: max(0, most)]
        return with_drafts(row, drafts, self._kv.of(sequence.home), len(self.running))

    def _add_prompt(self, sequence: Sequence, room: int, rows: list[ScheduledSequence]) -> int:
        room = room if self.pace is None else min(room, self.pace.share)
        return add_prompt(self.prompt_pages, sequence, room, rows)

    def check(self) -> None:
        """Pages are held by running sequences only, by several only where prompts agree."""
        _check(self._kv, self.prompt_pages, self.running, self.waiting)


def _last_of_batch(running: list[Sequence], home: Home | None) -> Sequence | None:
    """The youngest sequence of a batch, with that home if one is named."""
    own = (c for c in reversed(running) if c.is_batch and home in (None, c.home))
    return next(own, None)


def _place(row: ScheduledSequence) -> tuple[int, bool]:
    """Of a row in its pass: by home, then what is generated before prompts. Keys and values come to
    the device while it attends to its own."""
    return _PLACES.index(row.sequence.home), row.segment.is_prompt


def _fits(
    kv: KvTiers,
    lengths: OutputLengths,
    running: list[Sequence],
    newcomer: QueuedSequence | Sequence,
    num_held: int,
) -> bool:
    """Whether there are pages for a newcomer, of which others hold `num_held` already."""
    home = newcomer.queued.home
    needed = kv.pages_for(min(newcomer.num_tokens + 1, newcomer.max_total - 1)) - num_held
    own = [c for c in running if c.home is home and (newcomer.is_batch or not c.is_batch)]
    kept = sum(may_want(kv, lengths, one) for one in own)
    return needed + kept <= kv.of(home).num_free_pages


def _check(
    kv: KvTiers, prompt_pages: PromptPages, running: list[Sequence], waiting: WaitingQueue
) -> None:
    held = {home: Counter[int]() for home in Home}
    for sequence in running:
        held[sequence.home].update(sequence.pages)
    kv.check(held)
    for sequence in running:
        assert len(set(sequence.pages)) == len(sequence.pages), "a sequence has a page twice"
        prompt_pages.check(sequence)
    assert all(isinstance(one, QueuedSequence) or not one.pages for one in waiting), (
        "a waiting sequence holds pages"
    )
    for ranks in ([one.is_batch for one in running], [one.is_batch for one in waiting]):
        assert ranks == sorted(ranks), "a batch is before others"
    assert sum(one.is_batch for one in waiting) == waiting.num_batch, "miscounted"


def _wanted(prompts: Iterable[Sequence | QueuedSequence], *, is_batch: bool) -> list[int]:
    """Rows of prompts that are still to be computed, a number for each: those of batches, or the
    others."""
    own = (one for one in prompts if one.is_batch == is_batch)
    left = (one.num_tokens if isinstance(one, QueuedSequence) else _left(one) for one in own)
    return [rows for rows in left if rows]


def _left(sequence: Sequence) -> int:
    return max(0, sequence.num_prompt - sequence.num_computed)


def may_want(kv: KvTiers, lengths: OutputLengths, sequence: Sequence) -> float:
    """Pages kept free for a running sequence, so that a newcomer does not drive it out at once:
    those it lacks now, else one as far as it is likely to want it. To keep all that it may grow to
    saves preemptions and costs more passes (docs/experiments/0008-free-pages.md)."""
    held = len(sequence.pages)
    lacking = max(0, kv.pages_for(sequence.num_tokens) - held)  # drafts may hold one more
    most = kv.pages_for(sequence.max_total - 1) - held
    if lacking > 0 or not most:
        return min(lacking, most)
    # the last token of an answer is never computed
    fitting = held * kv.page_tokens - sequence.num_prompt + 1
    return lengths.chance(
        fitting, after=len(sequence.output_ids), max_output=sequence.queued.max_output
    )

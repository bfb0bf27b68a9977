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
so all do. Where sequences have several homes (`kvcache/kv_tiers.py`) each has pages of its own, and
all this holds within it; a home without room does not hold up the other.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, Protocol

from windlass.engine.answer_lengths import OutputLengths
from windlass.engine.bursts import Turns
from windlass.engine.drafting import Drafting
from windlass.engine.pace import Pace
from windlass.engine.prompt_pages import Known, PromptPages
from windlass.engine.request import Request
from windlass.engine.sequence import QueuedSequence, Sequence
from windlass.engine.waiting_queue import WaitingQueue
from windlass.ids import Home
from windlass.kvcache.kv_cache import KvCache
from windlass.kvcache.kv_tiers import KvTiers
from windlass.schedule.batch import CHUNK_TOKENS, Segment, fitting_rows, most_drafts


class ScheduledSequence(NamedTuple):
    """A segment and whose it is."""

    sequence: Sequence
    segment: Segment


class Starts(Protocol):
    """Makes sequences of what leaves the queue."""

    def start(self, queued: QueuedSequence) -> Sequence: ...


class Decoding(NamedTuple):
    """Who decodes in a pass, what is guessed of what they go on with, and how many rows of prompts
    there are beside; None for all that there is room for."""

    turns: Turns
    drafting: Drafting | None = None
    pace: Pace | None = None


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
        self.turns, self._drafting, self.pace = decoding or Decoding(Turns())
        most = self._drafting.most if self._drafting else 0
        self._most_drafts = most_drafts(max_num_seqs, most)
        self.lengths = OutputLengths()
        self._is_filling = False  # a wave takes in prompts
        self.prompt_pages = PromptPages(kv, long_rope_after=long_rope_after)
        self.waiting = WaitingQueue(max_num_seqs)
        self.running: list[Sequence] = []  # oldest first
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
        self._release(sequence)

    def drop(self, request: Request) -> None:
        """Forgets all sequences of `request`, running or waiting."""
        for sequence in [sequence for sequence in self.running if sequence.request is request]:
            self.remove(sequence)
        self.waiting.drop(request)

    def restart(self) -> None:
        """After a pass that failed: no row of it counts, so nothing may be read that it was to
        compute. All that run are computed again."""
        while self.running:
            self._preempt(self.running[-1])
        self._kv.forget_all()

    def compose(self, starts: Starts) -> list[ScheduledSequence]:
        """The rows of the next pass, those of the host first, so that it begins; empty only when
        there is nothing to do. `starts` makes the sequences of what is taken from the queue."""
        rows = self._compose(starts)
        if self._kv.num_homes > 1:
            rows.sort(key=lambda row: row.sequence.home is not Home.HOST)
        return rows

    def _compose(self, starts: Starts) -> list[ScheduledSequence]:
        rows: list[ScheduledSequence] = []
        if self._mixed_prefill_rows == 0:
            self._is_filling |= not self.running
            if self._is_filling:
                self._add_prompts(starts, self._max_rows, rows)
                self._is_filling = bool(rows)
            if rows:
                return rows
        decoding: list[Sequence] = []
        while not decoding and (able := {c.number: c for c in self.running if not c.in_prompt}):
            turn = [able[number] for number in self.turns.choose(list(able))]
            # oldest first, at the cost of the youngest, which is in its prompt from then on
            decoding = [c for c in turn if not c.in_prompt and self._grow(c)]
        room = self._max_rows
        for following, sequence in zip(range(len(decoding))[::-1], decoding, strict=True):
            rows.append(self._generated(sequence, room - following))  # a row for each that follows
            room -= rows[-1].segment.num_tokens
        if rows and self._mixed_prefill_rows is not None:
            room = min(room, self._mixed_prefill_rows)
        if self.pace is not None:
            newcomers = islice(self.waiting, self._max_num_seqs - len(self.running))
            room = self.pace.split(_wanted(self.running, newcomers), room, is_alone=not rows)
        self._add_prompts(starts, room, rows)
        return rows

    def _add_prompts(self, starts: Starts, room: int, rows: list[ScheduledSequence]) -> None:
        """Prompt rows of those that run, then of newcomers."""
        for sequence in self.running:
            if sequence.in_prompt:
                room -= self._add_prompt(sequence, room, rows)
        full: set[Home] = set()
        while room > 0 and self.waiting and len(self.running) < self._max_num_seqs:
            place = self.waiting.next(full)
            if place is None:
                break
            newcomer = self.waiting[place]
            known = self.prompt_pages.find(newcomer.queued)
            if not self._can_admit(newcomer, known, room):
                full.add(newcomer.queued.home)
                if len(full) == self._kv.num_homes:
                    break
                continue
            self.waiting.take(place)
            sequence = starts.start(newcomer) if isinstance(newcomer, QueuedSequence) else newcomer
            self._admit(sequence, known)
            room -= self._add_prompt(sequence, room, rows)

    def _can_admit(self, newcomer: QueuedSequence | Sequence, known: Known, room: int) -> bool:
        home = newcomer.queued.home
        left = newcomer.queued.num_tokens - self.prompt_pages.num_ready(known)
        needed = self._kv.pages_for(min(newcomer.num_tokens + 1, newcomer.max_total - 1))
        needed -= self.prompt_pages.num_held(known)
        running = [one for one in self.running if one.home is home]
        kept = sum(may_want(self._kv, self.lengths, one) for one in running)
        fits = needed + kept <= self._kv.of(home).num_free_pages
        return fits and self._kv.device.has_free_state and fitting_rows(left, room) > 0

    def _admit(self, sequence: Sequence, known: Known) -> None:
        self.prompt_pages.take(sequence, known)
        sequence.state_slot = self._kv.device.take_state()
        if sequence.number < 0:  # it has not run before
            sequence.number, self._num_begun = self._num_begun, self._num_begun + 1
        self.running.append(sequence)

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
        first = sequence.num_computed
        last = min(sequence.num_tokens, first + room)
        row = _row(self.prompt_pages, sequence, (first, last), is_prompt=False)
        if self._drafting is None or last < sequence.num_tokens:
            return row
        # nobody gives way for a guess: there is still a chunk for prompts, a page for each
        most = min(room - (last - first) - CHUNK_TOKENS, self._most_drafts // len(self.running))
        kv = self._kv.of(sequence.home)
        spare = kv.num_free_pages - len(self.running)
        return _with_drafts(row, self._drafting.propose(sequence)[: max(0, most)], kv, spare)

    def _add_prompt(self, sequence: Sequence, room: int, rows: list[ScheduledSequence]) -> int:
        """Adds the next chunk of a prompt and returns its number of rows. What rows before it have
        computed, here or earlier, is done."""
        self.prompt_pages.skip(sequence)
        room = room if self.pace is None else min(room, self.pace.share)
        count = fitting_rows(sequence.num_prompt - sequence.num_computed, room)
        if count:
            first = sequence.num_computed
            span = (first, first + count)
            rows.append(_row(self.prompt_pages, sequence, span, is_prompt=True))
            self.prompt_pages.fill(sequence, first, first + count)
        return count

    def check(self) -> None:
        """Pages are held by running sequences only, and by several only where their prompts
        agree."""
        held = {home: Counter[int]() for home in Home}
        for sequence in self.running:
            held[sequence.home].update(sequence.pages)
        self._kv.check(held)
        for sequence in self.running:
            assert len(set(sequence.pages)) == len(sequence.pages), "a sequence has a page twice"
            self.prompt_pages.check(sequence)
        assert all(isinstance(one, QueuedSequence) or not one.pages for one in self.waiting), (
            "a waiting sequence holds pages"
        )


def _wanted(running: list[Sequence], newcomers: Iterable[Sequence | QueuedSequence]) -> list[int]:
    """Rows of prompts that are still to be computed, one number for each."""
    left = [one.num_prompt - one.num_computed for one in running if one.in_prompt]
    return left + [one.queued.num_tokens for one in newcomers]


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


def _row(
    prompts: PromptPages, sequence: Sequence, span: tuple[int, int], *, is_prompt: bool
) -> ScheduledSequence:
    """The sequence's rows at positions from the first of `span` up to its last."""
    first, last = span
    is_scored = is_prompt and sequence.scores_prompt
    segment = Segment(
        sequence=sequence.number,
        token_ids=sequence.tokens(first, last),
        first_position=first,
        pages=tuple(sequence.pages),
        state_slot=sequence.state_slot,
        is_prompt=is_prompt,
        long_rope=prompts.long_rope(sequence.queued),
        home=sequence.home,
        wants_logits=last == sequence.num_tokens,
        targets=sequence.request.prompt_token_ids[first + 1 : last + 1] if is_scored else (),
    )
    return ScheduledSequence(sequence, segment)


def _with_drafts(
    row: ScheduledSequence, drafts: tuple[int, ...], kv: KvCache, spare_pages: int
) -> ScheduledSequence:
    """The row with guesses behind it, as many as its pages and `spare_pages` have room for. The
    last token of a sequence is never computed."""
    sequence, segment = row
    drafts = drafts[: max(0, sequence.max_total - 1 - sequence.num_tokens)]
    missing = kv.pages_for(sequence.num_tokens + len(drafts)) - len(sequence.pages)
    if 0 < missing <= spare_pages:
        sequence.pages.extend(kv.take_pages(missing))
    drafts = drafts[: len(sequence.pages) * kv.page_tokens - sequence.num_tokens]
    more = replace(
        segment,
        token_ids=segment.token_ids + drafts,
        pages=tuple(sequence.pages),
        num_drafts=len(drafts),
    )
    return ScheduledSequence(sequence, more if drafts else segment)

"""Which passes a job takes: the rules of engine/admission.py on counts alone, many equal passes at
a time. Pure arithmetic; a test compares it with the engine's own admission pass by pass.

Everybody decodes a row, then prompts take what room is left, in the order of arrival; who waits
joins when pages for its prompt are free; who finds no page drives out the youngest, which is
computed again later. Between two events (an end, a prompt row, a lack of pages) all passes are the
same but for their growing contexts.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from windlass.planner.costs import Seen
from windlass.schedule.batch import CHUNK_TOKENS
from windlass.workload import Workload


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan allows: rows and sequences per pass, pages of keys and values."""

    max_rows: int
    max_seqs: int
    num_pages: int
    page_tokens: int


@dataclass(frozen=True, slots=True)
class PassRun:
    """`repeats` passes alike. `seen`: rows of one of them, and the positions that they see on
    average; `num_logits`: rows that a token is drawn for."""

    repeats: int
    seen: Seen
    num_logits: int

    @property
    def num_rows(self) -> int:
        return self.seen.num_rows


@dataclass(slots=True, eq=False)
class _Sequence:
    prompt: int
    output: int
    generated: int = 0
    computed: int = 0
    pages: int = 0

    @property
    def num_tokens(self) -> int:
        return self.prompt + self.generated

    @property
    def in_prompt(self) -> bool:
        return self.computed < self.prompt


def compose(workload: Workload, limits: Limits) -> Iterator[PassRun]:
    """The passes of the whole job. Every sequence must fit into the pages alone."""
    return _Composer(workload, limits).runs()


class _Composer:
    def __init__(self, workload: Workload, limits: Limits) -> None:
        lengths = zip(workload.prompt_tokens, workload.output_tokens, strict=True)
        self._waiting = deque(_Sequence(prompt, output) for prompt, output in lengths)
        self._running: list[_Sequence] = []  # oldest first
        self._limits = limits
        self._free = limits.num_pages
        most = max(one.prompt + one.output - 1 for one in self._waiting)
        assert self._pages_for(most) <= limits.num_pages, "a sequence does not fit into the pages"

    def runs(self) -> Iterator[PassRun]:
        while self._waiting or self._running:
            rows, is_quiet = self._next_pass()
            assert rows, "sequences wait, but nothing can run"
            repeats = self._quiet_passes() if is_quiet else 1
            yield self._advance(rows, repeats)

    def _next_pass(self) -> tuple[list[tuple[_Sequence, int]], bool]:
        """Sequences and their rows; whether the next pass is the same until somebody ends."""
        decoding = [one for one in list(self._running) if not one.in_prompt and self._grow(one)]
        rows: list[tuple[_Sequence, int]] = []
        room = self._limits.max_rows
        for following, one in zip(range(len(decoding))[::-1], decoding, strict=True):
            count = min(one.num_tokens - one.computed, room - following)
            rows.append((one, count))
            room -= count
        is_quiet = room == self._limits.max_rows - len(decoding)  # a row for each
        for one in self._running:
            if one.in_prompt and (count := _fitting(one.prompt - one.computed, room)):
                rows.append((one, count))
                room -= count
                is_quiet = False
        kept = -1  # pages for those who run, known once somebody may join
        while room > 0 and self._waiting and len(self._running) < self._limits.max_seqs:
            first = self._waiting[0]
            kept = sum(map(self._may_want, self._running)) if kept < 0 else kept
            if self._needs(first) + kept > self._free:
                break
            count = _fitting(first.prompt, room)
            if not count:
                break
            self._waiting.popleft()
            first.pages = self._pages_for(first.prompt)
            self._free -= first.pages
            self._running.append(first)
            kept += self._may_want(first)
            rows.append((first, count))
            room -= count
            is_quiet = False
        return rows, is_quiet and len(decoding) == len(self._running)

    def _quiet_passes(self) -> int:
        """Passes until somebody ends, or a page lacks; nobody can join before."""
        most = min(one.output - one.generated for one in self._running)
        if self._fits_after(most):
            return most
        least, beyond = 1, most
        while beyond - least > 1:
            middle = (least + beyond) // 2
            if self._fits_after(middle):
                least = middle
            else:
                beyond = middle
        return least

    def _fits_after(self, passes: int) -> bool:
        """Whether the pages hold everybody's tokens at the last of so many passes."""
        size, more = self._limits.page_tokens, passes - 1
        wanted = sum(-(-(one.num_tokens + more) // size) for one in self._running)
        return wanted <= self._limits.num_pages

    def _advance(self, rows: list[tuple[_Sequence, int]], repeats: int) -> PassRun:
        decode = prompt = logits = 0
        decode_positions = prompt_positions = 0.0
        for one, count in rows:
            first = one.computed
            positions = count * first + count * (count + 1) / 2
            if one.in_prompt:
                prompt += count
                prompt_positions += positions
            else:
                decode += count
                decode_positions += positions + (repeats - 1) / 2
            one.computed += count + repeats - 1
            if first + count == one.num_tokens:
                logits += 1
                one.generated += repeats
        if repeats > 1:
            self._hold()
        if any(one.generated >= one.output for one, _ in rows):
            self._free += sum(one.pages for one in self._running if one.generated >= one.output)
            self._running = [one for one in self._running if one.generated < one.output]
        return PassRun(repeats, Seen(decode, decode_positions, prompt, prompt_positions), logits)

    def _hold(self) -> None:
        """Pages that quiet passes have taken on their way."""
        for one in self._running:
            wanted = self._pages_for(one.computed)
            self._free -= wanted - one.pages
            one.pages = wanted
        assert self._free >= 0, "a quiet pass has taken more pages than there are"

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._limits.page_tokens)

    def _grow(self, one: _Sequence) -> bool:
        missing = self._pages_for(one.num_tokens) - one.pages
        while missing > self._free:
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is one:
                return False
        if missing > 0:
            one.pages += missing
            self._free -= missing
        return True

    def _preempt(self, one: _Sequence) -> None:
        self._running.remove(one)
        self._free += one.pages
        one.pages = one.computed = 0
        self._waiting.appendleft(one)

    def _needs(self, newcomer: _Sequence) -> int:
        most = newcomer.prompt + newcomer.output - 1
        return self._pages_for(min(newcomer.num_tokens + 1, most))

    def _may_want(self, one: _Sequence) -> int:
        most = self._pages_for(one.prompt + one.output - 1) - one.pages
        return min(most, max(1, self._pages_for(one.num_tokens) - one.pages))


def _fitting(left: int, room: int) -> int:
    return left if left <= room else room // CHUNK_TOKENS * CHUNK_TOKENS

"""Which passes a job takes: the rules of engine/admission.py on counts alone, many equal passes at
a time. Pure arithmetic; a test compares it with the engine's own admission pass by pass.

Everybody whose turn it is decodes a row, then prompts take what room is left, in the order of
arrival; who waits joins when pages for its prompt are free; who finds no page drives out the
youngest, which is computed again later. Between two events (an end, a prompt row, a lack of pages,
another's turn) all passes are the same but for their growing contexts.

What a prompt shares with earlier ones costs no rows, but rows after it see it. Its pages count for
every sequence that has it, as if each had its own: a job may be composed of more passes than it
takes, never of more sequences at once than fit.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from windlass.engine.bursts import Turns
from windlass.perf.op_cost import Seen
from windlass.plan import Plan
from windlass.schedule.batch import fitting_rows
from windlass.workload import Workload

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan allows: tokens and sequences per pass, pages of the KV cache; prompt tokens
    beside those that decode, at most, where they are bounded; bursts of those that decode."""

    max_rows: int
    max_seqs: int
    num_pages: int
    page_tokens: int
    mixed_prefill_rows: int | None = None
    burst_tokens: int = 0
    burst_max_seqs: int = 0

    @classmethod
    def of(cls, plan: Plan) -> "Limits":
        return cls(
            plan.max_num_batched_tokens,
            plan.max_num_seqs,
            plan.kv_pages,
            plan.page_tokens,
            plan.mixed_prefill_tokens,
            plan.burst_tokens,
            plan.burst_max_seqs,
        )


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


class _Waiting(NamedTuple):
    number: int
    prompt: int
    output: int
    shared: int  # prompt tokens that others compute
    generated: int = 0  # before it was driven out


def compose(workload: Workload, limits: Limits) -> Iterator[PassRun]:
    """The passes of the whole job. Every sequence must fit into the pages alone."""
    return _Composer(workload, limits).runs()


class _Composer:
    """Running sequences, oldest first, as arrays of equal length."""

    def __init__(self, workload: Workload, limits: Limits) -> None:
        self._waiting = deque(_Waiting(i, *one) for i, one in enumerate(workload.lengths()))
        self._limits = limits
        self._turns = Turns(limits.burst_tokens, limits.burst_max_seqs)
        self._free = limits.num_pages
        most = max(one.prompt + one.output - 1 for one in self._waiting)
        assert self._pages_for(most) <= limits.num_pages, "a sequence does not fit into the pages"
        nobody = np.zeros(0, dtype=np.int64)
        self._is_filling = False  # a wave takes in prompts
        self._prompt = self._output = self._generated = self._computed = self._pages = nobody
        self._shared = self._number = nobody

    def runs(self) -> Iterator[PassRun]:
        while self._waiting or len(self._prompt):
            counts = self._next_pass()
            assert counts.any(), "sequences wait, but nothing can run"
            is_quiet = bool((counts <= 1).all() and (self._computed >= self._prompt).all())
            yield self._advance(counts, self._quiet_passes(counts > 0) if is_quiet else 1)

    def _next_pass(self) -> Ints:
        """Rows of each running sequence, after some have joined or given way."""
        if self._limits.mixed_prefill_rows == 0:
            self._is_filling |= not len(self._prompt)
            if self._is_filling:
                counts = self._with_prompts([0] * len(self._prompt), self._limits.max_rows)
                self._is_filling = any(counts)
                if self._is_filling:
                    return np.array(counts, dtype=np.int64)
        decoding = self._decoding()
        wanted = np.where(decoding, self._prompt + self._generated - self._computed, 0)
        room = self._limits.max_rows - int(wanted.sum())
        if room < 0:
            room, wanted = _squeezed(wanted, self._limits.max_rows)
        bound = self._limits.mixed_prefill_rows
        if bound is not None and wanted.any():
            room = min(room, bound)
        return np.array(self._with_prompts(wanted.tolist(), room), dtype=np.int64)

    def _decoding(self) -> Bools:
        """Who decodes, with pages for all tokens."""
        while (able := self._computed >= self._prompt).any():
            turn = able
            if self._limits.burst_tokens:
                turn = np.isin(self._number, self._turns.choose(self._number[able].tolist()))
            self._grow(turn)
            turn = turn[: len(self._prompt)]  # whoever has given way
            if turn.any():
                return turn
        return able

    def _with_prompts(self, counts: list[int], room: int) -> list[int]:
        """Rows with those of prompts: of those that run, then of those that join."""
        for i in np.flatnonzero(self._computed < self._prompt).tolist():
            counts[i] = fitting_rows(int(self._prompt[i] - self._computed[i]), room)
            room -= counts[i]
        return counts + self._join(counts, room)

    def _join(self, counts: Sequence[int], room: int) -> list[int]:
        """Prompt rows of those who join those who compute `counts`."""
        places = self._limits.max_seqs - len(self._prompt)
        if room <= 0 or not self._waiting or places <= 0:
            return []
        kept = int(np.minimum(self._most(), np.maximum(1, self._lacking())).sum())
        new: list[_Waiting] = []
        rows: list[int] = []
        pages: list[int] = []
        while room > 0 and self._waiting and len(new) < places:
            first = self._waiting[0]
            most = self._pages_for(first.prompt + first.output - 1)
            tokens = first.prompt + first.generated
            needed = min(self._pages_for(tokens + 1), most)
            count = fitting_rows(first.prompt - first.shared, room)
            if needed + kept > self._free or not count:
                break
            if first.shared and not self._is_ready(first.shared, counts, new, rows):
                break
            new.append(self._waiting.popleft())
            rows.append(count)
            pages.append(self._pages_for(first.prompt))
            kept += min(most - pages[-1], max(1, self._pages_for(tokens) - pages[-1]))
            self._free -= pages[-1]
            room -= count
        if new:
            self._append(new, pages)
        return rows

    def _is_ready(
        self, shared: int, counts: Sequence[int], new: Sequence[_Waiting], rows: Sequence[int]
    ) -> bool:
        """Whether all of so many first tokens are computed in this pass at the latest, by the
        youngest that shares fewer itself: others can then read them."""
        for i in reversed(range(len(new))):
            if new[i].shared < shared:
                return new[i].shared + rows[i] >= min(shared, new[i].prompt)
        before = np.flatnonzero(self._shared < shared)
        if not len(before):
            return True  # it has ended
        i = int(before[-1])
        return bool(self._computed[i] + counts[i] >= min(shared, self._prompt[i]))

    def _append(self, new: Sequence[_Waiting], pages: Sequence[int]) -> None:
        number, prompt, output, shared, generated = np.array(new, dtype=np.int64).T
        self._number = np.concatenate((self._number, number))
        self._prompt = np.concatenate((self._prompt, prompt))
        self._output = np.concatenate((self._output, output))
        self._generated = np.concatenate((self._generated, generated))
        self._shared = np.concatenate((self._shared, shared))
        self._computed = np.concatenate((self._computed, shared))
        self._pages = np.concatenate((self._pages, np.array(pages, dtype=np.int64)))

    def _keep(self, who: Bools) -> None:
        """Forgets all others, and frees their pages."""
        self._free += int(self._pages[~who].sum())
        self._prompt, self._output = self._prompt[who], self._output[who]
        self._generated, self._computed = self._generated[who], self._computed[who]
        self._shared, self._pages = self._shared[who], self._pages[who]
        self._number = self._number[who]

    def _quiet_passes(self, decoding: Bools) -> int:
        """Passes of those `decoding` until one of them ends, a page lacks, or another's turn comes;
        nobody can join before."""
        most = int((self._output - self._generated)[decoding].min())
        if not decoding.all():
            most = min(most, 1 + self._turns.left)
        elif 1 < len(decoding) <= self._limits.burst_max_seqs:
            most = 1  # somebody has just given way: those left are few enough for turns
        passes = _last(most, lambda passes: self._fits_after(passes, decoding))
        if passes > 1 and not decoding.all():
            self._turns.skip(passes - 1)
        elif passes > 1:
            self._turns.choose(self._number.tolist())  # sees that all decode
        return passes

    def _fits_after(self, passes: int, decoding: Bools) -> bool:
        """Whether the pages hold everybody's tokens at the last of so many passes."""
        tokens = self._prompt + self._generated + passes - 1
        pages = np.where(decoding, _pages(tokens, self._limits.page_tokens), self._pages)
        return int(pages.sum()) <= self._limits.num_pages

    def _advance(self, counts: Ints, repeats: int) -> PassRun:
        in_prompt = self._computed < self._prompt
        positions = counts * self._computed + counts * (counts + 1) / 2
        positions += np.where(counts > 0, (repeats - 1) / 2, 0.0)
        has_logits = (counts > 0) & (self._computed + counts == self._prompt + self._generated)
        self._computed = self._computed + np.where(counts > 0, counts + repeats - 1, 0)
        self._generated = self._generated + np.where(has_logits, repeats, 0)
        if repeats > 1:
            wanted = np.maximum(self._pages, _pages(self._computed, self._limits.page_tokens))
            self._free -= int((wanted - self._pages).sum())
            self._pages = wanted
            assert self._free >= 0, "quiet passes have taken more pages than there are"
        running = self._generated < self._output
        if not running.all():
            self._keep(running)
        seen = Seen(
            int(counts[~in_prompt].sum()), float(positions[~in_prompt].sum()),
            int(counts[in_prompt].sum()), float(positions[in_prompt].sum()),
        )  # fmt: skip
        return PassRun(repeats, seen, int(has_logits.sum()))

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._limits.page_tokens)

    def _lacking(self) -> Ints:
        """Pages that all tokens need beyond those held."""
        return _pages(self._prompt + self._generated, self._limits.page_tokens) - self._pages

    def _most(self) -> Ints:
        """Pages that each can still come to want."""
        most = self._prompt + self._output - 1
        return _pages(most, self._limits.page_tokens) - self._pages

    def _grow(self, decoding: Bools) -> None:
        """Pages for all tokens of those who decode, at the cost of the youngest."""
        missing = np.where(decoding, np.maximum(self._lacking(), 0), 0)
        if int(missing.sum()) <= self._free:
            self._pages = self._pages + missing
            self._free -= int(missing.sum())
            return
        at = 0
        while at < len(self._prompt):
            lacks = int(missing[at])
            while lacks > self._free and at < len(self._prompt):
                self._preempt()
            if at < len(self._prompt):
                self._pages[at] += lacks
                self._free -= lacks
            at += 1

    def _preempt(self) -> None:
        """The youngest gives way, to be computed again."""
        own = (self._number, self._prompt, self._output, self._shared, self._generated)
        self._waiting.appendleft(_Waiting(*(int(values[-1]) for values in own)))
        self._keep(np.arange(len(self._prompt)) < len(self._prompt) - 1)


def _squeezed(wanted: Ints, max_rows: int) -> tuple[int, Ints]:
    """Room and rows where those who are computed again would take the rows of others."""
    room, rows = max_rows, wanted.copy()
    decoding = np.flatnonzero(wanted)
    for following, i in zip(range(len(decoding))[::-1], decoding.tolist(), strict=True):
        rows[i] = min(int(wanted[i]), room - following)
        room -= int(rows[i])
    return room, rows


def _last(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, where all that are smaller do, and 1 does."""
    if fits(most):
        return most
    least, beyond = 1, most
    while beyond - least > 1:
        middle = (least + beyond) // 2
        if fits(middle):
            least = middle
        else:
            beyond = middle
    return least


def _pages(tokens: Ints, page_tokens: int) -> Ints:
    return -(-tokens // page_tokens)

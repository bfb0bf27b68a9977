"""Admission without a model: a pass gives every row that wants logits a token."""

from typing import Any

import torch

from sequences import PlainStarts
from windlass.device.host_memory import HostAllocator
from windlass.engine.admission import Admission, Decoding
from windlass.engine.bursts import Turns
from windlass.engine.request import Request
from windlass.engine.sequence import QueuedSequence, Sequence
from windlass.ids import Home
from windlass.kvcache.kv_cache import KvCache, PagedShape, StateShape, StateSlots
from windlass.kvcache.kv_tiers import KvTiers
from windlass.params import SamplingParams
from windlass.schedule.batch import CHUNK_TOKENS

PAGE_TOKENS = 8

_NOBODY: Any = None


class Machine:
    """Admission over a small store; a pass gives every row that wants logits a token."""

    def __init__(
        self, *, pages, seqs, rows, states=0, long_rope_after=None, mixed_prefill_rows=None,
        turns=None, drafting=None, pace=None, host_pages=0,
    ):  # fmt: skip
        shapes = [PagedShape(1, 4, 4)] + [StateShape(((1, 1), (1, 1, 1)))] * bool(states)
        self.kv = KvCache(
            shapes, HostAllocator(), dtype=torch.float32, num_pages=pages, page_tokens=PAGE_TOKENS,
            states=StateSlots(states),
        )  # fmt: skip
        host = None
        if host_pages:
            host = KvCache(
                shapes[:1], HostAllocator(), dtype=torch.float32, num_pages=host_pages,
                page_tokens=PAGE_TOKENS,
            )  # fmt: skip
        self.admission = Admission(
            KvTiers(self.kv, host), max_num_seqs=seqs, max_rows=rows,
            long_rope_after=long_rope_after, mixed_prefill_rows=mixed_prefill_rows,
            decoding=Decoding(turns or Turns(), drafting, pace),
        )  # fmt: skip
        self.rows = rows
        self.finished: list[Sequence] = []
        self.waited: dict[int, int] = {}  # passes since a sequence that can decode last did

    def add(
        self, num_prompt, max_output, *, name="r", longest=None, home=Home.DEVICE, is_batch=False
    ):
        """Tokens are their positions."""
        params = SamplingParams(max_tokens=max_output)
        request = Request(name, tuple(range(num_prompt)), params, "", is_batch=is_batch)
        self.admission.add(
            QueuedSequence(request, 0, max_output, longest or num_prompt + max_output, home=home)
        )
        return request

    def step(self):
        """One pass; checks all that must hold of any pass."""
        admission = self.admission
        decoding = [sequence for sequence in admission.running if not sequence.in_prompt]
        before = {id(sequence): sequence.num_computed for sequence in decoding}
        rows = admission.compose(PlainStarts())
        admission.check()
        assert 0 < sum(row.segment.num_tokens for row in rows) <= self.rows
        assert all(row.segment.num_tokens for row in rows), "an empty segment"
        assert len({id(row.sequence) for row in rows}) == len(rows) <= len(admission.running)
        self.take(rows)
        turns = admission.turns
        most = max(0, turns.max_seqs - 1) * turns.burst_tokens
        for sequence in decoding:
            stood = not sequence.in_prompt and sequence.num_computed == before[id(sequence)]
            self.waited[sequence.number] = self.waited.get(sequence.number, 0) + 1 if stood else 0
            assert self.waited[sequence.number] <= most or sequence.is_batch, "stands still"
        return rows

    def take(self, rows):
        """The pass has ended."""
        for sequence, segment in rows:
            self._check(sequence, segment)
            drafts = segment.token_ids[segment.num_tokens - segment.num_drafts :]
            sequence.num_computed += segment.num_tokens - len(drafts)
            if not segment.wants_logits:
                continue
            for draft in (*drafts, None):
                sequence.output_ids.append(sequence.num_tokens)
                if draft != sequence.output_ids[-1] or sequence.num_tokens == sequence.max_total:
                    break
                sequence.num_computed += 1
            if sequence.num_tokens == sequence.max_total:
                self.admission.remove(sequence)
                self.finished.append(sequence)
        self.admission.check()

    def _check(self, sequence, segment):
        last = segment.first_position + segment.num_tokens - segment.num_drafts
        assert segment.token_ids[: last - segment.first_position] == tuple(
            range(segment.first_position, last)
        )
        assert segment.first_position == sequence.num_computed
        assert segment.is_prompt == (last <= sequence.num_prompt)
        assert segment.is_prompt or segment.first_position >= sequence.num_prompt
        assert not segment.is_prompt or last == sequence.num_prompt or last % CHUNK_TOKENS == 0
        assert segment.wants_logits == (last == sequence.num_tokens)
        assert len(segment.pages) * PAGE_TOKENS >= last + segment.num_drafts
        assert last + segment.num_drafts < sequence.max_total, "a row that nobody reads"
        assert not segment.num_drafts or (segment.wants_logits and not segment.is_prompt)
        assert segment.pages == tuple(sequence.pages)

"""Admission over pages that remember what each position depends on: whoever reads what another
sequence wrote is found out."""

import numpy as np
import torch

from sequences import PlainStarts
from windlass.device.host_memory import HostAllocator
from windlass.engine.admission import Admission, Decoding
from windlass.engine.bursts import Turns
from windlass.engine.prompt_scores import ScoreRows
from windlass.engine.request import Request
from windlass.engine.sequence import QueuedSequence, Sequence
from windlass.kvcache.kv_cache import CacheShape, KvCache, PagedShape, StateShape, StateSlots
from windlass.kvcache.kv_tiers import KvTiers
from windlass.kvcache.pages import block_keys
from windlass.params import SamplingParams
from windlass.schedule.batch import CHUNK_TOKENS

PAGE_TOKENS = 32


LONG_AFTER = 300


END = 0  # the token that ends a sequence


def chain(tokens, *, is_long):
    """What keys and values of each position depend on, as a number."""
    values, last = [], is_long
    for token in tokens:
        last = hash((last, token))
        values.append(last)
    return values


def drawn(value, index):
    """The token that follows; one in eight ends the sequence."""
    return hash((value, index, -7)) % 8


def score(values, tokens, place):
    """What the log-probability of the token at `place` depends on, as a number."""
    return hash((values[place - 1], tokens[place]))


def alone(prompt, index, max_output, *, is_long):
    """What a sequence gives, computed by itself."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_output:
        tokens.append(drawn(chain(tokens, is_long=is_long)[-1], index))
        if tokens[-1] == END:
            break
    return tokens[len(prompt) :]


class Machine:
    """Admission over a store whose cells hold what a position depends on. Rows of a pass run in
    their order: one reads what earlier ones wrote."""

    def __init__(
        self, *, pages, seqs, rows, shares=True, mixed=None, ends=True, kept_states=None
    ):  # fmt: skip
        """`kept_states`: of a model with recurrent layers; None for one without, whose answers are
        found too."""
        shapes: list[CacheShape | None] = [PagedShape(1, 1, 1)]
        states = StateSlots()
        if kept_states is not None:
            shapes, states = [*shapes, StateShape(((1,),))], StateSlots(seqs, kept_states)
        self.kv = KvCache(shapes, HostAllocator(), dtype=torch.float32, num_pages=pages,
                          page_tokens=PAGE_TOKENS, states=states)  # fmt: skip
        self.admission = Admission(
            KvTiers(self.kv), max_num_seqs=seqs, max_rows=rows, long_rope_after=LONG_AFTER,
            mixed_prefill_rows=mixed,
            decoding=Decoding(Turns(), keeps_answers=shares and kept_states is None),
        )  # fmt: skip
        self.states: dict[int, int | None] = {}  # by slot: what the next row goes on from
        self.shares = shares
        self.ends = ends  # whether END ends a sequence
        self.mixed = mixed
        self.cells: dict[int, list[int | None]] = {}
        self.finished: dict[tuple[str, int], Sequence] = {}
        self.prompt_rows = 0
        take = self.kv.take_pages

        def take_pages(count):
            taken = take(count)
            for page in taken:
                self.cells[page] = [None] * PAGE_TOKENS
            return taken

        self.kv.take_pages = take_pages  # type: ignore[method-assign]

    def add(self, name, prompt, max_output, *, n=1, longest=0, scored=False, start=None):
        params = SamplingParams(
            n=n,
            max_tokens=max_output,
            prompt_logprobs=0 if scored else None,
            prompt_logprob_start=start,
        )
        one = Request(name, tuple(prompt), params, "")
        keys = block_keys(prompt, CHUNK_TOKENS) if self.shares else ()
        for index in range(n):
            longest = max(longest, len(prompt) + max_output)
            self.admission.add(QueuedSequence(one, index, max_output, longest, keys))
        return one

    def step(self):
        admission = self.admission
        rows = admission.compose(PlainStarts())
        admission.check()
        assert rows or not admission.running and not admission.waiting
        prefill = sum(row.segment.num_tokens for row in rows if row.segment.is_prompt)
        decodes = any(not row.segment.is_prompt for row in rows)
        assert self.mixed is None or not decodes or prefill <= self.mixed
        self.prompt_rows += prefill
        for sequence, segment in rows:
            self._compute(sequence, segment)
        for sequence, segment in rows:
            sequence.num_computed += segment.num_tokens
            if segment.wants_logits:
                self._draw(sequence)
        admission.check()
        return rows

    def _compute(self, sequence, segment):
        tokens = [*sequence.request.prompt_token_ids, *sequence.output_ids]
        values = chain(tokens, is_long=segment.long_rope)
        assert segment.first_position == sequence.num_computed
        last = segment.first_position + segment.num_tokens
        assert not segment.is_prompt or last == sequence.num_prompt or last % CHUNK_TOKENS == 0
        slot, first = segment.state_slot, segment.first_position
        if segment.state_source >= 0:
            self.states[slot] = self.states[segment.state_source]
        held = self.states.get(slot) if first else None
        assert slot < 0 or held == (values[first - 1] if first else None), "another one's state"
        self.states[slot] = values[last - 1]
        self.states |= {kept: values[end - 1] for end, kept in segment.kept_states}
        for position in range(segment.first_position, last):
            page = segment.pages[position // PAGE_TOKENS]
            self.cells[page][position % PAGE_TOKENS] = values[position]
        seen = [cell for page in segment.pages for cell in self.cells[page]]
        assert seen[:last] == values[:last], "a row reads what another sequence wrote"
        if segment.targets:
            targets = list(segment.targets)
            assert targets == tokens[segment.first_position + 1 :][: len(targets)]
            count = last - segment.first_position - (last == sequence.num_prompt)
            assert len(targets) == count
            places = range(segment.first_position + 1, segment.first_position + 1 + count)
            found = np.array([score(values, tokens, place) for place in places])
            pair = found[:, None]
            sequence.take_scores(segment, ScoreRows(found, pair, pair, None), 0)

    def _draw(self, sequence):
        tokens = [*sequence.request.prompt_token_ids, *sequence.output_ids]
        is_long = sequence.queued.longest > LONG_AFTER
        sequence.output_ids.append(drawn(chain(tokens, is_long=is_long)[-1], sequence.queued.index))
        if (
            sequence.output_ids[-1] == END and self.ends
        ) or sequence.num_tokens == sequence.max_total:
            self.admission.remove(sequence)
            self.finished[sequence.request.request_id, sequence.queued.index] = sequence
            if sequence.first_scored is not None:
                prompt = tokens[: sequence.num_prompt]
                values = chain(prompt, is_long=is_long)
                for place in range(sequence.first_scored, sequence.num_prompt):
                    block, row = divmod(place - 1, CHUNK_TOKENS)
                    found = sequence.prompt_scores[block].rows
                    assert found is not None, "a token was not scored"
                    assert found.logprobs_R[row] == score(values, prompt, place), "another's score"

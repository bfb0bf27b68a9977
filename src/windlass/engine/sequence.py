"""One sequence: a sequence of a request, its tokens, text and place in memory. Mutable; one owner,
the engine. Knows pages as numbers, no tensors but the row of logits it is given."""

from array import array
from dataclasses import dataclass, field

import torch

from windlass.engine.detokenizer import TextStream
from windlass.engine.grammars import Constraint
from windlass.engine.outputs import CompletionOutput, LogprobsOfStep
from windlass.engine.prompt_scores import BlockScores, ScoreRows
from windlass.engine.request import Delta, Request
from windlass.engine.sampling import Likeliest, Sampled, Sampler
from windlass.engine.tokenizer import Tokenizer
from windlass.ids import Home
from windlass.schedule.batch import CHUNK_TOKENS, Scoring, Segment


@dataclass(frozen=True, slots=True, eq=False)
class QueuedSequence:
    """A sequence that has not begun: what waits by the thousand has no sampler, text or tokens of
    its own. `max_output` is at least 1. `longest`: tokens that it could have if memory had no end.
    `block_keys`: of the blocks of its prompt that may be shared (`kvcache/pages.py`)."""

    request: Request
    index: int
    max_output: int
    longest: int
    block_keys: tuple[bytes, ...] = ()
    home: Home = Home.DEVICE

    @property
    def queued(self) -> "QueuedSequence":
        return self

    @property
    def is_batch(self) -> bool:
        return self.request.is_batch

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def max_total(self) -> int:
        """Tokens of prompt and output at most; positions that may be cached are one fewer."""
        return len(self.request.prompt_token_ids) + self.max_output

    @property
    def first_scored(self) -> int | None:
        """The first token of the prompt whose log-probability its passes give, which is that after
        the token before it; None: of no token. Those of all sequences of a request are one's."""
        params = self.request.params
        if params.prompt_logprobs is None or self.index:
            return None
        return max(1, params.prompt_logprob_start or 0)

    @property
    def scoring(self) -> Scoring:
        """What is told of those tokens."""
        params = self.request.params
        return Scoring(max(1, params.prompt_logprobs or 0), params.prompt_logprob_ranks)


class LogprobLog:
    """Log-probabilities step by step, 16 bytes per candidate: a tenth of the dicts that results
    have of them."""

    __slots__ = ("_ids", "_ranks", "_logprobs", "_ends")

    def __init__(self) -> None:
        self._ids, self._ranks = array("i"), array("i")
        self._logprobs = array("d")
        self._ends = array("q")  # of each step; its drawn token comes first

    def add(self, sampled: Sampled) -> None:
        assert sampled.logprob is not None and sampled.rank is not None, "logprobs were asked for"
        drawn = (sampled.token_id, sampled.logprob, sampled.rank)
        ids, logprobs, ranks = zip(drawn, *sampled.top, strict=True)
        self._ids.extend(ids)
        self._logprobs.extend(logprobs)
        self._ranks.extend(ranks)
        self._ends.append(len(self._ids))

    def steps(self) -> list[Sampled]:
        """What was added."""
        result, first = [], 0
        for end in self._ends:
            part = slice(first + 1, end)
            top = zip(self._ids[part], self._logprobs[part], self._ranks[part], strict=True)
            drawn = self._ids[first], self._logprobs[first], self._ranks[first]
            result.append(Sampled(*drawn, tuple(top)))
            first = end
        return result


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence that runs, or waits to be computed again. `num_computed` positions have their keys
    and values in `pages`; the rest of the prompt and `output_ids` is still to be computed."""

    queued: QueuedSequence
    sampler: Sampler
    text: TextStream | None  # None: the request does not want text
    eos_token_ids: frozenset[int]
    constraint: Constraint | None = None
    number: int = -1  # in the order in which an engine's sequences begin, never given twice
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0  # of these, prompt tokens that another sequence computed
    num_alike: int = 0  # tokens of its prompt that another's began with
    pages: list[int] = field(default_factory=list)
    state_slot: int = -1
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float = 0.0
    logprobs: LogprobLog = field(default_factory=LogprobLog)
    prompt_scores: dict[int, BlockScores] = field(default_factory=dict)  # by block of rows

    @property
    def request(self) -> Request:
        return self.queued.request

    @property
    def home(self) -> Home:
        return self.queued.home

    @property
    def is_batch(self) -> bool:
        return self.queued.is_batch

    @property
    def num_prompt(self) -> int:
        return self.queued.num_tokens

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + len(self.output_ids)

    @property
    def max_total(self) -> int:
        return self.queued.max_total

    @property
    def first_scored(self) -> int | None:
        return self.queued.first_scored

    @property
    def in_prompt(self) -> bool:
        """Whether the next row to compute is a prompt token."""
        return self.num_computed < self.num_prompt

    def tokens(self, first: int, last: int) -> tuple[int, ...]:
        """Tokens from position `first` up to `last`: all of the prompt or all generated."""
        before = self.num_prompt
        if last <= before:
            return self.request.prompt_token_ids[first:last]
        assert first >= before, "a row is a prompt row or a generated row"
        return tuple(self.output_ids[first - before : last - before])

    def following(self, first: int, last: int) -> tuple[int, ...]:
        """The tokens behind those at positions from `first` up to `last`."""
        prompt, before = self.request.prompt_token_ids, self.num_prompt - 1
        generated = self.output_ids[max(0, first - before) : max(0, last - before)]
        return prompt[first + 1 : last + 1] + tuple(generated)

    @property
    def takes_likeliest(self) -> bool:
        """Whether nothing but the likeliest token is asked of its rows of logits."""
        return self.constraint is None and self.sampler.takes_likeliest

    def advance(self, row: torch.Tensor | Likeliest, tokenizer: Tokenizer) -> Delta:
        """Samples the next token of this sequence, as `Sampler.sample` does, and decides whether it
        ends here."""
        allowed_V = self.constraint.allowed() if self.constraint else None
        sampled = self.sampler.sample(row, allowed_V)
        token = sampled.token_id
        if self.constraint is not None:
            self.constraint.accept(token)
        self.output_ids.append(token)
        logprobs: tuple[LogprobsOfStep, ...] = ()
        if sampled.logprob is not None:
            self.cumulative_logprob += sampled.logprob
            self.logprobs.add(sampled)
            if self.request.wants_deltas:
                logprobs = (sampled.as_logprobs(tokenizer),)
        is_first = self.request.wants_deltas and len(self.output_ids) == 1
        scores = self.prompt_output(tokenizer) if is_first else None
        new_text = self._decide(token)
        return Delta(
            self.request.request_id, self.queued.index, new_text, (token,), logprobs,
            self.finish_reason, self.stop_reason, scores or (),
        )  # fmt: skip

    def _decide(self, token: int) -> str:
        """Sets `finish_reason` where the token ends the sequence; returns the text to show.

        The sampler gives no end-of-sequence or stop token before `min_tokens`, and the text stream
        no stop string.
        """
        params = self.request.params
        shows = True  # whether the token is part of the text
        is_complete = self.constraint is not None and self.constraint.is_complete
        # an end is all that a grammar leaves where it is complete, wanted or not
        if token in self.eos_token_ids and (is_complete or not params.ignore_eos):
            self.finish_reason, shows = "stop", False
        elif token in params.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token
            shows = params.include_stop_str_in_output
        new_text = ""
        if self.text is not None and shows:
            new_text = self.text.push(token)
            if self.text.stop_hit is not None:
                self.finish_reason, self.stop_reason = "stop", self.text.stop_hit
        if self.finish_reason is None and is_complete:
            self.finish_reason = "stop"
        if self.finish_reason is None and self.num_tokens >= self.max_total:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.text is not None:
            new_text += self.text.finish()
        return new_text

    def take_scores(self, segment: Segment, found: ScoreRows, first: int) -> None:
        """Of the segment's targets, which begin where a block does: those of `found` from row
        `first` on."""
        last = first + len(segment.targets)
        for row in range(first, last, CHUNK_TOKENS):
            block = (segment.first_position + row - first) // CHUNK_TOKENS
            own = self.prompt_scores.setdefault(block, BlockScores())
            own.rows = found.rows(row, min(row + CHUNK_TOKENS, last), segment.scoring)

    def prompt_output(self, tokenizer: Tokenizer) -> tuple[LogprobsOfStep | None, ...] | None:
        """Of each prompt token but the first, which follows nothing, and those before the first
        that is wanted; None if not asked for. Beside it the likeliest tokens, as many as are asked
        for. Where ranks are not, one is known of tokens that are among the likeliest."""
        if self.first_scored is None:
            return None
        count = self.request.params.prompt_logprobs
        steps: list[LogprobsOfStep | None] = [None] * self.first_scored
        for place in range(self.first_scored, self.num_prompt):
            block, row = divmod(place - 1, CHUNK_TOKENS)
            found = self.prompt_scores[block].rows
            assert found is not None, "the pass of a row has run"
            token = self.request.prompt_token_ids[place]
            best = found.best_RK[row].tolist()
            rank = best.index(token) + 1 if token in best else None
            if found.ranks_R is not None:
                rank = int(found.ranks_R[row])
            pairs = zip(best, found.best_logprobs_RK[row].tolist(), strict=True)
            top = tuple((i, logprob, 1 + n) for n, (i, logprob) in enumerate(pairs))[:count]
            own = Sampled(token, float(found.logprobs_R[row]), rank, top)
            steps.append(own.as_logprobs(tokenizer))
        return tuple(steps)

    def output(self, tokenizer: Tokenizer) -> CompletionOutput:
        """The sequence as it stands."""
        has_logprobs = self.request.params.logprobs is not None
        steps: list[LogprobsOfStep] = [
            step.as_logprobs(tokenizer) for step in self.logprobs.steps()
        ]
        return CompletionOutput(
            index=self.queued.index,
            text=self.text.text if self.text is not None else "",
            token_ids=tuple(self.output_ids),
            cumulative_logprob=self.cumulative_logprob if has_logprobs else None,
            logprobs=tuple(steps) if has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

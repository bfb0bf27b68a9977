"""The tokens of one pass, frozen. Knows positions and pages, not requests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from windlass.ids import Home
from windlass.plan import Schedule

CHUNK_TOKENS = (
    64  # prompt chunks and micro-batches end at multiples of this, or at the prompt's end
)
# Tokens; with more, kernels take so long that it hardly matters how one calls them.
MOST_CAPTURED = 16


def fitting_rows(left: int, room: int) -> int:
    """Of a prompt in a pass: all that is left of it, or up to a multiple of CHUNK_TOKENS."""
    return left if left <= room else room // CHUNK_TOKENS * CHUNK_TOKENS


def most_drafts(sequences: int, each: int) -> int:
    """Drafted tokens of a pass of up to `sequences`, `each` of one: logits are kept for so many."""
    return min(sequences * each, max(MOST_CAPTURED, sequences))


class Scoring(NamedTuple):
    """What is told of a target beside its log-probability: so many of the likeliest tokens in its
    place, and its own rank among all."""

    top: int = 1
    ranks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive tokens of one sequence: a chunk of its prompt, or generated ones."""

    sequence: int  # its number: the same in all passes, no other sequence has it
    token_ids: tuple[int, ...]
    first_position: int
    pages: tuple[int, ...]  # of the whole sequence, oldest first
    state_slot: int  # -1 where the model keeps no recurrent state
    state_source: int = -1  # another sequence's slot that it goes on from; -1: its own
    kept_states: tuple[tuple[int, int], ...] = ()  # of positions, the slot of the state before them
    is_prompt: bool
    long_rope: bool
    wants_logits: bool  # after the last token, and after those that `num_drafts` says
    takes_likeliest: bool = False  # of those logits, only the likeliest token is asked for
    # Of the last tokens, those that are guesses: logits are wanted after each of them and after the
    # one before them. A guess that was wrong is computed for nothing, and so are those behind it.
    num_drafts: int = 0
    home: Home = Home.DEVICE
    targets: tuple[
        int, ...
    ] = ()  # tokens whose log-probability is wanted, each after one of the first
    scoring: Scoring = Scoring()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_logits(self) -> int:
        """Tokens, the last ones, after which logits are wanted."""
        return 1 + self.num_drafts if self.wants_logits else 0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Consecutive tokens of a pass that go through attention together, of sequences of one home."""

    first_token: int
    num_tokens: int
    segments: tuple[Segment, ...]

    @property
    def home(self) -> Home:
        """Of its sequences."""
        return self.segments[0].home


class RowsOfKind(NamedTuple):
    """Consecutive rows of a group, `first` up to `last`, all of prompts or all generated."""

    first: int
    last: int
    is_prompt: bool


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Micro-batches of a pass, one after the other, whose rows go through routing and experts
    together. While those of one group do, the attention of the others may be under way."""

    first_token: int
    num_tokens: int
    micro_batches: tuple[MicroBatch, ...]

    def kinds(self) -> tuple[RowsOfKind, ...]:
        """Its rows, in their order, in as few pieces as there can be."""
        found: list[RowsOfKind] = []
        row = 0
        for one in (segment for micro in self.micro_batches for segment in micro.segments):
            first, row = row, row + one.num_tokens
            if found and found[-1].is_prompt is one.is_prompt:
                first = found.pop().first
            found.append(RowsOfKind(first, row, one.is_prompt))
        return tuple(found)

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch]) -> "RowGroup":
        """Of at least one."""
        tokens = sum(micro.num_tokens for micro in micro_batches)
        return cls(micro_batches[0].first_token, tokens, tuple(micro_batches))


@dataclass(frozen=True, slots=True)
class Batch:
    """All tokens of one pass, segment by segment, in at least one group. They may read keys and
    values that earlier ones of the pass write: attention takes the micro-batches of a layer in
    their order."""

    segments: tuple[Segment, ...]
    num_tokens: int
    groups: tuple[RowGroup, ...]
    scoring: Scoring = Scoring()  # enough for all targets

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """Of all groups, in their order."""
        return [micro for group in self.groups for micro in group.micro_batches]

    @property
    def sequences(self) -> list[int]:
        """The sequence of each token."""
        return [s.sequence for s in self.segments for _ in s.token_ids]

    @property
    def positions(self) -> list[int]:
        """Where each token is in its sequence."""
        return [s.first_position + i for s in self.segments for i in range(s.num_tokens)]

    @property
    def logit_rows(self) -> list[int]:
        """Tokens of the pass after which logits are wanted, as indices, in segment order."""
        whole, likeliest = self.whole_and_likeliest_rows
        return sorted(whole + likeliest) if likeliest else whole

    @property
    def whole_and_likeliest_rows(self) -> tuple[list[int], list[int]]:
        """Of `logit_rows`, those of which more is asked than the likeliest token, and the others,
        both in segment order."""
        whole: list[int] = []
        likeliest: list[int] = []
        first = 0
        for segment in self.segments:
            first += segment.num_tokens
            rows = likeliest if segment.takes_likeliest else whole
            rows.extend(range(first - segment.num_logits, first))
        return whole, likeliest

    @property
    def scored_rows(self) -> list[int]:
        """Those after which the log-probability of another token is wanted, in segment order."""
        rows: list[int] = []
        first = 0
        for segment in self.segments:
            rows.extend(range(first, first + len(segment.targets)))
            first += segment.num_tokens
        return rows

    @property
    def targets(self) -> list[int]:
        """Those other tokens, one for each of `scored_rows`."""
        return [token for segment in self.segments for token in segment.targets]


def make_batch(segments: list[Segment], *, micro_batch_tokens: int, groups: int = 1) -> Batch:
    """Cuts the tokens into micro-batches of at most `micro_batch_tokens` (at least CHUNK_TOKENS),
    and those into so many groups, or as many as there are micro-batches.

    A segment is cut only at a position that is a multiple of CHUNK_TOKENS. Another micro-batch
    begins where the next sequence has another home.
    """
    assert micro_batch_tokens >= CHUNK_TOKENS, "a micro-batch holds at least one chunk"
    micro: list[MicroBatch] = []
    open_segments: list[Segment] = []
    first_token = tokens = 0

    def close() -> None:
        nonlocal first_token, tokens, open_segments
        if open_segments:
            micro.append(MicroBatch(first_token, tokens, tuple(open_segments)))
            first_token, tokens, open_segments = first_token + tokens, 0, []

    for segment in segments:
        if open_segments and open_segments[0].home is not segment.home:
            close()
        rest = segment
        while rest.num_tokens > micro_batch_tokens - tokens:
            fitting = _fitting(rest, micro_batch_tokens - tokens)
            if fitting:
                part, rest = _cut(rest, fitting)
                open_segments.append(part)
                tokens += fitting
            close()
        open_segments.append(rest)
        tokens += rest.num_tokens
    close()
    count = min(groups, len(micro))
    ends = [len(micro) * i // count for i in range(count + 1)]
    cut = tuple(RowGroup.of(micro[begin:end]) for begin, end in pairwise(ends))
    scored = [s.scoring for s in segments if s.targets]
    scoring = Scoring(max((one.top for one in scored), default=1), any(one.ranks for one in scored))
    return Batch(tuple(segments), sum(s.num_tokens for s in segments), cut, scoring)


def is_capturable(batch: Batch) -> bool:
    """Whether other passes can be as this one: a few sequences, one token of each or some that
    were generated or drafted."""
    return (
        batch.num_tokens <= MOST_CAPTURED
        and len(batch.micro_batches) == 1
        and batch.micro_batches[0].home is Home.DEVICE
        and all(one.num_tokens == 1 or not one.is_prompt for one in batch.segments)
    )


def passes_of(batch: Batch, schedule: Schedule) -> list[Batch]:
    """What goes through all layers together: the whole batch, or ("model-based", the baseline of
    FlexGen and DeepSpeed) every micro-batch by itself, so that weights pass once for each."""
    if schedule == "module-based":
        return [batch]
    alone = ((m, RowGroup.of((replace(m, first_token=0),))) for m in batch.micro_batches)
    return [Batch(m.segments, m.num_tokens, (group,), batch.scoring) for m, group in alone]


def _cut(segment: Segment, count: int) -> tuple[Segment, Segment]:
    """The first `count` tokens, fewer than all, and the rest."""
    left = segment.num_tokens - count
    before = max(0, segment.num_logits - left)  # logits wanted of the first part
    first = replace(
        segment,
        token_ids=segment.token_ids[:count],
        targets=segment.targets[:count],
        wants_logits=before > 0,
        num_drafts=max(0, before - 1),
    )
    rest = replace(
        segment,
        token_ids=segment.token_ids[count:],
        targets=segment.targets[count:],
        first_position=segment.first_position + count,
        state_source=-1,
        num_drafts=segment.num_drafts - before,
    )
    return first, rest


def _fitting(segment: Segment, room: int) -> int:
    """Most tokens that fit into `room` and end at a multiple of CHUNK_TOKENS; 0 if none do."""
    end = (segment.first_position + room) // CHUNK_TOKENS * CHUNK_TOKENS
    return max(0, end - segment.first_position)

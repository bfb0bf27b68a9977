"""Where the tokens of a pass are in the KV cache, and all else that a device has to know of them,
which goes there in one copy. Knows no layers."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, chain, count, repeat
from typing import NamedTuple

import torch

from windlass.decoder.state_rows import StateRows, StateSegment
from windlass.device.base import Allocator
from windlass.kernels.interface import AttentionWork, RowTiles, WorkTables
from windlass.models.spec import Rope
from windlass.schedule.batch import Batch, MicroBatch, Segment


class AttentionMetadata(NamedTuple):
    """Where the tokens of a micro-batch are: computed once per pass, used by all layers."""

    positions: torch.Tensor  # of each token in its sequence: (T,) int64
    pages: torch.Tensor  # that hold them: (T,) int64
    offsets: torch.Tensor  # within those pages: (T,) int64
    long_rope: torch.Tensor  # whether of a sequence that may outgrow the original context
    work: AttentionWork
    segments: StateRows
    tables: dict[Rope, tuple[torch.Tensor, torch.Tensor]]  # cos and sin, filled as layers ask
    length: int  # of the longest sequence so far: all positions are below


class PassRows(NamedTuple):
    """The tokens of a pass, all int64 and of one piece of memory."""

    tokens_T: torch.Tensor
    metadata: dict[int, AttentionMetadata]  # of micro-batches, by their first token
    # rows of the pass, as the batch has them
    whole_R: torch.Tensor
    likeliest_R: torch.Tensor
    scored_R: torch.Tensor
    targets_R: torch.Tensor  # tokens, of the rows before
    before_T: torch.Tensor  # what the caller gave
    cleared_P: torch.Tensor  # pages, as the caller gave them


class Numbers:
    """What goes to a device together."""

    def __init__(self) -> None:
        self._values: list[int] = []
        self._sizes: list[int] = []

    def add(self, values: Iterable[int]) -> int:
        """Which of `sent` they will be."""
        before = len(self._values)
        self._values.extend(values)
        self._sizes.append(len(self._values) - before)
        return len(self._sizes) - 1

    def sent(self, memory: Allocator) -> Sequence[torch.Tensor]:
        return torch.split(memory.tensor(self._values, dtype=torch.int64), self._sizes)


class _Tables(NamedTuple):
    """Which of `sent` the fields of `WorkTables` are."""

    pages: int
    sequences: int
    tiles: dict[RowTiles, int]


class _Micro(NamedTuple):
    """Of a micro-batch, what no other has. `tables`: None where kernels run on the host, which
    reads the work."""

    micro: MicroBatch
    work: AttentionWork
    segments: tuple[StateSegment, ...]
    single_rows: int
    single_slots: int
    tables: _Tables | None


def pass_rows(
    batch: Batch,
    page_tokens: int,
    memory: Allocator,
    before: Sequence[int] = (),
    cleared: Sequence[int] = (),
    tiles: Iterable[RowTiles] = (),
) -> PassRows:
    """Of `batch`, in `memory`; pages hold `page_tokens` tokens. `before`, `cleared`: further
    numbers. `tiles`: how kernels take rows."""
    numbers = Numbers()
    segments, flat = batch.segments, chain.from_iterable
    spans = [range(s.first_position, s.first_position + s.num_tokens) for s in segments]
    of_all = (
        flat(spans),
        [
            s.pages[at // page_tokens]
            for s, span in zip(segments, spans, strict=True)
            for at in span
        ],
        flat(repeat(int(s.long_rope), s.num_tokens) for s in segments),
        flat(s.token_ids for s in segments),
    )
    rows = (*batch.whole_and_likeliest_rows, batch.scored_rows, batch.targets, before, cleared)
    for own in (*of_all, *rows):
        numbers.add(own)
    ahead = tuple(tiles) if memory.streams.runs_ahead else None
    micros = [_micro(one, numbers, ahead) for one in batch.micro_batches]
    sent = numbers.sent(memory)
    positions_T, pages_T, long_T, tokens_T, *picked = sent[: len(of_all) + len(rows)]
    each = positions_T, pages_T, positions_T % page_tokens, long_T.bool()
    metadata = {
        one.micro.first_token: _metadata(one, sent, each if len(micros) == 1 else _of(one, each))
        for one in micros
    }
    return PassRows(tokens_T, metadata, *picked)


def _of(one: _Micro, of_all: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Its rows."""
    first = one.micro.first_token
    return [numbers[first : first + one.micro.num_tokens] for numbers in of_all]


def work_of(segments: Sequence[Segment]) -> AttentionWork:
    """Of rows that are side by side."""
    counts = tuple(s.num_tokens for s in segments)
    return AttentionWork(
        first_row=tuple(accumulate(counts, initial=0))[:-1],
        num_rows=counts,
        first_position=tuple(s.first_position for s in segments),
        pages=tuple(s.pages for s in segments),
        is_prompt=tuple(s.is_prompt for s in segments),
    )


def _micro(micro: MicroBatch, numbers: Numbers, tiles: tuple[RowTiles, ...] | None) -> _Micro:
    """`tiles`: None where kernels read the work."""
    work = work_of(micro.segments)
    segments = tuple(
        StateSegment(
            first_row=row,
            num_rows=s.num_tokens,
            first_position=s.first_position,
            slot=s.state_slot,
            is_prompt=s.is_prompt,
            source=s.state_source,
            kept=tuple(
                (end - s.first_position, slot)
                for end, slot in s.kept_states
                if 0 < end - s.first_position <= s.num_tokens
            ),
        )
        for row, s in zip(work.first_row, micro.segments, strict=True)
    )
    single = [s for s in segments if s.slot >= 0 and s.num_rows == 1 and not s.is_prompt]
    tables = None
    if tiles is not None:
        longest = max(map(len, work.pages))
        tables = _Tables(
            numbers.add(chain.from_iterable(_filled_up(own, longest) for own in work.pages)),
            numbers.add(chain.from_iterable(map(repeat, count(), work.num_rows))),
            {
                kind: numbers.add(chain.from_iterable(zip(*work.tiles(kind), strict=True)))
                for kind in tiles
                if kind.is_prompt in work.is_prompt
            },
        )
    rows, slots = numbers.add(s.first_row for s in single), numbers.add(s.slot for s in single)
    return _Micro(micro, work, segments, rows, slots, tables)


def _filled_up(pages: tuple[int, ...], size: int) -> tuple[int, ...]:
    """With pages that nobody reads."""
    return pages + pages[-1:] * (size - len(pages))


def _metadata(
    one: _Micro, sent: Sequence[torch.Tensor], own: Iterable[torch.Tensor]
) -> AttentionMetadata:
    """`own`: positions, pages, offsets and kinds of rotation of its rows."""
    micro, work = one.micro, one.work
    positions_T, pages_T, offsets_T, long_T = own
    if one.tables is not None:
        pages, sequences, tiles = one.tables
        tables = WorkTables(
            sent[pages].view(len(work.pages), -1),
            sent[sequences],
            positions_T + 1,
            {kind: sent[which].view(5, -1) for kind, which in tiles.items()},
        )
        work = replace(work, tables=tables)
    return AttentionMetadata(
        positions_T,
        pages_T,
        offsets_T,
        long_T,
        work,
        StateRows(one.segments, sent[one.single_rows], sent[one.single_slots]),
        {},
        max(s.first_position + s.num_tokens for s in micro.segments),
    )

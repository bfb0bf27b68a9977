"""Where the rows of a pass are, and passes that can be repeated. Knows no layers."""

from typing import NamedTuple

import torch

from windlass.decoder.delta import Segment as DeltaSegment
from windlass.kernels.base import AttentionWork, Recorder
from windlass.schedule.batch import Batch, MicroBatch
from windlass.spec.model import Rope

_REPEATED_ROWS = 16  # beyond, kernels take so long that it does not matter how they are called


class Places(NamedTuple):
    """Where the rows of a micro-batch are: computed once per pass, used by all layers."""

    positions: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor
    long_rope: torch.Tensor
    work: AttentionWork
    delta: list[DeltaSegment]
    tables: dict[Rope, tuple[torch.Tensor, torch.Tensor]]  # cos and sin, filled as layers ask


def places_of(micro: MicroBatch, page_tokens: int) -> Places:
    positions: list[int] = []
    pages: list[int] = []
    long_rope: list[bool] = []
    first_rows: list[int] = []
    for segment in micro.segments:
        first_rows.append(len(positions))
        span = range(segment.first_position, segment.first_position + segment.num_rows)
        positions.extend(span)
        pages.extend(segment.pages[position // page_tokens] for position in span)
        long_rope.extend([segment.long_rope] * segment.num_rows)
    work = AttentionWork(
        first_row=tuple(first_rows),
        num_rows=tuple(s.num_rows for s in micro.segments),
        first_position=tuple(s.first_position for s in micro.segments),
        pages=tuple(s.pages for s in micro.segments),
        is_prompt=tuple(s.is_prompt for s in micro.segments),
    )
    delta = [
        DeltaSegment(
            first_row=row,
            num_rows=s.num_rows,
            first_position=s.first_position,
            slot=s.state_slot,
            is_prompt=s.is_prompt,
        )
        for row, s in zip(first_rows, micro.segments, strict=True)
    ]
    where = torch.tensor(positions)
    return Places(
        where, torch.tensor(pages), where % page_tokens, torch.tensor(long_rope), work, delta, {}
    )


def is_repeatable(batch: Batch) -> bool:
    """Whether other passes can be as this one: a few sequences, one row of each."""
    return (
        batch.num_rows <= _REPEATED_ROWS
        and len(batch.micro_batches) == 1
        and len(batch.segments) == batch.num_rows
    )


class Step:
    """Passes of equally many rows, one of each sequence: their hidden states and places lie in the
    same memory, so that what was noted of one holds for the next."""

    def __init__(self, recorder: Recorder, places: Places, hidden_TD: torch.Tensor) -> None:
        self.recorder = recorder
        self.hidden_TD = hidden_TD
        self._places = places
        recorder.begin(places.work)

    @property
    def num_rows(self) -> int:
        return len(self.hidden_TD)

    def next(self, places: Places, hidden_TD: torch.Tensor) -> Places:
        """Takes the rows of the next pass over; where they are from now on."""
        own = self._places
        self.hidden_TD.copy_(hidden_TD)
        own.positions.copy_(places.positions)
        own.pages.copy_(places.pages)
        own.offsets.copy_(places.offsets)
        for rope, tables in own.tables.items():
            for to, table in zip(tables, places.tables[rope], strict=True):
                to.copy_(table)
        self.recorder.begin(places.work)
        self._places = places._replace(
            positions=own.positions, pages=own.pages, offsets=own.offsets, tables=own.tables
        )
        return self._places

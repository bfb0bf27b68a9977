"""Where the rows of a pass are in the cache. Knows no layers."""

from typing import NamedTuple

import torch

from windlass.decoder.delta import DeltaSegment
from windlass.kernels.interface import AttentionWork
from windlass.models.spec import Rope
from windlass.schedule.batch import MicroBatch


class AttentionMetadata(NamedTuple):
    """Where the rows of a micro-batch are: computed once per pass, used by all layers."""

    positions: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor
    long_rope: torch.Tensor
    work: AttentionWork
    delta: list[DeltaSegment]
    tables: dict[Rope, tuple[torch.Tensor, torch.Tensor]]  # cos and sin, filled as layers ask


def attention_metadata(micro: MicroBatch, page_tokens: int) -> AttentionMetadata:
    positions: list[int] = []
    pages: list[int] = []
    long_rope: list[bool] = []
    first_rows: list[int] = []
    for segment in micro.segments:
        first_rows.append(len(positions))
        span = range(segment.first_position, segment.first_position + segment.num_tokens)
        positions.extend(span)
        pages.extend(segment.pages[position // page_tokens] for position in span)
        long_rope.extend([segment.long_rope] * segment.num_tokens)
    work = AttentionWork(
        first_row=tuple(first_rows),
        num_rows=tuple(s.num_tokens for s in micro.segments),
        first_position=tuple(s.first_position for s in micro.segments),
        pages=tuple(s.pages for s in micro.segments),
        is_prompt=tuple(s.is_prompt for s in micro.segments),
    )
    delta = [
        DeltaSegment(
            first_row=row,
            num_rows=s.num_tokens,
            first_position=s.first_position,
            slot=s.state_slot,
            is_prompt=s.is_prompt,
        )
        for row, s in zip(first_rows, micro.segments, strict=True)
    ]
    where = torch.tensor(positions)
    return AttentionMetadata(
        where, torch.tensor(pages), where % page_tokens, torch.tensor(long_rope), work, delta, {}
    )

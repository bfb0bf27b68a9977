"""Where the tokens of a pass are in the KV cache. Knows no layers."""

from typing import NamedTuple

import torch

from windlass.decoder.state_rows import StateSegment
from windlass.device.base import Allocator
from windlass.kernels.interface import AttentionWork
from windlass.models.spec import Rope
from windlass.schedule.batch import MicroBatch


class AttentionMetadata(NamedTuple):
    """Where the tokens of a micro-batch are: computed once per pass, used by all layers."""

    positions: torch.Tensor  # of each token in its sequence: (T,) int64
    pages: torch.Tensor  # that hold them: (T,) int64
    offsets: torch.Tensor  # within those pages: (T,) int64
    long_rope: torch.Tensor  # whether of a sequence that may outgrow the original context
    work: AttentionWork
    segments: list[StateSegment]
    tables: dict[Rope, tuple[torch.Tensor, torch.Tensor]]  # cos and sin, filled as layers ask
    length: int  # of the longest sequence so far: all positions are below


def attention_metadata(micro: MicroBatch, page_tokens: int, memory: Allocator) -> AttentionMetadata:
    """Of the tokens of `micro`, in `memory`; pages hold `page_tokens` tokens."""
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
    segments = [
        StateSegment(
            first_row=row,
            num_rows=s.num_tokens,
            first_position=s.first_position,
            slot=s.state_slot,
            is_prompt=s.is_prompt,
        )
        for row, s in zip(first_rows, micro.segments, strict=True)
    ]
    positions_T = memory.tensor(positions, dtype=torch.int64)
    return AttentionMetadata(
        positions_T,
        memory.tensor(pages, dtype=torch.int64),
        positions_T % page_tokens,
        memory.tensor(long_rope, dtype=torch.bool),
        work,
        segments,
        {},
        max(s.first_position + s.num_tokens for s in micro.segments),
    )

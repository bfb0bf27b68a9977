"""Byte ranges of a checkpoint one after the other, the next being read while one is used. Two
buffers, whatever the checkpoint's size."""

import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from windlass.checkpoint.reader import WeightSource
from windlass.device.base import ALIGN_BYTES
from windlass.units import round_up


class Range(NamedTuple):
    """Bytes of one file."""

    file: str
    begin: int
    end: int


def read_ahead(source: WeightSource, ranges: Sequence[Range]) -> Iterator[torch.Tensor]:
    """The bytes of each range (uint8), valid until the next is asked for; or CheckpointError."""
    if not ranges:
        return
    longest = max(one.end - one.begin for one in ranges)
    buffers = [mmap.mmap(-1, round_up(longest, ALIGN_BYTES) + ALIGN_BYTES) for _ in range(2)]

    def read(index: int) -> torch.Tensor:
        one, buffer = ranges[index], buffers[index % 2]
        first = one.begin // ALIGN_BYTES * ALIGN_BYTES
        last = round_up(one.end, ALIGN_BYTES)
        if last > first:
            source.read(one.file, first, memoryview(buffer)[: last - first])
        stored = torch.frombuffer(buffer, dtype=torch.uint8)
        return stored[one.begin - first : one.end - first]

    with ThreadPoolExecutor(1, thread_name_prefix="windlass-read") as reader:
        coming = reader.submit(read, 0)
        for index in range(len(ranges)):
            data = coming.result()
            if index + 1 < len(ranges):
                coming = reader.submit(read, index + 1)
            yield data

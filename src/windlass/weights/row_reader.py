"""Single rows of a table that stays on disk: embeddings of the tokens at hand. Knows one tensor."""

from collections.abc import Sequence

import torch

from windlass.checkpoint.layout import ITEM_BYTES
from windlass.checkpoint.part_reads import ByteRange, merge_ranges
from windlass.checkpoint.views import dtype_of
from windlass.device.base import ALIGN_BYTES, ByteSource, Device
from windlass.models.names import TensorInfo
from windlass.units import round_up
from windlass.weights.io_queue import Priority
from windlass.weights.transfer import TransferQueue, file_copies

_ROWS_PER_BATCH = 256


def row_buffer_bytes(info: TensorInfo) -> int:
    """Memory that a RowReader of the (V, D) table `info` allocates."""
    return _ROWS_PER_BATCH * (round_up(_row_bytes(info), ALIGN_BYTES) + ALIGN_BYTES)


def _row_bytes(info: TensorInfo) -> int:
    return info.shape[1] * ITEM_BYTES[info.dtype]


class RowReader:
    """Reads rows of the table `info` (V, D), several in flight. One caller at a time."""

    def __init__(
        self, info: TensorInfo, source: ByteSource, queue: TransferQueue, device: Device
    ) -> None:
        assert len(info.shape) == 2, f"{info.name}: expected (V, D), got {info.shape}"
        self._info = info
        self._source = source
        self._queue = queue
        self._device = device
        self._staging = device.allocate(row_buffer_bytes(info))

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """(len(rows), D) in the stored type. Rows that occur twice are read once."""
        num_rows = self._info.shape[0]
        bad = [row for row in rows if not 0 <= row < num_rows]
        assert not bad, f"{self._info.name}: got row {bad[:1]}, allowed 0 to {num_rows - 1}"
        distinct = sorted(set(rows))
        raw = self._device.empty(len(distinct), _row_bytes(self._info), dtype=torch.uint8)
        for start in range(0, len(distinct), _ROWS_PER_BATCH):
            stop = start + _ROWS_PER_BATCH
            self._read_batch(distinct[start:stop], raw[start:stop])
        place = {row: i for i, row in enumerate(distinct)}
        index = self._device.tensor([place[row] for row in rows], dtype=torch.int64)
        return raw.view(dtype_of(self._info.dtype))[index]

    def _read_batch(self, rows: list[int], out: torch.Tensor) -> None:
        size = _row_bytes(self._info)
        spans = [
            ByteRange(self._info.file, begin, begin + size)
            for begin in (self._info.begin + row * size for row in rows)
        ]
        reads = merge_ranges(spans, gap_bytes=0)
        label = f"{len(rows)} rows of {self._info.name}"
        over: list[bool] = []
        self._staging.last_use = self._device.streams.compute.record()  # of the rows before
        with self._queue.changed:
            self._queue.raise_error()
            self._queue.submit(
                file_copies(self._source, reads, self._staging, label),
                priority=Priority.DEMAND,
                on_done=lambda: over.append(True),
            )
            self._queue.wait(lambda: bool(over))
        current = iter(reads)
        read = next(current)
        for i, span in enumerate(spans):
            while span.begin >= read.offset + read.num_bytes:
                read = next(current)
            at = read.at + span.begin - read.offset
            out[i].copy_(self._staging.data[at : at + size])

"""How fast the disk reads, with the reader and the lanes that a run has (checkpoint/reader.py,
device/cpu.py): cold, by the bytes of one read and the reads in flight."""

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

from windlass.checkpoint.reader import Checkpoint
from windlass.checkpoint.safetensors import encode_header
from windlass.device.base import ALIGN_BYTES, Copy, FileRange
from windlass.device.cpu import CpuDevice
from windlass.doctor.timing import Timing
from windlass.errors import CheckpointError, UsageError
from windlass.hardware.profile import Curve
from windlass.models.names import TensorInfo
from windlass.units import KIB, MIB, format_bytes
from windlass.weights.io_queue import BLOCK_BYTES

READ_BYTES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB)
IN_FLIGHT = (1, 4, 8)
_SAMPLES = 3
_SAMPLE_S = 0.25
_SAMPLE_BYTES = (
    48 * MIB
)  # all samples read about 2.4 GiB: no place of a checkpoint that large twice
_LEAST_READS = 3  # of a sample
_FILE_BYTES = 1 << 30  # of the file that is read where there is no checkpoint
_FILE_SHARE = 0.1  # of what the disk has free, at most
_FEWEST_BYTES = 64 * MIB
_ENOUGH = 0.97  # fewer reads in flight are taken where they reach this share of the best rate

Mode = Literal["auto", "dio", "buffered"]


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Bytes/s by (bytes of a read, reads in flight), each with its spread."""

    rates: Mapping[tuple[int, int], float]
    spread: Mapping[tuple[int, int], float]
    mode: str  # "dio" or "buffered"
    read_bytes: int  # of what was read; places are read again beyond it
    is_repeated: bool  # whether that happened

    @property
    def in_flight(self) -> int:
        """The fewest reads in flight that are nearly as fast as any, at the block size of runs, or
        the largest that was read."""
        block = max(size for size, _ in self.rates if size <= BLOCK_BYTES)
        at_block = {depth: rate for (size, depth), rate in self.rates.items() if size == block}
        best = max(at_block.values())
        return min(depth for depth, rate in at_block.items() if rate >= _ENOUGH * best)

    @property
    def curve(self) -> Curve:
        """Over the bytes of one read, at `in_flight`."""
        depth = self.in_flight
        return Curve(
            tuple(
                (size, rate) for (size, each), rate in sorted(self.rates.items()) if each == depth
            )
        )


def measure_disk(
    folder: Path,
    *,
    mode: Mode = "auto",
    clock: Callable[[], float] = time.perf_counter,
) -> DiskRates:
    """Of the weight files in `folder`, at places in random order, none twice before all."""
    with _opened(folder, mode) as source:
        drop_cached(folder)
        places = _Places(folder, source)
        rates: dict[tuple[int, int], float] = {}
        spread: dict[tuple[int, int], float] = {}
        for depth in IN_FLIGHT:
            lanes = _Lanes(source, depth, clock)
            try:
                for size in places.sizes:
                    timing = lanes.measure(size, places)
                    rates[size, depth] = size / timing.median_s
                    spread[size, depth] = timing.spread
            finally:
                lanes.close()
        return DiskRates(rates, spread, source.mode, places.total_bytes, places.is_repeated)


@contextmanager
def scratch_checkpoint(cache: Path) -> Iterator[Path]:
    """A folder below `cache` with one weight file of random bytes, written to the disk and dropped
    from memory; removed at the end, also after an error."""
    cache.mkdir(parents=True, exist_ok=True)
    stats = os.statvfs(cache)
    size = min(_FILE_BYTES, int(_FILE_SHARE * stats.f_bavail * stats.f_frsize))
    if size < _FEWEST_BYTES:
        raise UsageError(
            f"{cache}: {format_bytes(stats.f_bavail * stats.f_frsize)} free, a file to read needs"
            f" {format_bytes(_FEWEST_BYTES / _FILE_SHARE)}: free some, or give --model a checkpoint"
        )
    size -= size % MIB
    with tempfile.TemporaryDirectory(dir=cache, prefix="read-test-") as name:
        _write(Path(name) / "model.safetensors", size)
        yield Path(name)


def _write(path: Path, size: int) -> None:
    header = encode_header([TensorInfo("x", path.name, "U8", (size,), 0, size)])
    block = bytearray(os.urandom(4 * MIB))
    with path.open("wb") as file:
        file.write(header)
        for i in range(0, size, len(block)):
            block[:8] = i.to_bytes(8, "little")  # no two blocks alike
            file.write(block[: size - i])
        file.flush()
        os.fsync(file.fileno())


def drop_cached(folder: Path) -> None:
    """Gives back what the system keeps of the files in memory, as far as it is written."""
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


@contextmanager
def _opened(folder: Path, mode: Mode) -> Iterator[Checkpoint]:
    source = Checkpoint(folder, mode=mode)
    try:
        yield source
    finally:
        source.close()


class _Places:
    """Where to read next: all aligned places of a size in random order, over and over; one order
    goes on through all measurements, so that a place is read again as late as can be."""

    def __init__(self, folder: Path, source: Checkpoint) -> None:
        names = sorted({info.file for info in source.tensors.values()})
        self._sizes = {name: (folder / name).stat().st_size for name in names}
        self._random = random.Random(0)
        self._used = 0
        self._cells: list[tuple[str, int]] = []
        self._cell: tuple[str, int] | None = None
        self._inside = 0
        self.is_repeated = False
        self.sizes = [size for size in READ_BYTES if size <= max(self._sizes.values())]
        if not self.sizes:
            raise CheckpointError(
                f"{folder}: the weight files have {format_bytes(self.total_bytes)}, reads of"
                f" {format_bytes(READ_BYTES[0])} are the smallest that are measured: leave --model"
                " out"
            )
        self._grid = self.sizes[-1]

    @property
    def total_bytes(self) -> int:
        return sum(self._sizes.values())

    def next(self, size: int) -> tuple[str, int]:
        """A file and an offset with `size` bytes before its end."""
        if self._cell is None or self._inside + size > self._grid:
            if not self._cells:
                self.is_repeated = self._used > 0
                self._cells = list(self._whole_cells())
                self._random.shuffle(self._cells)
            self._cell, self._inside = self._cells.pop(), 0
            self._used += 1
        file, offset = self._cell
        place = offset + self._inside
        # small reads are scattered too: a few from each cell
        self._inside += max(size, self._grid // 8)
        return file, place

    def _whole_cells(self) -> Iterator[tuple[str, int]]:
        for name, size in self._sizes.items():
            for offset in range(0, size - self._grid + 1, self._grid):
                yield name, offset


class _Lanes:
    """`depth` reads at a time on the device of runs."""

    def __init__(self, source: Checkpoint, depth: int, clock: Callable[[], float]) -> None:
        self._source = source
        self._depth = depth
        self._clock = clock
        self._device = CpuDevice(depth)
        self._memory = [self._device.allocate(max(READ_BYTES)) for _ in range(depth)]
        self._ended: SimpleQueue[tuple[int, Exception | None]] = SimpleQueue()

    def measure(self, size: int, places: _Places) -> Timing:
        """Seconds per read of `size` bytes, `depth` at a time."""
        most = max(_LEAST_READS, _SAMPLE_BYTES // size)
        samples = []
        for _ in range(_SAMPLES):
            begin = self._clock()
            started = ended = 0
            for lane in range(self._depth):
                self._start(lane, size, places)
                started += 1
            while ended < started:
                lane, error = self._ended.get()
                if error is not None:
                    raise error
                ended += 1
                in_time = self._clock() - begin < _SAMPLE_S
                if started < _LEAST_READS or (started < most and in_time):
                    self._start(lane, size, places)
                    started += 1
            samples.append((self._clock() - begin) / started)
        return Timing(tuple(samples))

    def _start(self, lane: int, size: int, places: _Places) -> None:
        file, offset = places.next(size)
        assert offset % ALIGN_BYTES == 0 and size % ALIGN_BYTES == 0
        source = FileRange(self._source, file, offset, size)
        copy = Copy(source, self._memory[lane].part(0, size), "measure")
        self._device.submit(copy, lambda error: self._ended.put((lane, error)))

    def close(self) -> None:
        self._device.close()

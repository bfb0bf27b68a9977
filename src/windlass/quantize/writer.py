"""The loop over all tensors: read, round or copy, write. One tensor at a time, in chunks of rows,
so that memory does not depend on the model."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from math import sqrt
from typing import NamedTuple

import torch

from windlass.checkpoint.layout import ITEM_BYTES
from windlass.checkpoint.reader import WeightSource
from windlass.checkpoint.views import dtype_of
from windlass.errors import CheckpointError
from windlass.models.names import TensorInfo
from windlass.quantize.output_folder import Folder, Record
from windlass.quantize.reading import Range, read_ahead
from windlass.quantize.rounding import Rounded, pack_rows, round_to_nearest
from windlass.quantize.scheme import IntegerScheme
from windlass.quantize.shards import TensorPlaces
from windlass.quantize.targets import Kept, Target, TargetMatrix
from windlass.units import MIB

_CHUNK_BYTES = 16 * MIB  # read at once
# Elements that a thread rounds at once: buffers that fit its caches. What a tile is depends on the
# matrix alone, so that results do not depend on the number of threads.
_TILE_ELEMENTS = 1 << 18


class Chunk(NamedTuple):
    """Rows of a matrix, or bytes of a tensor that is copied."""

    target: int
    first: int
    last: int
    is_last: bool


def write_targets(
    source: WeightSource,
    folder: Folder,
    work: tuple[Sequence[Target], TensorPlaces, IntegerScheme],
    *,
    threads: int,
    on_bytes: Callable[[int], None],
) -> None:
    """Writes every target that `folder` does not have yet; `on_bytes` gets how many bytes of the
    source went by. Raises CheckpointError and JobError."""
    targets, places, scheme = work
    chunks = list(_chunks(targets, first=len(folder.records)))
    ranges = [_range(targets[chunk.target], chunk) for chunk in chunks]
    sums = _ErrorSums()
    with _workers(threads) as pool:
        for chunk, data in zip(chunks, read_ahead(source, ranges), strict=True):
            target, tensors = targets[chunk.target], places.tensors[chunk.target]
            if isinstance(target, Kept):
                info = tensors[0]
                folder.write(info.file, info.begin + chunk.first, data.numpy().data)
            else:
                parts = _round(pool, target, data, scheme)
                _write_rows(folder, tensors, chunk.first, parts)
                sums.add(parts)
            on_bytes(len(data))
            if chunk.is_last:
                if isinstance(target, TargetMatrix):
                    _write_shape(folder, tensors[2], target)
                folder.finish(_record(target, sums))
                sums = _ErrorSums()


class _ErrorSums:
    """Errors of a matrix, chunk by chunk."""

    def __init__(self) -> None:
        self.error = self.square = self.most = 0.0

    def add(self, parts: Sequence[Rounded]) -> None:
        for part in parts:
            self.error += part.squared_error
            self.square += part.squared_sum
            self.most = max(self.most, part.max_error)


def _record(target: Target, sums: _ErrorSums) -> Record:
    if isinstance(target, Kept):
        return {"tensor": target.name, "kept": target.why}
    return {
        "tensor": target.name,
        "kind": target.kind,
        "shape": list(target.shape),
        "relative_rms_error": sqrt(sums.error / sums.square) if sums.square else 0.0,
        "max_error": sums.most,
    }


def _chunks(targets: Sequence[Target], *, first: int) -> Iterator[Chunk]:
    for index in range(first, len(targets)):
        target = targets[index]
        if isinstance(target, TargetMatrix):
            size = target.shape[0]
            step = max(1, _CHUNK_BYTES // (target.shape[1] * ITEM_BYTES[target.source.dtype]))
        else:
            size, step = target.source.end - target.source.begin, _CHUNK_BYTES
        for begin in range(0, max(size, 1), step):  # an empty tensor is a chunk too
            yield Chunk(index, begin, min(begin + step, size), begin + step >= size)


def _range(target: Target, chunk: Chunk) -> Range:
    """The bytes of a chunk in the source."""
    source, unit = target.source, 1
    if isinstance(target, TargetMatrix):
        unit = target.shape[1] * ITEM_BYTES[source.dtype]
    return Range(source.file, source.begin + chunk.first * unit, source.begin + chunk.last * unit)


def _round(
    pool: Executor, target: TargetMatrix, data: torch.Tensor, scheme: IntegerScheme
) -> list[Rounded]:
    """Rows of a matrix, tile by tile; the codes packed."""
    dtype, width = dtype_of(target.source.dtype), target.shape[1]
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    rows_NK = data.view(dtype).view(-1, width)
    tiles = torch.split(rows_NK, max(1, _TILE_ELEMENTS // width))

    def work(tile_NK: torch.Tensor) -> Rounded:
        rounded = round_to_nearest(tile_NK, scheme, dtype)
        return rounded._replace(codes_NK=pack_rows(rounded.codes_NK, scheme.bits))

    try:
        return list(pool.map(work, tiles))
    except ValueError as error:
        raise CheckpointError(f"{target.source.file}: tensor {target.source.name}: {error}") from (
            error
        )


def _write_rows(
    folder: Folder,
    tensors: Sequence[TensorInfo],
    first: int,
    parts: Sequence[Rounded],
) -> None:
    codes, scales, _ = tensors
    for info, data in (
        (codes, torch.cat([part.codes_NK for part in parts])),
        (scales, torch.cat([part.scales_NB for part in parts])),
    ):
        row_bytes = (info.end - info.begin) // info.shape[0]
        raw = data.contiguous().view(-1).view(torch.uint8).numpy().data
        folder.write(info.file, info.begin + first * row_bytes, raw)


def _write_shape(folder: Folder, info: TensorInfo, target: TargetMatrix) -> None:
    shape = b"".join(size.to_bytes(8, "little") for size in target.shape)
    folder.write(info.file, info.begin, memoryview(shape))


@contextmanager
def _workers(threads: int) -> Iterator[Executor]:
    """Threads that each compute alone: torch's own would have to meet after every operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="windlass-round") as pool:
            yield pool
    finally:
        torch.set_num_threads(before)

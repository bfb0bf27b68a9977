"""How a part is fetched: aligned reads into a slot, and where each tensor then lies in it. Knows
ranges and shapes, no memory; needs no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from windlass.checkpoint.layout import ITEM_BYTES
from windlass.device.base import ALIGN_BYTES
from windlass.errors import CheckpointError
from windlass.ids import Part, WeightKey
from windlass.models.names import Layout, PackedShape, Piece, Role, TensorInfo, ViewOp
from windlass.units import KIB, round_up

# Reading a small gap costs less than a second read: 64 KiB take 30 us at 2 GB/s.
_MERGE_GAP_BYTES = 64 * KIB


class Read(NamedTuple):
    """One range of a file; all numbers are multiples of ALIGN_BYTES."""

    file: str
    offset: int
    num_bytes: int
    at: int  # where in the slot


@dataclass(frozen=True, slots=True)
class Placement:
    """One canonical tensor inside a part, or one tensor of a packed matrix. `at`: any byte offset
    from where the part's tensors begin."""

    name: str
    at: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]
    ops: tuple[ViewOp, ...]
    role: Role
    packed: PackedShape | None


@dataclass(frozen=True, slots=True)
class PartReads:
    """Everything needed to fetch one part. `num_bytes` of slot are filled. Parts of the same
    `placements` differ by where they begin in their slots alone. `tensors`: their names on disk."""

    reads: tuple[Read, ...]
    begin: int
    placements: tuple[Placement, ...]
    tensors: tuple[str, ...]
    num_bytes: int


class ByteRange(NamedTuple):
    """Wanted bytes of a file, anywhere."""

    file: str
    begin: int
    end: int


def make_part_reads(key: WeightKey, layout: Layout, tensors: Mapping[str, TensorInfo]) -> PartReads:
    """Reads and placements of `key`. Raises CheckpointError where the checkpoint lacks a tensor or
    has another type or size than the layout says."""
    pieces = layout.parts[key]
    ranges = [_range_of(key, piece, tensors) for piece in pieces]
    reads = merge_ranges(ranges, gap_bytes=_MERGE_GAP_BYTES)
    places = [_place_of(span, reads) for span in ranges]
    begin = min(places)
    placements = tuple(
        Placement(
            name=piece.name,
            at=at - begin,
            num_bytes=span.end - span.begin,
            dtype=tensors[piece.tensor].dtype,
            shape=piece.shape,
            ops=piece.ops,
            role=piece.role,
            packed=piece.packed,
        )
        for piece, span, at in zip(pieces, ranges, places, strict=True)
    )
    names = tuple(piece.tensor for piece in pieces)
    return PartReads(reads, begin, placements, names, sum(read.num_bytes for read in reads))


def _place_of(span: ByteRange, reads: Iterable[Read]) -> int:
    """Where in the slot `span` begins."""
    return next(
        read.at + span.begin - read.offset
        for read in reads
        if read.file == span.file
        and read.offset <= span.begin
        and span.end <= read.offset + read.num_bytes
    )


def merge_ranges(ranges: Iterable[ByteRange], *, gap_bytes: int) -> tuple[Read, ...]:
    """Aligned reads that cover `ranges`, in file order, laid end to end. Neighbours less than
    `gap_bytes` apart, or touching, become one read."""
    merged: list[tuple[str, int, int]] = []
    for file, begin, end in sorted(ranges):
        begin -= begin % ALIGN_BYTES
        end = round_up(end, ALIGN_BYTES)
        if merged:
            last_file, last_begin, last_end = merged[-1]
            if last_file == file and begin - last_end < max(gap_bytes, 1):
                merged[-1] = (file, last_begin, max(last_end, end))
                continue
        merged.append((file, begin, end))
    reads = []
    at = 0
    for file, begin, end in merged:
        reads.append(Read(file, begin, end - begin, at))
        at += end - begin
    return tuple(reads)


def slot_bytes(layout: Layout, tensors: Mapping[str, TensorInfo]) -> dict[Part, int]:
    """Bytes of a slot for each kind of part: what its largest key needs. Touches every key, so that
    it also finds everything that the checkpoint lacks."""
    sizes: dict[Part, int] = {}
    for key in layout.parts:
        sizes[key.part] = max(
            sizes.get(key.part, 0), make_part_reads(key, layout, tensors).num_bytes
        )
    return sizes


def _range_of(key: WeightKey, piece: Piece, tensors: Mapping[str, TensorInfo]) -> ByteRange:
    info = tensors.get(piece.tensor)
    if info is None:
        raise CheckpointError(
            f"tensor {piece.tensor}: expected for {piece.name} of {key}, found no tensor of that"
            " name in the checkpoint"
        )
    where = f"{info.file}: tensor {piece.tensor}"
    if info.dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{where}: expected {', '.join(ITEM_BYTES)} for {piece.name} of {key}, found"
            f" {info.dtype}"
        )
    if not 0 <= piece.start < piece.stop <= prod(info.shape):
        raise CheckpointError(
            f"{where}: expected elements {piece.start} to {piece.stop} for {piece.name} of {key},"
            f" found shape {list(info.shape)}"
        )
    assert prod(piece.shape) == piece.stop - piece.start, f"{key} {piece}"
    item = ITEM_BYTES[info.dtype]
    return ByteRange(info.file, info.begin + piece.start * item, info.begin + piece.stop * item)

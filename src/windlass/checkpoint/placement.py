"""Where tensors lie in a slot of a device, and what is moved there from a slot that holds the bytes
of files. Knows ranges and shapes, no memory; needs no torch."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from windlass.checkpoint.part_reads import PartReads, Placement
from windlass.device.base import ALIGN_BYTES
from windlass.ids import Part
from windlass.units import round_up

# Kernels load 16 bytes at once where addresses allow it; files put tensors at any offset
PLACE_BYTES = 256


class Move(NamedTuple):
    """`num_bytes` from `begin` in the one slot to `at`, a multiple of PLACE_BYTES, in the other."""

    begin: int
    at: int
    num_bytes: int


class Placed(NamedTuple):
    """A part in a slot of the device: how its tensors lie there (nothing is read from files), and
    the moves that bring them."""

    part_reads: PartReads
    moves: tuple[Move, ...]


class _Stretch(NamedTuple):
    """Bytes of a slot that tensors share or that one has for itself."""

    begin: int
    num_bytes: int


# Of a part: each tensor, where it begins in its stretch, which of the part's stretches that is, in
# the order in which tensors come to them, and its bytes. It does not depend on the order on disk.
_Signature = tuple[tuple[Placement, int, int], ...]


class DeviceLayout:
    """Offsets of tensors in the slots of a device, the same for all parts of equal tensors,
    whatever the files look like: every tensor begins at a multiple of PLACE_BYTES, except that
    those which share bytes keep their distance. The first part of its kind says the order."""

    def __init__(self) -> None:
        self._offsets: dict[_Signature, tuple[int, ...]] = {}  # by number of the stretch

    def slot_bytes(self, parts: Iterable[tuple[Part, PartReads]]) -> dict[Part, int]:
        """What a slot of each kind takes here that is to hold any of `parts`."""
        sizes: dict[Part, int] = {}
        for part, reads in parts:
            sizes[part] = max(sizes.get(part, 0), self.place(reads).part_reads.num_bytes)
        return sizes

    def place(self, reads: PartReads) -> Placed:
        """Where a part goes that `reads` put into a slot."""
        stretches = _stretches(reads.placements)
        order: dict[_Stretch, int] = {}  # numbers
        own = []
        for place in reads.placements:
            stretch = next(s for s in reversed(stretches) if s.begin <= place.at)
            number = order.setdefault(stretch, len(order))
            own.append((replace(place, at=place.at - stretch.begin), number, stretch.num_bytes))
        signature = tuple(own)
        offsets = self._offsets.get(signature)
        if offsets is None:
            offsets = self._offsets[signature] = _offsets(stretches, order)
        placements = tuple(
            replace(place, at=offsets[number] + place.at) for place, number, _ in signature
        )
        moves: list[Move] = []
        for stretch in stretches:
            begin, at = reads.begin + stretch.begin, offsets[order[stretch]]
            _add(moves, Move(begin, at, stretch.num_bytes))
        end = max(offsets[number] + stretch.num_bytes for stretch, number in order.items())
        size = round_up(end, ALIGN_BYTES)
        return Placed(PartReads((), 0, placements, reads.tensors, size), tuple(moves))


def _stretches(placements: tuple[Placement, ...]) -> list[_Stretch]:
    """Those of all tensors, in the order of the slot."""
    found: list[_Stretch] = []
    for begin, size in sorted((place.at, place.num_bytes) for place in placements):
        if found and begin < found[-1].begin + found[-1].num_bytes:
            last = found.pop()
            size = max(last.num_bytes, begin + size - last.begin)
            begin = last.begin
        found.append(_Stretch(begin, size))
    return found


def _offsets(stretches: list[_Stretch], order: dict[_Stretch, int]) -> tuple[int, ...]:
    """One stretch behind the other, as they lie in the slot that they come from."""
    offsets = [0] * len(stretches)
    at = 0
    for stretch in stretches:
        offsets[order[stretch]] = at
        at += round_up(stretch.num_bytes, PLACE_BYTES)
    return tuple(offsets)


def _add(moves: list[Move], move: Move) -> None:
    """Adds `move`, as one with the last where both are neighbours here as there: what lies between
    them is less than PLACE_BYTES and belongs to nobody."""
    if moves:
        last = moves[-1]
        distance = move.begin - last.begin
        is_near = distance - last.num_bytes < PLACE_BYTES
        if is_near and distance == move.at - last.at:
            moves[-1] = Move(last.begin, last.at, distance + move.num_bytes)
            return
    moves.append(move)

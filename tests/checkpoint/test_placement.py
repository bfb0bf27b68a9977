"""Where tensors lie on a device: at multiples of 256, alike in all parts that are alike, and moved
there in as few pieces as the files allow."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeSource
from windlass.checkpoint.part_reads import PartReads, Placement, make_part_reads
from windlass.checkpoint.placement import PLACE_BYTES, DeviceLayout, Move
from windlass.checkpoint.views import make_views
from windlass.device.base import ALIGN_BYTES
from windlass.ids import Part, WeightKey
from windlass.models.names import Layout, Piece, Take
from windlass.tensors import plain


def placement(name: str, at: int, num_bytes: int) -> Placement:
    return Placement(name, at, num_bytes, "U8", (num_bytes,), (), "whole", None)


def part(*placements: Placement, begin: int = 40) -> PartReads:
    end = max(place.at + place.num_bytes for place in placements)
    names = tuple(place.name for place in placements)
    return PartReads((), begin, placements, names, begin + end)


def placed_at(layout: DeviceLayout, reads: PartReads) -> dict[str, int]:
    return {place.name: place.at for place in layout.place(reads).part_reads.placements}


def test_neighbours_of_usual_sizes_are_one_move():
    reads = part(placement("gate", 0, 512), placement("up", 512, 256), placement("down", 768, 100))
    placed = DeviceLayout().place(reads)
    assert placed.moves == (Move(40, 0, 868),)
    assert placed.part_reads.num_bytes == ALIGN_BYTES and placed.part_reads.reads == ()
    assert [place.at for place in placed.part_reads.placements] == [0, 512, 768]


def test_a_tensor_of_odd_size_and_a_gap_part_the_moves():
    odd = part(placement("a", 0, 100), placement("b", 100, 256))
    assert DeviceLayout().place(odd).moves == (Move(40, 0, 100), Move(140, 256, 256))
    gap = part(placement("a", 0, 256), placement("b", 5000, 256))
    assert DeviceLayout().place(gap).moves == (Move(40, 0, 256), Move(5040, 256, 256))
    padded = part(placement("a", 0, 100), placement("b", 256, 256))
    assert DeviceLayout().place(padded).moves == (Move(40, 0, 512),), (
        "what lies between is nobody's"
    )


def test_equal_parts_have_equal_offsets_in_whatever_order_files_have_them():
    layout = DeviceLayout()
    first = part(placement("gate", 256, 200), placement("down", 0, 256))
    other = part(placement("gate", 0, 200), placement("down", 1000, 256), begin=7)
    assert placed_at(layout, first) == placed_at(layout, other) == {"down": 0, "gate": 256}
    assert layout.place(other).moves == (Move(7, 256, 200), Move(1007, 0, 256))
    unlike = part(placement("gate", 0, 200), placement("down", 1000, 512))
    assert placed_at(layout, unlike) == {"gate": 0, "down": 256}


def test_tensors_that_share_bytes_share_their_place():
    reads = part(placement("gate", 300, 100), placement("up", 300, 100), placement("x", 350, 90))
    placed = DeviceLayout().place(reads)
    assert placed.moves == (Move(340, 0, 140),)
    assert [place.at for place in placed.part_reads.placements] == [0, 0, 50]


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.sampled_from((4, 100, 256, 300, 512)), min_size=1, max_size=5),
    gaps=st.lists(st.sampled_from((0, 4, 156, 300)), min_size=5, max_size=5),
    order=st.randoms(), begin=st.integers(0, 50), shared=st.booleans(),
)  # fmt: skip
def test_moves_bring_the_bytes_of_every_tensor(sizes, gaps, order, begin, shared):
    layout = DeviceLayout()
    layouts = []
    for turn in range(2):  # two parts alike, in two orders on disk
        names = list(enumerate(sizes))
        order.shuffle(names)
        at, found = 0, {}
        for (i, size), gap in zip(names, gaps, strict=False):
            at += gap + turn
            found[i] = placement(f"t{i}", at, size)
            at += size
        least = min(place.at for place in found.values())
        places = [replace(found[i], at=found[i].at - least) for i in range(len(sizes))]
        if shared:
            places.append(replace(places[0], name="view"))
        reads = part(*places, begin=begin)
        placed = layout.place(reads)
        source = torch.randint(0, 256, (reads.num_bytes + 8,), dtype=torch.uint8)
        into = torch.full((placed.part_reads.num_bytes,), 255, dtype=torch.uint8)
        covered = 0
        for move in placed.moves:
            assert move.at % PLACE_BYTES == 0 and move.num_bytes > 0
            into[move.at : move.at + move.num_bytes] = source[move.begin :][: move.num_bytes]
            covered += move.num_bytes
        assert covered <= sum(sizes) + PLACE_BYTES * len(sizes)
        expected, got = (
            make_views(which, memory, is_known=True)
            for which, memory in ((reads, source), (placed.part_reads, into))
        )
        assert not got.has_copies
        for name in expected.tensors:
            assert torch.equal(plain(got.tensors, name), plain(expected.tensors, name)), name
        layouts.append(placed.part_reads.placements)
    assert layouts[0] == layouts[1]


def test_views_of_fused_tensors_are_moved_once():
    fused = torch.arange(2 * 6 * 8).view(2, 6, 8).half()
    source = FakeSource({"fused": fused}, gap_bytes=6)
    pieces = tuple(
        Piece(name, "fused", 48, 96, (6, 8), (Take(0, first, 6, 2),))
        for first, name in enumerate(("gate", "up"))
    )
    key = WeightKey(Part.EXPERT, 0, 1)
    reads = make_part_reads(key, Layout({key: pieces}, ()), source.tensors)
    placed = DeviceLayout().place(reads)
    assert [move.num_bytes for move in placed.moves] == [96]

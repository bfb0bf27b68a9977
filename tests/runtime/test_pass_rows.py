"""What a device is told of a pass: one list of numbers, taken apart there."""

import torch

from fake_cuda import FakeCuda
from windlass.device.host_memory import HostAllocator
from windlass.kernels.interface import RowTiles
from windlass.runtime.attention_metadata import PassRows, pass_rows
from windlass.schedule.batch import Segment, make_batch

PAGE = 16


def _segment(number: int, first: int, count: int, **more: object) -> Segment:
    settings = dict(
        sequence=number,
        token_ids=tuple(range(10 * number, 10 * number + count)),
        first_position=first,
        pages=tuple(100 * number + i for i in range(-(-(first + count) // PAGE))),
        state_slot=number,
        is_prompt=count > 3,
        long_rope=number == 2,
        wants_logits=True,
    )
    return Segment(**(settings | more))  # type: ignore[arg-type]


SEGMENTS = [
    _segment(1, 0, 60, targets=(7, 8)),
    _segment(2, 40, 1, takes_likeliest=True),
    _segment(3, 15, 3, num_drafts=2),
]


def _check(rows: PassRows) -> None:
    """Of `SEGMENTS` in micro-batches of 64 rows: two and a row of three."""
    assert rows.tokens_T.tolist() == [*range(10, 70), 20, 30, 31, 32]
    assert rows.whole_R.tolist() == [59, 61, 62, 63] and rows.likeliest_R.tolist() == [60]
    assert rows.scored_R.tolist() == [0, 1] and rows.targets_R.tolist() == [7, 8]
    assert rows.before_T.tolist() == [3, 4]
    (one,) = rows.metadata.values()
    assert one.positions.tolist() == [*range(60), 40, 15, 16, 17] and one.length == 60
    assert one.pages[-4:].tolist() == [202, 300, 301, 301]
    assert one.offsets[-4:].tolist() == [8, 15, 0, 1]
    assert one.long_rope.nonzero().flatten().tolist() == [60]
    assert one.segments.single_rows.tolist() == [60]
    assert one.segments.single_slots.tolist() == [2]


def test_on_the_host_kernels_read_the_work_itself():
    batch = make_batch(SEGMENTS, micro_batch_tokens=64)
    rows = pass_rows(batch, PAGE, HostAllocator(), before=[3, 4])
    _check(rows)
    assert rows.metadata[0].work.tables is None


def test_on_a_device_there_are_tables_of_it_in_the_same_copy():
    device, batch = FakeCuda(), make_batch(SEGMENTS, micro_batch_tokens=64)
    with device.watched(), device.streams.on(device.streams.compute):
        kinds = RowTiles(True, 50), RowTiles(False, 2)
        made = pass_rows(batch, PAGE, device, before=[3, 4], cleared=[102, 300], tiles=kinds)
        assert device.num_uploads == 1
    device.synchronize()
    _check(made)
    assert made.cleared_P.tolist() == [102, 300]
    tables = made.metadata[0].work.tables
    assert tables is not None
    assert tables.pages_SP.tolist() == [
        [100, 101, 102, 103],
        [200, 201, 202, 202],
        [300, 301, 301, 301],
    ]
    assert tables.sequences_T.tolist() == [0] * 60 + [1, 2, 2, 2]
    assert tables.lengths_T.tolist() == [*range(1, 61), 41, 16, 17, 18]
    assert {kind: table.t().tolist() for kind, table in tables.tiles.items()} == {
        RowTiles(True, 50): [[0, 0, 50, 0, 0], [0, 50, 10, 50, 50]],
        RowTiles(False, 2): [[1, 60, 1, 40, 0], [2, 61, 2, 15, 1], [2, 63, 1, 17, 3]],
    }
    by_row = made.metadata[0].work.by_row().tables
    assert by_row is not None and by_row.sequences_T.tolist() == list(range(64))
    assert torch.equal(by_row.pages_SP[-1], tables.pages_SP[2]) and not by_row.tiles


def test_micro_batches_have_their_own_rows():
    batch = make_batch([_segment(1, 0, 100), _segment(2, 40, 1)], micro_batch_tokens=64)
    first, second = pass_rows(batch, PAGE, HostAllocator()).metadata.values()
    assert first.positions.tolist() == list(range(64)) and first.length == 64
    assert second.positions.tolist() == [*range(64, 100), 40] and second.length == 100
    assert second.segments.single_rows.tolist() == [36]

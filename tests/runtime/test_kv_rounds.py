"""Which pages come to a device for attention, where they are put and in which pieces they move."""

from collections.abc import Callable
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from windlass.ids import Home
from windlass.runtime.kv_rounds import (
    Ahead,
    Run,
    Staged,
    half_bytes,
    half_pages,
    num_pages,
    read_pages,
    rounds_of,
)
from windlass.schedule.batch import MicroBatch, Segment
from windlass.units import MIB

PAGE = 32
NOWHERE = 99


def _segment(first: int, count: int, pages: tuple[int, ...], number: int = 0) -> Segment:
    return Segment(
        sequence=number, token_ids=(0,) * count, first_position=first, pages=pages, state_slot=-1,
        is_prompt=count > 1, long_rope=False, wants_logits=False, home=Home.STREAMED,
    )  # fmt: skip


def _micro(*segments: Segment) -> MicroBatch:
    return MicroBatch(0, sum(one.num_tokens for one in segments), segments)


def _staged(*segments: Segment) -> Staged:
    (one,) = rounds_of(_micro(*segments), PAGE, 1000)
    return Staged(one, PAGE, NOWHERE)


def test_pages_side_by_side_move_together():
    staged = _staged(_segment(100, 1, (7, 8, 9, 3)), _segment(64, 1, (20, 21, 22)))
    early, late = staged.wanted(None, ())
    assert early == [Run(7, 0, 3), Run(3, 3, 1), Run(20, 4, 2)] and not late
    assert staged.fresh == [6] and staged.back() == [Run(3, 3, 1), Run(22, 6, 1)]
    assert staged.table(None) == [(0, 1, 2, 3), (4, 5, 6)]
    assert staged.places() == ([3, 6], [4, 0])


def test_of_a_window_only_what_it_sees_comes():
    staged = _staged(_segment(200, 1, tuple(range(10, 17))))
    early, _ = staged.wanted(40, ())
    assert early == [Run(15, 5, 2)], "positions 161 to 199"
    assert staged.table(40) == [(NOWHERE,) * 5 + (5, 6)]
    assert read_pages(_segment(200, 1, ()), PAGE, 41).start == 5
    assert read_pages(_segment(200, 1, ()), PAGE, 42).start == 4


def test_a_shared_page_comes_once_and_what_this_pass_writes_comes_late():
    shared = (5, 6)
    readers = [_segment(64, 1, (*shared, page)) for page in (8, 9)]
    staged = _staged(*readers)
    assert staged.wanted(None, ()) == ([Run(5, 0, 2)], [])
    assert staged.wanted(None, {6}) == ([Run(5, 0, 1)], [Run(6, 1, 1)])
    writer = _segment(0, 64, shared)
    assert list(_staged(writer).written) == [5, 6]
    together = _staged(writer, *readers)
    assert together.wanted(None, ()) == ([], []), "what the round itself writes is there"
    assert together.fresh == [0, 1, 2, 3]


def test_a_place_holds_the_longest_sequence_and_usually_64_mib():
    assert half_pages(4096, PAGE, 1024) == 512
    assert half_pages(4096, PAGE, 32 * 1000) == 1001
    assert half_bytes(4096, PAGE, 1024) == 513 * PAGE * 4096 + MIB


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 90)), min_size=1, max_size=8),
    st.integers(1, 30), st.sampled_from((None, 1, 40, 500)),
)  # fmt: skip
def test_rounds_have_all_rows_and_few_pages_and_all_that_rows_see(lengths, most, window):
    segments, page = [], 0
    for number, (first, count) in enumerate(lengths):
        own = _segment(first, count, (), number)
        pages = tuple(range(page, page + num_pages(own, PAGE) + 1))[::-1]
        segments.append(replace(own, pages=pages))
        page += len(pages)
    found = rounds_of(_micro(*segments), PAGE, most)
    assert [s for one in found for s in one.segments] == segments
    row = 0
    for one in found:
        assert one.first_row == row and one.num_rows == sum(s.num_tokens for s in one.segments)
        row += one.num_rows
        total = sum(num_pages(s, PAGE) for s in one.segments)
        assert total <= most or len(one.segments) == 1
        staged = Staged(one, PAGE, NOWHERE)
        early, _ = staged.wanted(window, ())
        came = {run.slot + i: run.page + i for run in early for i in range(run.num_pages)}
        slots = iter(zip(*staged.places(), strict=True))
        for segment, table in zip(one.segments, staged.table(window), strict=True):
            last = segment.first_position + segment.num_tokens
            oldest = 0 if window is None else max(0, segment.first_position - window + 1)
            for position in range(oldest, segment.first_position):
                assert came[table[position // PAGE]] == segment.pages[position // PAGE]
            for position in range(segment.first_position, last):
                assert next(slots) == (table[position // PAGE], position % PAGE)
        assert not set(staged.fresh) & set(came)


def test_one_is_on_its_way_while_another_is_used():
    told: list[str] = []

    def todo(number: int) -> Callable[[], Callable[[], None]]:
        def begin() -> Callable[[], None]:
            told.append(f"begin {number}")
            return lambda: told.append(f"wait {number}")

        return begin

    ahead = Ahead()
    ahead.begin([todo(i) for i in range(3)])
    for _ in range(3):
        ahead.take()
    assert told == ["begin 0", "begin 1", "wait 0", "begin 2", "wait 1", "wait 2"]
    ahead.begin(())

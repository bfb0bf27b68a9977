"""Who gets which rows: none is lost, doubled or given to two at once, whoever leaves."""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest

from amounts import some
from windlass.batch.jobfile import JobRow
from windlass.protocol.openai import Endpoint
from windlass.ray.begins import Begins
from windlass.ray.dispatch import Dispatch


def row(index: int, text: str = "") -> JobRow:
    body: dict[str, Any] = {"prompt": text or f"row {index}"}
    return JobRow(
        index, index + 1, index.to_bytes(16, "big"), f"r{index}", Endpoint.COMPLETIONS, body
    )


def dispatch_of(rows: Sequence[JobRow]) -> Dispatch:
    return Dispatch(iter(rows), len(rows), lambda indices: [rows[i] for i in indices])


@pytest.mark.parametrize("seed", range(some(40, 400)))
def test_every_row_ends_once_whoever_joins_and_leaves(seed: int) -> None:
    random = Random(seed)
    rows = [row(i, f"{'x' * 600}{random.randrange(4)}{'y' * 600}{i}") for i in range(200)]
    dispatch = dispatch_of(rows)
    flying: dict[int, set[int]] = {}
    ended: list[int] = []
    next_name = 0
    while dispatch.num_left:
        choice = random.random()
        if not flying or (choice < 0.1 and len(flying) < 5):
            dispatch.join(next_name, window=random.randint(1, 20))
            flying[next_name] = set()
            next_name += 1
        name = random.choice(list(flying))
        if choice > 0.9:
            assert dispatch.leave(name) == len(flying.pop(name))
        elif choice > 0.4:
            for given in dispatch.next_rows(name):
                assert given.body == rows[given.index].body, "a row comes whole, also again"
                assert all(given.index not in own for own in flying.values())
                flying[name].add(given.index)
        elif flying[name]:
            index = random.choice(sorted(flying[name]))
            flying[name].discard(index)
            found = dispatch.end(name, index)
            assert found is not None and found.digest == rows[index].digest
            dispatch.spend(name, random.random())
            ended.append(index)
    assert sorted(ended) == list(range(200))


def test_a_row_of_somebody_else_does_not_end() -> None:
    dispatch = dispatch_of([row(i) for i in range(4)])
    dispatch.join(0, 2)
    dispatch.join(1, 2)
    (given,) = dispatch.next_rows(0)
    assert dispatch.end(1, given.index) is None
    assert dispatch.num_left == 4


def test_nobody_gets_more_than_its_window_or_reads_the_file_far_ahead() -> None:
    read = 0

    def endless() -> Iterator[JobRow]:
        nonlocal read
        while True:
            read += 1
            yield row(read - 1)

    dispatch = Dispatch(endless(), 10_000_000, lambda indices: [])
    dispatch.join(0, 16)
    assert len(given := dispatch.next_rows(0)) == 8
    assert dispatch.next_rows(0) == []
    dispatch.end(0, given[0].index)
    dispatch.spend(0, 1.0)
    assert len(dispatch.next_rows(0)) == 9
    assert dispatch.next_rows(0) == []
    assert read <= 4096 + 64


def test_the_end_is_shared_by_speed() -> None:
    """One that is four times as fast gets four times as much, and both end together."""
    rows = [row(i) for i in range(1000)]
    dispatch = dispatch_of(rows)
    speeds, counts = {0: 4, 1: 1}, {0: 0, 1: 0}
    flying: dict[int, list[int]] = {0: [], 1: []}
    for name in speeds:
        dispatch.join(name, 300)
    last = {}
    second = 0
    while dispatch.num_left:
        second += 1
        for name, speed in speeds.items():
            flying[name] += [one.index for one in dispatch.next_rows(name)]
            for index in flying[name][:speed]:
                assert dispatch.end(name, index) is not None
                counts[name] += 1
                last[name] = second
            del flying[name][:speed]
            dispatch.spend(name, 1.0)
    assert 3.5 < counts[0] / counts[1] < 4.5
    assert abs(last[0] - last[1]) < 0.1 * second


def test_rows_that_begin_alike_go_to_one_replica() -> None:
    """Twelve documents of forty questions each, mixed: a document is with one replica, but where
    another would have nothing."""
    documents = [f"{i}" * 3000 for i in range(12)]
    order = [documents[i % 12] for i in range(480)]
    Random(1).shuffle(order)
    rows = [row(i, f"{text} question {i}") for i, text in enumerate(order)]
    dispatch = dispatch_of(rows)
    owners: dict[str, set[int]] = {text: set() for text in documents}
    for name in range(3):
        dispatch.join(name, 8)
    while dispatch.num_left:
        for name in range(3):
            for given in dispatch.next_rows(name):
                owners[order[given.index]].add(name)
                dispatch.end(name, given.index)
            dispatch.spend(name, 1.0)
    assert sum(len(names) for names in owners.values()) <= 12 + 3


def test_one_beginning_for_all_keeps_nobody_idle() -> None:
    rows = [row(i, "a system prompt that all have" * 50 + f"{i}") for i in range(100)]
    dispatch = dispatch_of(rows)
    for name in range(4):
        dispatch.join(name, 10)
    assert [len(dispatch.next_rows(name)) for name in range(4)] == [5, 5, 5, 5]


def test_beginnings_are_told_apart_behind_what_all_share() -> None:
    shared = "one system prompt for everybody. " * 20  # 660 characters
    texts = [shared + letter * 2000 + f"{i}" for i, letter in enumerate("aabbab")]
    names = Begins().names([row(i, text) for i, text in enumerate(texts)])
    assert names[0] == names[1] == names[4] != names[2]
    assert names[2] == names[3] == names[5]
    alone = Begins().names([row(0, "x" * 1000), row(1, "y" * 1000)])
    assert alone[0] != alone[1]

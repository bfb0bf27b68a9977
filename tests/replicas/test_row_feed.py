"""One replica for many callers."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from fake_engine import FakeEngine
from replica_rows import computed
from windlass.batch.jobfile import JobRow, read_line
from windlass.errors import UsageError
from windlass.options import EngineOptions
from windlass.ray.data_rows import REQUEST, with_request
from windlass.ray.messages import EndedRow, ReplicaSpec, Report
from windlass.ray.replica import Replica
from windlass.ray.row_feed import RowFeed

STATS = FakeEngine().stats()


def row(name: str, index: int = 0) -> JobRow:
    asked = {"custom_id": name, "prompt": name, "sampling_params": {"max_tokens": 9}}
    return read_line(with_request(asked, None)[REQUEST].encode(), index)


def open_replica() -> Replica:
    spec = ReplicaSpec(options=EngineOptions(), served_names=("m",), created=5)
    return Replica(spec, FakeEngine())


def test_each_caller_gets_its_own_rows() -> None:
    names = [f"row {i}" for i in range(60)]
    with open_replica() as replica:
        numbered = [row(name, index) for index, name in enumerate(names)]
        alone = [one.line for one in computed(replica, numbered)]
    found: dict[str, bytes] = {}

    def ask(own: Sequence[str]) -> None:
        futures = [(name, feed.submit(row(name))) for name in own]
        found.update({name: future.result(10).line for name, future in futures})

    with RowFeed(open_replica()) as feed:
        callers = [threading.Thread(target=ask, args=(names[i::4],)) for i in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert [found[name] for name in names] == alone


class _Breaks:
    """A replica that computes nothing and raises once it has three rows."""

    def __init__(self) -> None:
        self.count = 0
        self.is_closed = False

    def exchange(self, rows: Sequence[JobRow], timeout_s: float) -> Report:
        self.count += len(rows)
        if self.count >= 3:
            raise OSError("the disk is gone")
        return Report((), STATS)

    def close(self) -> None:
        self.is_closed = True


def test_what_a_replica_raises_comes_to_all() -> None:
    replica = _Breaks()
    feed = RowFeed(replica)
    futures = [feed.submit(row(name)) for name in "abc"]
    for future in (*futures, feed.submit(row("d"))):
        with pytest.raises(OSError, match="the disk is gone"):
            future.result(10)
    feed.close()
    assert replica.is_closed


def test_rows_that_are_left_at_the_end_are_told() -> None:
    feed = RowFeed(_Breaks())
    left: Future[EndedRow] = feed.submit(row("a"))
    assert not left.cancel()  # nobody can take a row back
    feed.close()
    for future in (left, feed.submit(row("b"))):
        with pytest.raises(UsageError, match="closed before all had ended"):
            future.result(10)
    feed.close()

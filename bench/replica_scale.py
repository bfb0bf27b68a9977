"""What binds the driver of many replicas: the transport measured, then a simulation with it.

    python bench/replica_scale.py --steps bench/results/driver_scale.json [--json FILE] [--quick]
    python bench/replica_scale.py --transport FILE --steps FILE --json FILE

*Transport* (needs Ray; `--transport FILE` takes the one of an earlier document): two actors that
answer at once, two calls under way with each, the pool's own records, rows of 490 bytes, results
of 600. Seconds of the driver's processor, all threads, and of the clock, for a call of 1, 8 and 64
rows.

*Simulation*: discrete events on a virtual clock; the pool's own code gives out the rows. Replicas
differ in speed (log-normal), rows in length (exponential). What ended is sent as soon as the driver
has answered the last message, and the answer brings new rows. The driver is one thread: a message
costs what a call did, each row what its steps did (`driver_scale.py`). Replicas die (exponential)
and start again; their rows go to others and all work on them is lost.
"""

import argparse
import heapq
import json
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from machine import ROOT, Others, describe, table, write

sys.path.insert(0, str(ROOT / "tests" / "support"))
from fake_engine import FakeEngine
from windlass.batch.jobfile import JobRow, read_line
from windlass.batch.journal import JournalState
from windlass.ray.dispatch import Dispatch
from windlass.ray.messages import EndedRow, Report

_LINE = b"x" * 600
_IN_FLIGHT = 2  # calls for each actor


class Costs(NamedTuple):
    """Seconds of the driver's one thread; `latency_s`: each way, nobody's work."""

    message_s: float
    give_row_s: float
    store_row_s: float
    latency_s: float = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """`rows_per_s`: of a middling replica that is full. `capacity`: rows it computes at once.
    `window`: rows it has in all. `death_every_s`: mean life; None: none dies."""

    replicas: int = 64
    rows: int
    rows_per_s: float
    capacity: int = 64
    window: int = 128
    spread: float = 0.4  # standard deviation of the logarithm of speed
    death_every_s: float | None = None
    start_s: float = 120.0
    noticed_s: float = 1.0  # from a death until the driver knows


class _Replica:
    """One life of a replica. Rows are their indices."""

    def __init__(self, name: int, mean_s: float) -> None:
        self.name = name  # no other life has it
        self.mean_s = mean_s  # of one row
        self.coming: list[int] = []  # in the driver's answer
        self.waiting: deque[int] = deque()
        self.ended: list[int] = []
        self.running = 0
        self.has_call = False  # the driver has not answered the last message
        self.fed_s: float | None = None  # since when it has rows; the driver's measure of speed
        self.busy_s = self.changed_s = self.up_s = 0.0


class Simulation:
    """One job on one fleet, its rows given out by the pool's own `Dispatch`."""

    def __init__(self, fleet: Fleet, costs: Costs, seed: int = 0) -> None:
        self._fleet, self._costs, self._chance = fleet, costs, random.Random(seed)
        speeds = [self._chance.lognormvariate(0, fleet.spread) for _ in range(fleet.replicas)]
        self._rate = sum(speeds) * fleet.rows_per_s
        self._dispatch = Dispatch(map(_row, range(fleet.rows)), fleet.rows, _rows)
        self._events: list[tuple[float, int, Any, _Replica, Any]] = []
        self._number = 0
        self._now = self._free_at = self._driver_s = 0.0
        self._up: dict[int, _Replica] = {}
        self._gone: list[_Replica] = []
        self._given = self._held = self._most_held = 0
        self._dry_s = self._busy_dry = self._up_dry = 0.0  # at the moment when all were given
        self._deaths = self._lost = self._messages = 0
        self._waits: deque[float] = deque(maxlen=100_000)  # of messages, for the driver
        mean_s = fleet.capacity / fleet.rows_per_s
        for speed in speeds:
            self._begin(_Replica(self._next_number(), mean_s / speed), None)

    def run(self) -> dict[str, Any]:
        while self._dispatch.num_left:
            self._now, _, handle, replica, more = heapq.heappop(self._events)
            # events of a life that is over are void, but for what the driver hears of its end
            if replica.name in self._up or handle in (self._begin, self._hear_death):
                handle(replica, more)
        busy, up = self._totals()
        return {
            **asdict(self._fleet),
            "job_s": self._now,
            "rows_per_s_all": self._fleet.rows / self._now,
            "share_of_fleet": self._fleet.rows / self._now / self._rate,
            "driver_busy": self._driver_s / self._now,
            "idle_until_dry": 1 - self._busy_dry / (self._up_dry * self._fleet.capacity),
            "idle": 1 - busy / (up * self._fleet.capacity),
            "tail_s": self._now - self._dry_s,
            "deaths": self._deaths,
            "rows_lost": self._lost,
            "messages": self._messages,
            "rows_a_message": self._fleet.rows / self._messages,
            "wait_p50_s": statistics.median(self._waits),
            "wait_max_s": max(self._waits),
            "most_rows_held": self._most_held,
        }

    # --- the driver -------------------------------------------------------------------------------

    def _message(self, replica: _Replica, ended: list[int]) -> None:
        """Results come; the answer brings as many rows as the pool gives."""
        costs = self._costs
        begin = max(self._now, self._free_at)
        self._waits.append(begin - self._now)
        if replica.fed_s is not None:
            self._dispatch.spend(replica.name, self._now - replica.fed_s)
        for index in ended:
            self._dispatch.end(replica.name, index)
        rows = [row.index for row in self._dispatch.next_rows(replica.name)]
        replica.fed_s = self._now if self._dispatch.num_flying(replica.name) else None
        cost = costs.message_s + len(ended) * costs.store_row_s + len(rows) * costs.give_row_s
        self._messages += 1
        self._driver_s += cost
        self._free_at = begin + cost
        self._count_rows(len(rows), -len(ended))
        replica.coming = rows
        self._at(self._free_at + costs.latency_s, self._answer, replica)

    def _count_rows(self, given: int, change: int) -> None:
        was_left = self._given < self._fleet.rows
        self._given += given
        self._held += given + change
        self._most_held = max(self._most_held, self._held)
        if was_left and self._given >= self._fleet.rows:
            self._dry_s = self._now
            self._busy_dry, self._up_dry = self._totals()

    def _hear_death(self, replica: _Replica, _: None) -> None:
        lost = self._dispatch.leave(replica.name)
        self._lost += lost
        self._given -= lost
        self._held -= lost
        for other in self._up.values():  # whoever was told that there is nothing more
            if not other.has_call:
                self._send(other)

    # --- a replica --------------------------------------------------------------------------------

    def _begin(self, replica: _Replica, _: None) -> None:
        replica.changed_s = self._now
        self._up[replica.name] = replica
        self._dispatch.join(replica.name, self._fleet.window)
        if self._fleet.death_every_s is not None:
            life_s = self._chance.expovariate(1 / self._fleet.death_every_s)
            self._at(self._now + life_s, self._die, replica)
        self._send(replica)

    def _answer(self, replica: _Replica, _: None) -> None:
        replica.has_call = False
        replica.waiting += replica.coming
        replica.coming = []
        self._start_rows(replica)
        if replica.ended:
            self._send(replica)

    def _start_rows(self, replica: _Replica) -> None:
        self._count(replica)
        while replica.waiting and replica.running < self._fleet.capacity:
            replica.running += 1
            took_s = self._chance.expovariate(1 / replica.mean_s)
            self._at(self._now + took_s, self._end, replica, replica.waiting.popleft())

    def _end(self, replica: _Replica, index: int) -> None:
        self._count(replica)
        replica.running -= 1
        replica.ended.append(index)
        self._start_rows(replica)
        if not replica.has_call:
            self._send(replica)

    def _send(self, replica: _Replica) -> None:
        ended, replica.ended = replica.ended, []
        replica.has_call = True
        self._at(self._now + self._costs.latency_s, self._message, replica, ended)

    def _die(self, replica: _Replica, _: None) -> None:
        self._count(replica)
        self._deaths += 1
        self._gone.append(self._up.pop(replica.name))
        again = _Replica(self._next_number(), replica.mean_s)
        self._at(self._now + self._fleet.noticed_s, self._hear_death, replica)
        self._at(self._now + self._fleet.start_s, self._begin, again)

    def _count(self, replica: _Replica) -> None:
        """Adds up to now what it was busy with."""
        span, replica.changed_s = self._now - replica.changed_s, self._now
        replica.up_s += span
        replica.busy_s += span * replica.running

    def _totals(self) -> tuple[float, float]:
        """Seconds of all lives until now: of rows, and of replicas."""
        for replica in self._up.values():
            self._count(replica)
        every = [*self._gone, *self._up.values()]
        return sum(one.busy_s for one in every), sum(one.up_s for one in every)

    def _at(self, when: float, handle: Any, replica: _Replica, more: Any = None) -> None:
        heapq.heappush(self._events, (when, self._next_number(), handle, replica, more))

    def _next_number(self) -> int:
        self._number += 1
        return self._number


def _row(index: int) -> JobRow:
    return JobRow(index, index + 1, index.to_bytes(16, "little"), None)


def _rows(indices: Sequence[int]) -> list[JobRow]:
    return [_row(index) for index in indices]


def transport(*, quick: bool = False) -> list[dict[str, float]]:
    """What calls of actors cost the driver, by rows of a call."""
    try:
        import ray
    except ImportError as error:
        raise SystemExit("replica_scale: Ray is missing: pip install 'windlass[ray]'") from error
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)

    stats = FakeEngine().stats()
    body = {"model": "m", "messages": [{"role": "user", "content": "What is it? " * 30}]}
    line = {"custom_id": "row-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    row = read_line(json.dumps(line).encode(), 0)

    class Echo:
        def exchange(self, rows: list[JobRow], timeout_s: float) -> Report:
            ended = (EndedRow(row.index, JournalState.OK, _LINE) for row in rows)
            return Report(tuple(ended), stats)

    actors = [ray.remote(Echo).options(num_cpus=0).remote() for _ in range(2)]
    ray.get([actor.exchange.remote([row], 1.0) for actor in actors])
    found = []
    for rows in (1, 8, 64):
        calls = 40 if quick else 2000 if rows < 64 else 600
        begin, cpu = time.perf_counter(), time.process_time()
        flying = {actor.exchange.remote([row] * rows, 1.0): actor for actor in actors * _IN_FLIGHT}
        left = calls - len(flying)
        while flying:
            for done in ray.wait(list(flying), num_returns=1)[0]:
                actor = flying.pop(done)
                ray.get(done)
                if left > 0:
                    left -= 1
                    flying[actor.exchange.remote([row] * rows, 1.0)] = actor
        took = {"call_s": time.perf_counter() - begin, "call_cpu_s": time.process_time() - cpu}
        found.append({"rows": rows, "calls": calls, **{k: v / calls for k, v in took.items()}})
    ray.shutdown()
    return found


def fleets(*, quick: bool) -> list[Fleet]:
    """From replicas that take minutes for a row to such as no machine here can be."""
    rows = 20_000 if quick else 200_000
    own = [Fleet(rows=rows, rows_per_s=rate) for rate in (0.1, 1.0, 10.0, 30.0, 100.0, 300.0)]
    base = Fleet(rows=rows, rows_per_s=10.0)
    own += [replace(base, window=window) for window in (64, 80, 256)]
    own += [replace(base, death_every_s=hours * 3600) for hours in (0.1, 1.0, 24.0)]
    return own


def costs_of(calls: list[dict[str, float]], steps: dict[str, Any]) -> Costs:
    """Of the largest job that was measured; what a call costs is that of one with a single row."""
    taken = max(steps["results"], key=lambda one: one["rows"])
    own, rows = taken["steps"], taken["rows"]
    return Costs(calls[0]["call_cpu_s"], own["dispatch_cpu_s"] / rows, own["append_cpu_s"] / rows)


def _line(found: dict[str, Any]) -> list[str]:
    life = found["death_every_s"]
    return [
        f"{found['rows']}", f"{found['rows_per_s']:g}", f"{found['window']}",
        "-" if life is None else f"{life / 3600:g} h", f"{found['rows_per_s_all']:.1f}",
        f"{100 * found['share_of_fleet']:.1f} %", f"{100 * found['driver_busy']:.1f} %",
        f"{100 * found['idle_until_dry']:.1f} %", f"{found['rows_a_message']:.1f}",
        f"{1000 * found['wait_p50_s']:.1f}", f"{found['rows_lost']}", f"{found['most_rows_held']}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=Path, required=True, help="driver_scale.py's document")
    parser.add_argument("--transport", type=Path, help="an earlier document of this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    described, others = describe(), Others()
    if options.transport:
        calls = json.loads(options.transport.read_text())["transport"]
    else:
        calls = transport(quick=options.quick)
    costs = costs_of(calls, json.loads(options.steps.read_text()))
    print(costs)
    heads = ("rows", "rows/s each", "window", "life", "rows/s", "of fleet", "driver busy", "idle",
             "rows/message", "wait ms", "lost", "held")  # fmt: skip
    head = {**described, "transport": calls, "costs": costs._asdict()}
    found = [Simulation(fleet, costs).run() for fleet in fleets(quick=options.quick)]
    print(table(heads, [_line(one) for one in found]))
    write({**head, "others_cores": others.cores(), "simulation": found}, options.json)


if __name__ == "__main__":
    main()

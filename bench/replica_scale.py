"""What binds the driver of many replicas: the transport measured, then a simulation with it.

    python bench/replica_scale.py --steps bench/results/driver_scale.json [--json FILE] [--quick]
    python bench/replica_scale.py --transport FILE --steps FILE --json FILE

*Transport* (needs Ray; `--transport FILE` takes the one of an earlier document): two actors that
answer at once, two calls under way with each, rows of 490 bytes, results of 950. Seconds of the
driver's processor, all threads, and of the clock, for a call of 1, 8 and 64 rows.

*Simulation*: discrete events on a virtual clock. Replicas differ in speed (log-normal), rows in
length (exponential). Each has a window of rows; what ended is sent as soon as the driver has
answered the last message, and the answer fills the window. The driver is one thread: a message
costs what a call did, each row what its steps did (`driver_scale.py`). Replicas die (exponential)
and start again; their rows go back and all work on them is lost.
"""

import argparse
import heapq
import json
import random
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from machine import Others, describe, table, write

_ROW, _RESULT = b"r" * 490, b"x" * 950
_IN_FLIGHT = 2  # calls for each actor


class Costs(NamedTuple):
    """Seconds of the driver's one thread; `latency_s`: each way, nobody's work."""

    message_s: float
    read_row_s: float
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
    def __init__(self, mean_s: float) -> None:
        self.mean_s = mean_s  # of one row
        self.life = 0  # which of its lives this is; events of earlier ones are void
        self.is_up = True
        self.coming = self.waiting = self.running = self.ended = 0
        self.sent = 0  # rows of the message that the driver has not answered
        self.has_message = False
        self.busy_s = self.changed_s = self.up_s = 0.0

    @property
    def held(self) -> int:
        return self.coming + self.waiting + self.running + self.ended + self.sent


class Simulation:
    """One job on one fleet."""

    def __init__(self, fleet: Fleet, costs: Costs, seed: int = 0) -> None:
        self._fleet, self._costs, self._chance = fleet, costs, random.Random(seed)
        mean_s = fleet.capacity / fleet.rows_per_s
        speeds = [self._chance.lognormvariate(0, fleet.spread) for _ in range(fleet.replicas)]
        self._replicas = [_Replica(mean_s / speed) for speed in speeds]
        self._rate = sum(speeds) * fleet.rows_per_s
        self._events: list[tuple[float, int, Any, int, int, int]] = []
        self._number = 0
        self._now = self._free_at = self._driver_s = 0.0
        self._left, self._done, self._lost = fleet.rows, 0, 0
        self._dry_s: float | None = None  # when the last row was handed out for the first time
        self._busy_dry = self._up_dry = 0.0
        self._most_held = self._deaths = self._messages = 0
        self._waits: deque[float] = deque(maxlen=100_000)

    def run(self) -> dict[str, Any]:
        for index in range(self._fleet.replicas):
            self._begin(index)
        while self._done < self._fleet.rows:
            self._now, _, handle, index, life, amount = heapq.heappop(self._events)
            if life == self._replicas[index].life:
                handle(index, amount)
        for index in range(self._fleet.replicas):
            self._count(index)
        return self._report()

    def _report(self) -> dict[str, Any]:
        capacity, dry_s = self._fleet.capacity, self._dry_s or self._now
        busy = sum(one.busy_s for one in self._replicas)
        up = sum(one.up_s for one in self._replicas)
        return {
            **asdict(self._fleet),
            "job_s": self._now,
            "rows_per_s_all": self._fleet.rows / self._now,
            "share_of_fleet": self._fleet.rows / self._now / self._rate,
            "driver_busy": self._driver_s / self._now,
            "idle_until_dry": 1 - self._busy_dry / max(self._up_dry * capacity, 1e-9),
            "idle": 1 - busy / (up * capacity),
            "tail_s": self._now - dry_s,
            "deaths": self._deaths,
            "rows_lost": self._lost,
            "messages": self._messages,
            "rows_a_message": self._fleet.rows / self._messages,
            "wait_p50_s": statistics.median(self._waits),
            "wait_max_s": max(self._waits),
            "most_rows_held": self._most_held,
        }

    # --- the driver -------------------------------------------------------------------------------

    def _message(self, index: int, amount: int) -> None:
        """`amount` results come; the answer brings as many rows as the window has room for."""
        replica, costs = self._replicas[index], self._costs
        self._messages += 1
        begin = max(self._now, self._free_at)
        self._waits.append(begin - self._now)
        self._done += amount
        replica.sent -= amount
        rows = min(self._left, self._fleet.window - replica.held)
        self._left -= rows
        cost = costs.message_s + amount * costs.store_row_s + rows * costs.read_row_s
        self._driver_s += cost
        self._free_at = begin + cost
        held = self._fleet.rows - self._left - self._done
        self._most_held = max(self._most_held, held)
        if self._left == 0 and self._dry_s is None:
            self._dry_s = self._now
            for one in range(self._fleet.replicas):
                self._count(one)
            self._busy_dry = sum(one.busy_s for one in self._replicas)
            self._up_dry = sum(one.up_s for one in self._replicas)
        replica.coming += rows
        self._at(self._free_at + costs.latency_s, self._answer, index, rows)

    def _known_dead(self, index: int, amount: int) -> None:
        """The rows of one that died are there to be handed out again, to whoever has room."""
        self._left += amount
        for other, replica in enumerate(self._replicas):
            if replica.is_up and not replica.has_message and replica.held < self._fleet.window:
                self._send(other)

    # --- a replica --------------------------------------------------------------------------------

    def _begin(self, index: int, _: int = 0) -> None:
        replica = self._replicas[index]
        self._count(index)
        replica.is_up = True
        if self._fleet.death_every_s is not None:
            life_s = self._chance.expovariate(1 / self._fleet.death_every_s)
            self._at(self._now + life_s, self._die, index)
        self._send(index)

    def _answer(self, index: int, rows: int) -> None:
        replica = self._replicas[index]
        self._count(index)
        replica.has_message = False
        replica.coming -= rows
        replica.waiting += rows
        self._start_rows(index)
        if replica.ended:
            self._send(index)

    def _start_rows(self, index: int) -> None:
        replica = self._replicas[index]
        rows = min(self._fleet.capacity - replica.running, replica.waiting)
        replica.running += rows
        replica.waiting -= rows
        for _ in range(rows):
            self._at(self._now + self._chance.expovariate(1 / replica.mean_s), self._end, index)

    def _end(self, index: int, _: int) -> None:
        replica = self._replicas[index]
        self._count(index)
        replica.running -= 1
        replica.ended += 1
        self._start_rows(index)
        if not replica.has_message:
            self._send(index)

    def _send(self, index: int) -> None:
        replica = self._replicas[index]
        replica.has_message = True
        replica.sent, replica.ended = replica.ended, 0
        self._at(self._now + self._costs.latency_s, self._message, index, replica.sent)

    def _die(self, index: int, _: int) -> None:
        replica = self._replicas[index]
        self._count(index)
        self._deaths += 1
        lost = replica.held
        self._lost += lost
        replica.life += 1
        replica.is_up = replica.has_message = False
        replica.coming = replica.waiting = replica.running = replica.ended = replica.sent = 0
        self._at(self._now + self._fleet.noticed_s, self._known_dead, index, lost)
        self._at(self._now + self._fleet.start_s, self._begin, index)

    def _count(self, index: int) -> None:
        """Adds up to now what the replica was busy with."""
        replica = self._replicas[index]
        span = self._now - replica.changed_s
        replica.changed_s = self._now
        if replica.is_up:
            replica.up_s += span
            replica.busy_s += span * replica.running

    def _at(self, when: float, handle: Any, index: int, amount: int = 0) -> None:
        self._number += 1
        life = self._replicas[index].life
        heapq.heappush(self._events, (when, self._number, handle, index, life, amount))


def transport(*, quick: bool = False) -> list[dict[str, float]]:
    """What calls of actors cost the driver, by rows of a call."""
    try:
        import ray
    except ImportError as error:
        raise SystemExit("replica_scale: Ray is missing: pip install 'windlass[ray]'") from error
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)

    class Echo:
        def work(self, rows: list[bytes]) -> list[bytes]:
            return [_RESULT] * len(rows)

    actors = [ray.remote(Echo).options(num_cpus=0).remote() for _ in range(2)]
    ray.get([actor.work.remote([_ROW]) for actor in actors])
    found = []
    for rows in (1, 8, 64):
        calls = 40 if quick else 2000 if rows < 64 else 600
        begin, cpu = time.perf_counter(), time.process_time()
        flying = {actor.work.remote([_ROW] * rows): actor for actor in actors * _IN_FLIGHT}
        left = calls - len(flying)
        while flying:
            for done in ray.wait(list(flying), num_returns=1)[0]:
                actor = flying.pop(done)
                ray.get(done)
                if left > 0:
                    left -= 1
                    flying[actor.work.remote([_ROW] * rows)] = actor
        took = {"call_s": time.perf_counter() - begin, "call_cpu_s": time.process_time() - cpu}
        found.append({"rows": rows, "calls": calls, **{k: v / calls for k, v in took.items()}})
    ray.shutdown()
    return found


def fleets(*, quick: bool) -> list[Fleet]:
    """From replicas that take minutes for a row to such as no machine here can be."""
    rows = 5_000 if quick else 1_000_000
    own = [Fleet(rows=rows, rows_per_s=rate) for rate in (0.1, 1.0, 10.0, 30.0, 100.0, 300.0)]
    base = Fleet(rows=rows, rows_per_s=10.0)
    own += [replace(base, window=window) for window in (64, 72, 96, 256)]
    own += [replace(base, death_every_s=hours * 3600) for hours in (0.1, 1.0, 24.0)]
    return own if quick else [*own, replace(base, rows=10_000_000, death_every_s=3600.0)]


def costs_of(calls: list[dict[str, float]], steps: dict[str, Any]) -> Costs:
    """Of the largest job that was measured; a call's cost is that of a small one."""
    taken = max(steps["results"], key=lambda one: one["rows"])
    own, rows = taken["steps"], taken["rows"]
    each = {name: own[f"{name}_cpu_s"] / rows for name in ("read_rows", "make_lines", "append")}
    store_s = each["make_lines"] + each["append"]
    return Costs(calls[0]["call_cpu_s"], each["read_rows"], store_s)


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
    found = [Simulation(fleet, costs).run() for fleet in fleets(quick=options.quick)]
    heads = ("rows", "rows/s each", "window", "life", "rows/s", "of fleet", "driver busy", "idle",
             "rows/message", "wait ms", "lost", "held")  # fmt: skip
    print(table(heads, [_line(one) for one in found]))
    write(
        {**described, "others_cores": others.cores(), "transport": calls,
         "costs": costs._asdict(), "simulation": found},
        options.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()

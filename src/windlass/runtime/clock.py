"""A virtual clock, and lanes that are busy on it. Knows seconds, not what they are spent on."""

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

from windlass.ids import DEVICE, DISK_TO_HOST, HOST, Route

HOST_TO_DEVICE = Route(HOST, DEVICE)
# Lanes that move bytes, by the route that they serve
ROUTE_LANES = {DISK_TO_HOST: "disk", HOST_TO_DEVICE: "down"}


class Span(NamedTuple):
    """LaneWork of one lane, in seconds since the clock began."""

    lane: str
    label: str
    begin: float
    end: float


class Clock:
    """Events in the order of their time, equals in the order in which they were asked for. Also
    the lock and the wait (`weights.io_queue.Changed`) of what runs on it: all in one thread."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = 0

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Calls `action` at `when`."""
        self._asked += 1
        heapq.heappush(self._events, (when, self._asked, action))

    def wait(self) -> None:
        """Goes on to the next event."""
        assert self._events, "waits on the clock for something that will not happen"
        when, _, action = heapq.heappop(self._events)
        self.now = max(self.now, when)
        action()

    def notify_all(self) -> None:
        """Nobody else waits."""

    def __enter__(self) -> "Clock":
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class Lane:
    """One resource: serves its jobs one after the other, in the order in which they come."""

    def __init__(self, name: str, clock: Clock, spans: list[Span] | None = None) -> None:
        """`spans`: where to note the jobs, for a picture."""
        self.name = name
        self.busy_s = 0.0
        self._clock = clock
        self._free_at = 0.0
        self._spans = spans

    def put(self, seconds: float, then: Callable[[], None], label: str = "") -> None:
        """A job of `seconds`; `then` is called when it has ended."""
        begin = max(self._clock.now, self._free_at)
        self._free_at = begin + seconds
        self.busy_s += seconds
        if self._spans is not None:
            self._spans.append(Span(self.name, label, begin, self._free_at))
        self._clock.at(self._free_at, then)


class LaneJob(NamedTuple):
    """Seconds on the lane of that name."""

    lane: str
    seconds: float


class LaneWork(NamedTuple):
    """What an operation asks of the lanes: `chains` run beside each other, the jobs of each one
    after the other; `last` follows when all have ended."""

    last: LaneJob
    chains: tuple[tuple[LaneJob, ...], ...] = ()


class Lanes:
    """The resources of a machine, by name."""

    def __init__(self, clock: Clock, names: Sequence[str], *, keeps_spans: bool = False) -> None:
        self.clock = clock
        self.spans: list[Span] = []
        self._lanes = {
            name: Lane(name, clock, self.spans if keeps_spans else None) for name in names
        }

    def __getitem__(self, name: str) -> Lane:
        return self._lanes[name]

    def of(self, route: Route) -> Lane:
        """The lane that serves `route`."""
        return self._lanes[ROUTE_LANES[route]]

    def busy(self) -> dict[str, float]:
        """Seconds that each lane has worked or is committed to."""
        return {name: lane.busy_s for name, lane in self._lanes.items()}

    def start(self, work: LaneWork, label: str) -> Callable[[], None]:
        """Begins `work` -> what waits for its end."""
        has_ended = False
        open_chains = len(work.chains)

        def ended() -> None:
            nonlocal has_ended
            has_ended = True

        def wait() -> None:
            while not has_ended:
                self.clock.wait()

        def last() -> None:
            self._lanes[work.last.lane].put(work.last.seconds, ended, label)

        def chain_ended() -> None:
            nonlocal open_chains
            open_chains -= 1
            if not open_chains:
                last()

        for chain in work.chains:
            self._follow(list(chain), label, chain_ended)
        if not work.chains:
            last()
        return wait

    def _follow(self, jobs: list[LaneJob], label: str, then: Callable[[], None]) -> None:
        if not jobs:
            then()
            return
        first, rest = jobs[0], jobs[1:]
        self._lanes[first.lane].put(first.seconds, lambda: self._follow(rest, label, then), label)

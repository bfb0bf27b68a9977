"""A cluster without machines: replicas answer from a table, on a clock of their own, and die when
they are told to."""

from collections.abc import Callable, Hashable
from random import Random
from typing import Any

from fake_engine import fake_store_stats
from windlass.batch.journal import JournalState
from windlass.engine.engine_stats import EngineStats
from windlass.ray.cluster import Failure, Node, Outcome
from windlass.ray.messages import EndedRow, Place, ReplicaFacts, ReplicaSpec, Report
from windlass.version import VERSION


def node(name: str, *, address: str | None = None, cpus: float = 2, gpus: int = 0) -> Node:
    return Node(name, f"host-{name}", address or name, cpus, gpus)


def line_of(index: int) -> bytes:
    """The result of a row: the same from every replica."""
    return f'{{"row":{index}}}\n'.encode()


class FakeReplica:
    """`speed`: rows a second."""

    def __init__(self, where: Node, speed: float) -> None:
        self.node, self.speed = where, speed
        self.rows: list[int] = []
        self.spec: ReplicaSpec | None = None
        self.done = 0


class FakeCluster:
    """`dies`: asked at every call whether its replica dies of it. `speeds`, `refusals`, `kernels`,
    `lengths`, `versions`: by node. `started`, `fed`: what happened."""

    def __init__(self, nodes: list[Node], random: Random | None = None) -> None:
        self.alive = list(nodes)
        self.random = random or Random(0)
        self.now = 0.0
        self.dies: Callable[[FakeReplica], bool] = lambda replica: False
        self.speeds: dict[str, float] = {}
        self.refusals: dict[str, str] = {}
        self.kernels: dict[str, str] = {}
        self.lengths: dict[str, int] = {}
        self.versions: dict[str, str] = {}
        self.checkpoints: dict[str, str] = {}
        self.silent: set[str] = set()  # nodes whose processes never start
        self.started: list[tuple[Node, float, int]] = []
        self.fed: list[tuple[FakeReplica, list[int]]] = []
        self.on_wait: Callable[[], None] = lambda: None
        self._calls: dict[Hashable, tuple[float, str, tuple[Any, ...]]] = {}

    def clock(self) -> float:
        return self.now

    def nodes(self) -> list[Node]:
        return list(self.alive)

    def start(self, node: Node, *, cpus: float, gpus: int) -> Hashable:
        self.started.append((node, cpus, gpus))
        return FakeReplica(node, self.speeds.get(node.id, 100.0))

    def call(self, handle: Hashable, method: str, *arguments: Any) -> None:
        assert handle not in self._calls, "one call at a time"
        assert isinstance(handle, FakeReplica)
        if method == "exchange":
            self.fed.append((handle, [row.index for row in arguments[0]]))
            handle.rows += self.fed[-1][1]
        takes_s = self.random.uniform(0.01, 1.0)
        self._calls[handle] = (self.now + takes_s, method, arguments)

    def wait(self, timeout_s: float) -> list[Outcome]:
        self.on_wait()
        self.now += timeout_s
        ended = []
        for handle, (at, method, arguments) in list(self._calls.items()):
            assert isinstance(handle, FakeReplica)
            if handle.node not in self.alive or self.dies(handle):
                ended.append(Outcome(handle, None, Failure("died", False)))
            elif at <= self.now and handle.node.id not in self.silent:
                ended.append(self._outcome(handle, method, arguments, self.now - at + timeout_s))
            else:
                continue
            del self._calls[handle]
        return ended

    def kill(self, handle: Hashable) -> None:
        self._calls.pop(handle, None)

    def _outcome(
        self, replica: FakeReplica, method: str, arguments: tuple[Any, ...], took_s: float
    ) -> Outcome:
        name = replica.node.id
        value: Any = None
        if method == "look":
            value = {"version": self.versions.get(name, VERSION), "error": None}
        elif method == "place":
            value = Place(host=name, pid=1, version=VERSION, budget_bytes=12_000, threads=4)
        elif method == "open":
            if name in self.refusals:
                return Outcome(replica, None, Failure(self.refusals[name], True))
            replica.spec = arguments[0]
            value = self._facts(replica)
        elif method == "exchange":
            value = self._report(replica, took_s)
        return Outcome(replica, value, None)

    def _facts(self, replica: FakeReplica) -> ReplicaFacts:
        assert replica.spec is not None
        name = replica.node.id
        most = self.lengths.get(name, 1024)
        return ReplicaFacts(
            host=name,
            pid=1,
            checkpoint=self.checkpoints.get(name, "this"),
            tokenizer=None,
            fingerprint={"kernels": self.kernels.get(name, "cpu"), "seed": 0},
            arithmetic="",
            max_model_len=replica.spec.options.max_model_len or most,
            capacity=4,
            window=8,
            plan_line="plan: a fake one",
        )

    def _report(self, replica: FakeReplica, took_s: float) -> Report:
        count = max(1, min(len(replica.rows), round(replica.speed * took_s)))
        self.random.shuffle(replica.rows)
        ended, replica.rows = replica.rows[:count], replica.rows[count:]
        replica.done += len(ended)
        rows = tuple(EndedRow(index, JournalState.OK, line_of(index)) for index in ended)
        return Report(rows, fake_stats(replica.done))


def fake_stats(passes: int) -> EngineStats:
    return EngineStats(
        passes=passes,
        prompt_tokens=3 * passes,
        generated_tokens=2 * passes,
        weights=fake_store_stats(passes),
        pass_s=0.1 * passes,
        peak_rss_bytes=1 << 20,
        running=0,
        waiting=0,
    )

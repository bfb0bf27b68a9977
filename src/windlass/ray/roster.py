"""The replicas of a job, from the node that gets one to the engine that is open there; who died, is
started again, or left out. Knows no rows."""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

from windlass.engine.engine_stats import EngineStats
from windlass.errors import JobError, UsageError
from windlass.ray.cluster import Cluster, Failure, Node
from windlass.ray.layout import shared_options, spread, takes
from windlass.ray.messages import Place, ReplicaFacts, ReplicaSpec
from windlass.units import format_seconds
from windlass.version import VERSION

_LOOK_EVERY_S = 2.0  # for nodes, while replicas are missing or nodes may join
_START_S = 120.0  # until a process that the cluster was asked for answers
_SILENT_S = 300.0  # an engine hands its rows over within a second, unless its machine stands still
_PATIENCE_S = 120.0  # without any replica
MOST_FAILURES = 3  # of a node in a row, without a result


@dataclass(frozen=True, slots=True)
class Wish:
    """`number` None: as many replicas as nodes have places, also those that join. `checkpoint`,
    `tokenizer`: what must be found on every node."""

    number: int | None
    spec: ReplicaSpec
    checkpoint: str
    tokenizer: str | None


@dataclass(slots=True, eq=False)
class Member:
    """One replica. `doing`: the call under way; `ready` once it is open. `since`: when that
    began."""

    number: int
    node: Node
    handle: Hashable
    doing: str
    since: float
    began: float
    place: Place | None = None
    facts: ReplicaFacts | None = None
    stats: EngineStats | None = None
    num_rows: int = 0
    is_ready: bool = False

    @property
    def name(self) -> str:
        return f"replica {self.number} on {self.node.host}"


class Roster:
    """Keeps the members that `wish` asks for. `say` hears what befalls them, `left` of each that is
    gone. `clock`: seconds."""

    def __init__(
        self,
        cluster: Cluster,
        wish: Wish,
        *,
        clock: Callable[[], float],
        say: Callable[[str], None],
        left: Callable[[Member], str],
    ) -> None:
        self._cluster, self._clock, self._say, self._left = cluster, clock, say, left
        self.wish = wish
        self.members: dict[Hashable, Member] = {}
        self.past: list[Member] = []  # those that are gone, which had computed
        self.has_begun = False  # from then on a node that refuses is left out
        self._targets: dict[str, int] = {}  # replicas by node, once it was given any
        self._places: dict[str, Place] = {}  # of each machine, before any engine was open there
        self._failures: Counter[str] = Counter()  # by node, since it had a result
        self._again_at: dict[str, float] = {}
        self._out: set[str] = set()  # nodes that are not used any more
        self._reason = "no node has a processor to compute with (nodes with --num-cpus=0 have none)"
        self._looked_at = self._had_any_at = -float("inf")
        self._num_started = 0

    @property
    def ready(self) -> list[Member]:
        return [member for member in self.members.values() if member.is_ready]

    @property
    def is_complete(self) -> bool:
        """Whether all that were asked for are open."""
        wanted = sum(self._targets.values())
        return bool(self.members) and len(self.ready) == wanted

    def tick(self) -> None:
        """Starts who is missing, and gives up who does not answer. Raises JobError where nobody is
        left to wait for."""
        now = self._clock()
        for member in list(self.members.values()):
            bound = {"look": _START_S, "place": _START_S, "exchange": _SILENT_S}.get(member.doing)
            if bound is not None and now - member.since > bound:
                what = "not started" if member.doing == "look" else "no answer"
                self.fail(member, Failure(f"{what} for {format_seconds(bound)}", False))
        self._open_placed()
        wants_more = self.wish.number is None or len(self.members) < self.wish.number
        if wants_more and now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = now
            self._start_missing(now)
        if self.members:
            self._had_any_at = now
        elif self._had_any_at == -float("inf"):
            self._had_any_at = now
        elif self._out or now - self._had_any_at > _PATIENCE_S:
            raise JobError(f"no replica is left to compute: {self._reason}")

    def waits_for(self) -> str:
        """What is awaited before rows run, in words."""
        now = self._clock()
        words = dict.fromkeys(("look", "place", "placed"), "starting")
        words["open"] = "loading"
        told = [
            f"{one.name}: {words[one.doing]}, {format_seconds(now - one.since)}"
            for one in self.members.values()
            if one.doing in words
        ]
        return "waiting for " + ("; ".join(told) if told else "a node: " + self._reason)

    def call(self, member: Member, method: str, *arguments: Any) -> None:
        member.doing, member.since = method, self._clock()
        self._cluster.call(member.handle, method, *arguments)

    def advance(self, member: Member, value: Any) -> None:
        """What came of the call that `member` was at, until it is open."""
        if member.doing == "look":
            if value["error"] is not None or value["version"] != VERSION:
                there = value["error"] or f"version {value['version']}"
                text = f"windlass: got {there}, allowed {VERSION}, the version here"
                self.fail(member, Failure(text, True))
                return
            self.call(member, "place")
        elif member.doing == "place":
            member.doing = "placed"
            member.place = self._places.setdefault(member.node.address, value)
        elif member.doing == "open":
            self._opened(member, value)

    def reopen(self, member: Member, max_model_len: int) -> None:
        """With this context."""
        assert member.facts is not None, "open members have facts"
        member.is_ready = False
        self._open(member, max_model_len)

    def fail(self, member: Member, failure: Failure) -> None:
        """It is gone. UsageError where it refuses before any row has run."""
        self._drop(member)
        node, self._reason = member.node, f"{member.name}: {failure.text}"
        if failure.is_refusal and not self.has_begun:
            raise UsageError(self._reason)
        told = self._left(member)
        self._failures[node.id] += 1
        is_out = failure.is_refusal or self._failures[node.id] >= MOST_FAILURES
        if is_out:
            self._out.add(node.id)
            told += "; its node is not used any more"
        self._again_at[node.id] = self._clock() + self._failures[node.id] - 1
        self._say(f"{self._reason}{told}")

    def has_result(self, member: Member) -> None:
        self._failures.pop(member.node.id, None)

    def set_length(self, max_model_len: int) -> None:
        """Of all that are opened from now on."""
        options = replace(self.wish.spec.options, max_model_len=max_model_len)
        self.wish = replace(self.wish, spec=replace(self.wish.spec, options=options))

    def _drop(self, member: Member) -> None:
        self._cluster.kill(member.handle)
        del self.members[member.handle]
        if member.stats is not None:
            self.past.append(member)

    def _start_missing(self, now: float) -> None:
        nodes = [node for node in self._cluster.nodes() if node.id not in self._out]
        alive = {node.id for node in nodes}
        kept = {node: count for node, count in self._targets.items() if node in alive}
        options = self.wish.spec.options
        number = self.wish.number
        self._targets = spread(nodes, number, options, kept if self._num_started else {})
        have = Counter(member.node.id for member in self.members.values())
        for node in nodes:
            if now < self._again_at.get(node.id, now):
                continue
            count = self._targets.get(node.id, 0)
            cpus, gpus = takes(node, count, options) if count else (0.0, 0)
            for _ in range(count - have[node.id]):
                self._num_started += 1
                handle = self._cluster.start(node, cpus=cpus, gpus=gpus)
                member = Member(self._num_started, node, handle, "look", now, now)
                self.members[handle] = member
                self.call(member, "look")

    def _open_placed(self) -> None:
        """Opens who is placed, once all on its machine are: memory is measured before it goes."""
        busy = {m.node.address for m in self.members.values() if m.doing in ("look", "place")}
        for member in list(self.members.values()):
            if member.doing == "placed" and member.node.address not in busy:
                self._open(member, self.wish.spec.options.max_model_len)

    def _open(self, member: Member, max_model_len: int | None) -> None:
        assert member.place is not None, "only placed members are opened"
        address = member.node.address
        sharers = sum(one.node.address == address for one in self.members.values())
        has_device = takes(member.node, 1, self.wish.spec.options)[1] > 0
        options = replace(self.wish.spec.options, max_model_len=max_model_len)
        own = shared_options(options, member.place, sharers, has_device=has_device)
        self.call(member, "open", replace(self.wish.spec, options=own))

    def _opened(self, member: Member, facts: ReplicaFacts) -> None:
        for what, there, here in (
            ("model", facts.checkpoint, self.wish.checkpoint),
            ("tokenizer", facts.tokenizer, self.wish.tokenizer),
        ):
            if there != here:
                text = f"{what}: got another one ({there}), allowed the same as here ({here})"
                self.fail(member, Failure(text, True))
                return
        member.facts, member.is_ready, member.doing = facts, True, "ready"
        member.began = self._clock()

"""The pool of replicas that computes a job's rows: feeds them by what they finish, stores what they
bring, and gives the rows of one that is gone to others. Knows no ray."""

import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from windlass.batch.crew import CrewWork
from windlass.batch.progress import JobProgress
from windlass.batch.runner import Stopping
from windlass.engine.engine_stats import EngineStats
from windlass.errors import UsageError
from windlass.ray.cluster import Cluster, Failure, Outcome
from windlass.ray.dispatch import Dispatch
from windlass.ray.messages import Report
from windlass.ray.roster import Member, Roster, Wish
from windlass.units import format_bytes
from windlass.weights.stats import StoreStats

_WAIT_S = 0.25  # for outcomes, between looks at whoever may stop the job
_EXCHANGE_S = 1.0  # that a replica waits for a row to end
_CLOSE_S = 20.0  # for replicas to say goodbye


class Part(NamedTuple):
    """What one replica has done. `seconds`: since it was open."""

    name: str
    rows: int
    seconds: float
    stats: EngineStats
    is_gone: bool

    def line(self) -> str:
        tokens = (self.stats.input_tokens + self.stats.generated_tokens) / max(self.seconds, 1e-9)
        asked = self.stats.expert_requests
        hits = f"{100 * self.stats.expert_hits / asked:.0f} %" if asked else "-"
        return (
            f"{self.name}: {self.rows} rows, {tokens:.1f} tokens/s,"
            f" {format_bytes(self.stats.bytes_read)} read, hits {hits}"
            f"{' (gone)' if self.is_gone else ''}"
        )


class Pool:
    """A crew of replicas on `cluster`."""

    def __init__(
        self, cluster: Cluster, wish: Wish, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster, self._wish, self._clock = cluster, wish, clock
        self._parts: list[Part] = []
        self.load_s = self.run_s = 0.0  # until all replicas were open; from then on

    def parts(self) -> list[Part]:
        """What each replica has done, once the run is over."""
        return self._parts

    def stats(self) -> EngineStats | None:
        """Of all together; None where nobody computed."""
        return total_stats([part.stats for part in self._parts])

    def run(self, work: CrewWork, *, stopping: Stopping, progress: JobProgress) -> None:
        """As `Crew.run`."""
        run = _Run(self._cluster, self._wish, work, progress, self._clock)
        begin = self._clock()
        try:
            run.run(stopping)
        finally:
            self._parts, self.load_s = run.parts(), run.load_s
            self.run_s = self._clock() - begin - run.load_s
            run.close()


class _Run:
    def __init__(
        self,
        cluster: Cluster,
        wish: Wish,
        work: CrewWork,
        progress: JobProgress,
        clock: Callable[[], float],
    ) -> None:
        self._cluster, self._work, self._progress, self._clock = cluster, work, progress, clock
        self._dispatch = Dispatch(work.rows(), work.num_left, work.again)
        self._roster = Roster(cluster, wish, clock=clock, say=progress.say, left=self._lose)
        self._joined: set[int] = set()
        self._engines: dict[str, Mapping[str, Any]] = {}  # fingerprints of all that have computed
        self._stopped = False
        self._began, self.load_s = clock(), 0.0

    def run(self, stopping: Stopping) -> None:
        roster = self._roster
        while self._dispatch.num_left and not stopping.is_stopping():
            roster.tick()
            if not roster.has_begun:
                self._progress.note(roster.waits_for())
                self._begin_if_complete()
            for member in roster.ready:
                self._feed(member)
            self._take(_WAIT_S)
        self._stopped = True
        deadline = self._clock() + 2 * _EXCHANGE_S
        while self._dispatch.num_left and self._is_fed() and self._clock() < deadline:
            self._take(_WAIT_S)

    def parts(self) -> list[Part]:
        now = self._clock()
        gone = [(member, member.since) for member in self._roster.past]
        here = [(member, now) for member in self._roster.members.values()]
        return [
            Part(one.name, one.num_rows, end - one.began, one.stats, one in self._roster.past)
            for one, end in sorted((*gone, *here), key=lambda pair: pair[0].number)
            if one.stats is not None
        ]

    def close(self) -> None:
        """Replicas end; those that do not within bounds are killed."""
        waiting = set()
        for member in self._roster.ready:
            if member.doing == "ready":
                self._roster.call(member, "close")
                waiting.add(member.handle)
        deadline = self._clock() + _CLOSE_S
        while waiting and self._clock() < deadline:
            waiting -= {outcome.handle for outcome in self._cluster.wait(_WAIT_S)}
        for handle in self._roster.members:
            self._cluster.kill(handle)

    def _is_fed(self) -> bool:
        return any(member.doing == "exchange" for member in self._roster.ready)

    def _begin_if_complete(self) -> None:
        """Rows run once all replicas that were asked for are open, with one context."""
        roster = self._roster
        if not roster.is_complete:
            return
        lengths = {one.number: one.facts.max_model_len for one in roster.ready if one.facts}
        agreed = min(lengths.values())
        roster.set_length(agreed)
        longer = [one for one in roster.ready if lengths[one.number] != agreed]
        for member in longer:
            roster.reopen(member, agreed)
        if longer:
            return
        for member in roster.ready:
            self._know(member)
        self._work.settle(list(self._engines.values()))
        roster.has_begun = True
        self.load_s = self._clock() - self._began
        for member in roster.ready:
            self._join(member)
        self._progress.note("no row has ended yet")

    def _know(self, member: Member) -> str:
        assert member.facts is not None, "open members have facts"
        own = {
            **member.facts.fingerprint,
            "max_model_len": member.facts.max_model_len,
            "arithmetic": member.facts.arithmetic,
        }
        key = repr(sorted(own.items()))
        self._engines[key] = own
        return key

    def _join(self, member: Member) -> None:
        assert member.facts is not None, "open members have facts"
        self._joined.add(member.number)
        self._dispatch.join(member.number, member.facts.window)
        self._progress.say(f"{member.name}: {member.facts.words()}")

    def _welcome(self, member: Member) -> None:
        """One that came after the beginning."""
        before = dict(self._engines)
        self._know(member)
        try:
            if self._engines != before:
                self._work.settle(list(self._engines.values()))
        except UsageError as error:
            self._engines = before
            self._roster.fail(member, Failure(str(error), True))
            return
        self._join(member)

    def _feed(self, member: Member) -> None:
        if not self._roster.has_begun or member.doing != "ready":
            return
        if member.number not in self._joined:
            self._welcome(member)
            if member.number not in self._joined:
                return
        rows = self._dispatch.next_rows(member.number)
        if rows or self._dispatch.num_flying(member.number):
            self._roster.call(member, "exchange", rows, _EXCHANGE_S)

    def _take(self, timeout_s: float) -> None:
        for outcome in self._cluster.wait(timeout_s):
            member = self._roster.members.get(outcome.handle)
            if member is not None:
                self._hear(member, outcome)
        self._work.sync_if_due()
        if self._roster.has_begun and self._progress.is_due:
            known = [one.stats for one in (*self._roster.past, *self._roster.members.values())]
            total = total_stats([stats for stats in known if stats is not None])
            if total is not None:
                self._progress.update(self._work.snapshot(total))

    def _hear(self, member: Member, outcome: Outcome) -> None:
        if outcome.failure is not None:
            self._roster.fail(member, outcome.failure)
        elif member.doing == "exchange":
            self._store(member, outcome.value)
        else:
            self._roster.advance(member, outcome.value)

    def _store(self, member: Member, report: Report) -> None:
        self._dispatch.spend(member.number, self._clock() - member.since)
        member.doing, member.stats = "ready", report.stats
        for ended in report.ended:
            row = self._dispatch.end(member.number, ended.index)
            assert row is not None, f"{member.name}: row {ended.index} is not its own"
            self._work.store(row, ended.state, ended.line)
            member.num_rows += 1
        if report.ended:
            self._roster.has_result(member)
        if not self._stopped:
            self._feed(member)

    def _lose(self, member: Member) -> str:
        """What becomes of the rows of one that is gone, in words."""
        if member.number not in self._joined:
            return ""
        self._joined.discard(member.number)
        return f"; {self._dispatch.leave(member.number)} rows go to others"


def total_stats(parts: list[EngineStats]) -> EngineStats | None:
    """Of engines that worked side by side. Times are sums; what is said in words is left out."""
    if not parts:
        return None
    return replace(
        parts[0],
        **_sums(parts, ("passes", "prompt_tokens", "generated_tokens", "pass_s", "running",
                        "waiting", "running_batch", "waiting_batch", "num_preemptions",
                        "burst_passes", "prefix_cache_queries", "prefix_cache_hits",
                        "peak_rss_bytes", "peak_device_bytes")),
        weights=_store_total([part.weights for part in parts]),
        kv_cache_usage=sum(part.kv_cache_usage for part in parts) / len(parts),
        bursts_have_lost=False,
        speculation="",
        forecast_sources="",
        drafts=None,
        phases={
            name: sum((part.phases[name] for part in parts if name in part.phases), start=zero)
            for name, zero in {n: p - p for part in parts for n, p in part.phases.items()}.items()
        },
    )  # fmt: skip


def _sums(parts: list[Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: sum(getattr(part, name) for part in parts) for name in names}


def _store_total(parts: list[StoreStats]) -> StoreStats:
    maps = ("link_bytes", "requests", "hits", "hits_below")
    numbers = tuple(field.name for field in fields(StoreStats) if field.name not in maps)
    found: dict[str, Any] = _sums(parts, numbers)
    for name in maps:
        known = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        keys = {key for one in known for key in one}
        total = {key: sum(one.get(key, 0) for one in known) for key in keys}
        found[name] = total if known else None
    return StoreStats(**found)

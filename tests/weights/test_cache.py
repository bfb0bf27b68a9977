"""WeightCache alone, and one over another, over slots and a queue whose blocks arrive when the test
says so: several callers lease, give back, give up and hint in any order, and what must hold is
checked after every call, against what whoever fills the slots has seen."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lru import LeastRecentlyUsed
from windlass.errors import BudgetError
from windlass.ids import DISK_TO_HOST, HOST, Part, Route, WeightKey
from windlass.prefetch.policies import FarthestNextUse
from windlass.prefetch.tiers import LowerPolicy, UpperPolicy, takers
from windlass.weights.cache import WeightCache
from windlass.weights.chain import Chain
from windlass.weights.demand import Demand
from windlass.weights.hints import Hint
from windlass.weights.io_queue import IoQueue, Link, Priority, Ticket, TicketState
from windlass.weights.residency import Below, Entry
from windlass.weights.slots import Slots

LAYERS = 3
KEYS = {
    Part.BLOCK: [WeightKey(Part.BLOCK, layer) for layer in range(LAYERS)],
    Part.EXPERT: [WeightKey(Part.EXPERT, i, j) for i in range(LAYERS) for j in range(4)],
    Part.HEAD: [WeightKey(Part.HEAD, -1, i) for i in range(2)],
}
ALL_KEYS = [key for keys in KEYS.values() for key in keys]
ROUTES = (DISK_TO_HOST, Route(HOST, "device"))
BLOCK_BYTES = 4096
DEPTH = 2


def hint(
    cache: WeightCache, now: int, wanted: Sequence[tuple[WeightKey, int, float]],
    dropped: Sequence[WeightKey], *, rank: int,
) -> None:  # fmt: skip
    """The pass is at layer `now`; (key, turn, probability) are hinted at, in this order behind
    earlier hints; `dropped` no more. The one place here that knows how a cache is told."""
    added = [Hint(rank + i, key, turn, chance >= 1) for i, (key, turn, chance) in enumerate(wanted)]
    cache.hint(now, added, dropped)


class Bytes(NamedTuple):
    """Of a part."""

    num_bytes: int

    def part(self, begin: int, num_bytes: int) -> "Bytes":
        return Bytes(num_bytes)


class Queue(IoQueue[Bytes]):
    """Its blocks are in flight on `wire` until that delivers them."""

    def __init__(self, wire: "Wire") -> None:
        super().__init__(wire, {route: Link(DEPTH, BLOCK_BYTES) for route in ROUTES})
        self.wire = wire

    def _move(self, ticket: Ticket[Bytes], block: Bytes) -> None:
        self.wire.in_flight.append((ticket, block.num_bytes))


class Wire:
    """Blocks in flight, and the lock of the queue: a wait goes on to the next arrival, or lets
    another caller act; it ends when the waiters are notified, and fails where nobody ever would
    notify them."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.in_flight: list[tuple[Ticket, int]] = []
        self.num_bytes = dict.fromkeys(ROUTES, 0)
        self.others: Callable[[], bool] = lambda: False  # what other callers do meanwhile
        self.queue = Queue(self)
        self._is_notified = False

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def notify_all(self) -> None:
        self._is_notified = True

    def wait(self) -> None:
        self._is_notified = False
        while not self._is_notified:
            may_act = not self.in_flight or self.chance.random() < 0.2
            if (may_act and self.others()) or self._is_notified:
                continue
            assert self.in_flight, "waits for what nobody will bring"
            self.deliver()

    def deliver(self) -> None:
        """Any of the blocks in flight arrives."""
        ticket, num_bytes = self.in_flight.pop(self.chance.randrange(len(self.in_flight)))
        self.num_bytes[ticket.route] += num_bytes
        self.queue.arrived(ticket, num_bytes)
        self.queue.raise_error()  # whatever a callback raised


class Filler:
    """Brings parts into slots, and notes what each slot holds; a read may have any length."""

    route = DISK_TO_HOST
    below: Below | None = None

    def __init__(self, link: Wire, slots: dict[Part, Slots]) -> None:
        self.link = link
        self.slots = slots
        self.content: dict[tuple[Part, int], Entry] = {}
        self.arrived: set[int] = set()  # ids of the entries of `content` that are there
        self.begun: Counter[Priority] = Counter()
        self.evictions = 0
        self.on_begin: Callable[[WeightKey], None] = lambda key: None
        self.on_evict: Callable[[Entry], None] = lambda entry: None

    def fetch(self, entry: Entry, *, priority: Priority, on_done: Callable[[], None]) -> Ticket:
        place = entry.key.part, entry.slot
        assert 0 <= entry.slot < self.slots[entry.key.part].num_slots
        assert self.find(entry.key) is None, f"{entry.key} is in two slots"
        before = self.content.pop(place, None)
        if before is not None:
            assert id(before) in self.arrived, f"{before.key} was evicted while it was read"
            self.arrived.remove(id(before))
            self.evictions += 1
            self.on_evict(before)
        self.content[place] = entry
        self.on_begin(entry.key)

        def done() -> None:
            assert entry.ticket is not None
            if entry.ticket.state is TicketState.CANCELLED:
                del self.content[place]
            else:
                self.arrived.add(id(entry))
            on_done()

        num_bytes = BLOCK_BYTES * (1 + (7 * entry.key.layer + entry.key.index) % 3)
        self.begun[priority] += 1
        return self._move(entry.key, [Bytes(num_bytes)], priority, done)

    def _move(
        self, key: WeightKey, pieces: list[Bytes], priority: Priority, done: Callable[[], None]
    ) -> Ticket:
        return self.link.queue.enqueue(self.route, pieces, priority=priority, on_done=done)

    def now(self) -> float:
        return float(sum(self.link.num_bytes.values()))

    def find(self, key: WeightKey) -> Entry | None:
        """What occupies a slot as `key`, there or under way."""
        return next((entry for entry in self.content.values() if entry.key == key), None)

    def is_resident(self, key: WeightKey) -> bool:
        entry = self.find(key)
        return entry is not None and id(entry) in self.arrived


class UpperFiller(Filler):
    """Brings parts from the slots of `lower`, which must hold them as long as they are copied."""

    route = ROUTES[1]

    def __init__(self, link: Wire, slots: dict[Part, Slots], lower: Filler, below: WeightCache):
        super().__init__(link, slots)
        self.lower = lower
        self.below = below.feed
        self.chain = Chain(below, link.queue, self.route)
        self.lent: Counter[int] = Counter()  # by id of the entry below

    def _move(
        self, key: WeightKey, pieces: list[Bytes], priority: Priority, done: Callable[[], None]
    ) -> Ticket:
        borrowed: list[Entry] = []

        def borrow(entry: Entry) -> list[Bytes]:
            assert self.lower.find(key) is entry and self.lower.is_resident(key)
            borrowed.append(entry)
            self.lent[id(entry)] += 1
            return pieces

        def ended() -> None:
            for entry in borrowed:
                assert self.lower.find(key) is entry, f"{key} was evicted while it was copied"
                self.lent[id(entry)] -= 1
            done()

        return self.chain.fetch(key, borrow, priority=priority, on_done=ended)


class Visit:
    """One caller's demand, and what it has not been given yet."""

    def __init__(self, demand: Demand, keys: Sequence[WeightKey]) -> None:
        self.demand = demand
        self.left = set(keys)


class Callers(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(1, 3), experts=st.sampled_from((1, 2, 4, 7, 12)),
        heads=st.integers(1, 2), is_farthest=st.booleans(), seed=st.integers(0, 999),
    )  # fmt: skip
    def open(self, blocks: int, experts: int, heads: int, is_farthest: bool, seed: int) -> None:
        numbers = {Part.BLOCK: blocks, Part.EXPERT: experts, Part.HEAD: heads}
        self.slots = {part: Slots(number) for part, number in numbers.items()}
        self.link = Wire(random.Random(seed))
        self.filler = Filler(self.link, self.slots)
        self.cache = WeightCache(
            {part: len(keys) for part, keys in KEYS.items()}, self.slots, self.link.queue,
            self.filler, policy=FarthestNextUse(LAYERS) if is_farthest else LeastRecentlyUsed(),
        )  # fmt: skip
        self._begin_to_watch()

    def _begin_to_watch(self) -> None:
        self.filler.on_evict = self._may_go
        self.filler.on_begin = self._begun
        self.held = self.cache.track(ALL_KEYS)
        self.visits: list[Visit] = []
        self.leases: list[Entry] = []
        self.hinted: dict[WeightKey, int] = {}  # turns; and without a slot ever since
        self.now = self.rank = 0
        self.requests: Counter[Part] = Counter()
        self.hits: Counter[Part] = Counter()

    def _begun(self, key: WeightKey) -> None:
        self.hinted.pop(key, None)

    def _may_go(self, entry: Entry) -> None:
        assert entry not in self.leases, f"{entry.key} was evicted under a lease"
        ready = [visit for visit in self.visits if entry.key in visit.demand.ready]
        assert not ready, f"{entry.key} was evicted, though a demand was to be given it"

    def _ask(self, key: WeightKey) -> None:
        self.requests[key.part] += 1
        self.hits[key.part] += self.filler.is_resident(key)

    def _given(self, entry: Entry) -> None:
        assert self.filler.find(entry.key) is entry and self.filler.is_resident(entry.key)
        self.leases.append(entry)

    def _release_any(self) -> bool:
        """What another caller may do while one waits. Whether there was anything."""
        if not self.leases:
            return False
        self.cache.release([self.leases.pop(self.link.chance.randrange(len(self.leases)))])
        return True

    def _next(self, visit: Visit) -> bool:
        """Takes one part; whether there was one. No slot is said only where all are leased."""
        try:
            entry = self.cache.next(visit.demand)
        except BudgetError:
            part = visit.demand.waiting[0].part
            leased = {id(lease) for lease in self.leases if lease.key.part == part}
            assert len(leased) == self.slots[part].num_slots, "a slot could have been had"
            assert self._release_any()
            return True
        if entry is None:
            assert not visit.left, f"{visit.left} never came"
            self.visits.remove(visit)
            return False
        visit.left.remove(entry.key)
        self._given(entry)
        return True

    def _is_at_hand(self, key: WeightKey) -> bool:
        """Whether a hint at `key` can be followed."""
        return True

    # --- what callers do --------------------------------------------------------------------------

    @precondition(lambda self: len(self.visits) < 4)
    @rule(keys=st.lists(st.sampled_from(ALL_KEYS), min_size=1, max_size=6, unique=True))
    def begin(self, keys: list[WeightKey]) -> None:
        for key in keys:
            self._ask(key)
        if keys[0].part is Part.EXPERT:  # the layer has routed: what it was guessed to need is void
            self.hinted = {
                key: turn
                for key, turn in self.hinted.items()
                if key in keys or key.layer != keys[0].layer or turn > self.now
                or key.part is not Part.EXPERT
            }  # fmt: skip
        self.visits.append(Visit(self.cache.begin(keys), keys))

    @rule(layer=st.integers(0, LAYERS - 1), indices=st.sets(st.integers(0, 3), min_size=1))
    def begin_experts(self, layer: int, indices: set[int]) -> None:
        if len(self.visits) < 4:
            self.begin([WeightKey(Part.EXPERT, layer, index) for index in sorted(indices)])

    @precondition(lambda self: self.visits)
    @rule(which=st.integers(0, 3), may_release=st.booleans())
    def take(self, which: int, may_release: bool) -> None:
        """Waits if it must; others may give leases back meanwhile."""
        self.link.others = self._release_any if may_release else lambda: False
        self._next(self.visits[which % len(self.visits)])

    @precondition(lambda self: self.visits)
    @rule(which=st.integers(0, 3), limit=st.integers(1, 3))
    def take_ready(self, which: int, limit: int) -> None:
        visit = self.visits[which % len(self.visits)]
        wanted = min(limit, len(visit.demand.ready))
        entries = self.cache.ready(visit.demand, limit)
        assert len(entries) == wanted
        for entry in entries:
            visit.left.remove(entry.key)
            self._given(entry)

    @precondition(lambda self: self.filler.content)
    @rule(which=st.integers(0, 20))
    def take_what_has_a_slot(self, which: int) -> None:
        found = list(self.filler.content.values())
        self.take_resident(found[which % len(found)].key)

    @rule(key=st.sampled_from(ALL_KEYS))
    def take_resident(self, key: WeightKey) -> None:
        is_resident = self.filler.is_resident(key)
        entry = self.cache.take_resident(key)
        assert (entry is not None) == is_resident
        if entry is not None:
            self.requests[key.part] += 1
            self.hits[key.part] += 1
            self._given(entry)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 20), count=st.integers(1, 4))
    def release(self, which: int, count: int) -> None:
        given = [self.leases.pop(which % len(self.leases)) for _ in self.leases[:count]]
        self.cache.release(given)

    @precondition(lambda self: self.visits)
    @rule(which=st.integers(0, 3))
    def abandon(self, which: int) -> None:
        visit = self.visits.pop(which % len(self.visits))
        self.cache.abandon(visit.demand)
        self.cache.abandon(visit.demand)

    @rule(
        keys=st.lists(st.sampled_from(ALL_KEYS), max_size=6, unique=True),
        dropped=st.sets(st.sampled_from(ALL_KEYS), max_size=4),
        steps=st.integers(0, 2),
        chances=st.lists(st.sampled_from((0.0, 0.3, 1.0)), min_size=6, max_size=6),
    )
    def prefetch(
        self, keys: list[WeightKey], dropped: set[WeightKey], steps: int, chances: list[float]
    ) -> None:
        self.now += steps
        place = {key: key.layer if key.layer >= 0 else LAYERS - 1 for key in keys}
        turns = [self.now + (place[key] - self.now) % LAYERS for key in keys]
        self.hinted = {key: turn for key, turn in self.hinted.items() if key not in dropped}
        for key, turn in zip(keys, turns, strict=True):
            if self.filler.find(key) is None:
                self.hinted[key] = turn
        wanted = list(zip(keys, turns, chances, strict=False))
        self._hint(wanted, sorted(dropped))
        self.rank += len(keys)

    def _hint(self, wanted: list[tuple[WeightKey, int, float]], dropped: list[WeightKey]) -> None:
        hint(self.cache, self.now, wanted, dropped, rank=self.rank)

    @precondition(lambda self: self.link.in_flight)
    @rule(count=st.integers(1, 5))
    def deliver(self, count: int) -> None:
        for _ in range(count):
            if self.link.in_flight:
                self.link.deliver()

    # --- what must hold ---------------------------------------------------------------------------

    @invariant()
    def all_parts_of_the_cache_agree(self) -> None:
        self.cache.check()
        content = self.filler.content
        for part, own in self.slots.items():
            assert own.held() == {slot for kind, slot in content if kind == part}
        occupied = [self.filler.find(key) is not None for key in ALL_KEYS]
        assert self.held.tolist() == occupied == [self.cache.holds(key) for key in ALL_KEYS]
        leases = Counter(map(id, self.leases))
        assert all(entry.leases == leases[id(entry)] for entry in content.values())
        assert leases.keys() <= {id(entry) for entry in content.values()}, "a leased part is gone"

    @invariant()
    def what_is_ready_is_there(self) -> None:
        for visit in self.visits:
            assert all(map(self.filler.is_resident, visit.demand.ready))
            kept = len(visit.demand.ready) + len(visit.demand.waiting) + visit.demand.under_way
            assert kept == len(visit.left)

    @invariant()
    def a_kind_that_fits_is_pinned_once_it_is_there(self) -> None:
        keeps_all = all(own.num_slots == len(KEYS[part]) for part, own in self.slots.items())
        assert self.cache.keeps_all == keeps_all
        some = ALL_KEYS[:4]
        fit = all(self.slots[key.part].num_slots == len(KEYS[key.part]) for key in some)
        is_there = all(map(self.filler.is_resident, some))
        assert (self.cache.pinned(some) is not None) == (fit and is_there)

    @invariant()
    def counters_add_up(self) -> None:
        stats, begun = self.cache.stats(), self.filler.begun
        assert stats.requests == self.requests
        assert {part: hits for part, hits in stats.hits.items() if hits} == +self.hits
        assert stats.evictions == self.filler.evictions
        assert stats.bytes_read == self.link.num_bytes[DISK_TO_HOST]
        assert stats.link_bytes == self.link.num_bytes
        assert stats.prefetch_issued == begun[Priority.SOON] + begun[Priority.SPECULATIVE]
        assert stats.prefetch_issued >= stats.prefetch_used + stats.prefetch_cancelled
        assert stats.prefetch_issued >= stats.prefetch_late

    @invariant()
    def the_link_is_not_idle_while_something_can_be_read(self) -> None:
        """No caller needs to wake the cache up: what a change made possible has begun."""
        route = self.filler.route
        for visit in self.visits:
            if visit.demand.waiting and self.link.queue.has_room(Priority.DEMAND, route):
                key = visit.demand.waiting[0]
                assert self.filler.find(key) is None, f"{key} has a slot, and a demand waits for it"
                assert not self.slots[key.part].num_free, f"{key} waits beside a free slot"
                idle = [entry.key for entry in self.filler.content.values() if entry.is_idle]
                assert not [k for k in idle if k.part == key.part], f"{key} waits beside idle parts"
        if self.link.queue.has_room(Priority.SPECULATIVE, route):
            waiting = [key for key in self.hinted if self.slots[key.part].num_free]
            waiting = [key for key in waiting if self._is_at_hand(key)]
            assert not waiting, f"{waiting} are hinted at, and there are free slots"

    def teardown(self) -> None:
        """All demands are served to the end, in turns, and nothing stays under way or held."""
        if not hasattr(self, "cache"):
            return
        self.link.others = self._release_any
        while self.visits:
            for visit in list(self.visits):
                self._next(visit)
        while self._release_any():
            pass
        while self.link.in_flight:
            self.link.deliver()
        for check in (self.all_parts_of_the_cache_agree, self.counters_add_up):
            check()
        assert all(entry.is_idle for entry in self.filler.content.values())


Callers.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestCallers = Callers.TestCase


class CallersOfTwoTiers(Callers):
    """The same callers, of a cache whose parts come from another; few ask that one directly."""

    @initialize(
        blocks=st.integers(1, 3), experts=st.sampled_from((1, 2, 4, 7, 12)),
        below=st.tuples(st.integers(1, 3), st.sampled_from((1, 2, 5, 12)), st.integers(1, 2)),
        is_farthest=st.booleans(), seed=st.integers(0, 999),
    )  # fmt: skip
    def open(  # type: ignore[override]
        self, blocks: int, experts: int, below: tuple[int, int, int], is_farthest: bool, seed: int
    ) -> None:
        numbers = {Part.BLOCK: blocks, Part.EXPERT: experts, Part.HEAD: 2}
        self.slots = {part: Slots(number) for part, number in numbers.items()}
        self.lower_slots = {part: Slots(n) for part, n in zip(KEYS, below, strict=True)}
        self.link = Wire(random.Random(seed))
        num_keys = {part: len(keys) for part, keys in KEYS.items()}
        kept = {part for part, number in numbers.items() if number == num_keys[part]}
        lower_policy = LowerPolicy(FarthestNextUse(LAYERS), takers(kept, [4] * LAYERS, 0))
        lower = self.lower_filler = Filler(self.link, self.lower_slots)
        self.lower = WeightCache(
            num_keys, self.lower_slots, self.link.queue, lower, policy=lower_policy
        )
        own = FarthestNextUse(LAYERS) if is_farthest else LeastRecentlyUsed()
        filler = UpperFiller(self.link, self.slots, lower, self.lower)
        self.filler = self.upper_filler = filler
        self.cache = WeightCache(
            num_keys, self.slots, self.link.queue, filler, policy=UpperPolicy(own, lower_policy)
        )
        self.cache.feed.tell(lower_policy.came_above)
        self._begin_to_watch()

    def _hint(self, wanted: list[tuple[WeightKey, int, float]], dropped: list[WeightKey]) -> None:
        super()._hint(wanted, dropped)
        hint(self.lower, self.now, wanted, dropped, rank=self.rank)

    def _is_at_hand(self, key: WeightKey) -> bool:
        return self.lower_filler.is_resident(key)

    @rule(key=st.sampled_from(ALL_KEYS))
    def take_below(self, key: WeightKey) -> None:
        """A caller of the lower cache, who gives back at once. What is being copied comes back."""
        self.link.others = lambda: False
        demand = self.lower.begin((key,))
        entry = self.lower.next(demand)
        assert entry is not None and self.lower_filler.find(key) is entry
        self.lower.release((entry,))
        self.lower.abandon(demand)

    @invariant()
    def the_lower_tier_holds_what_is_copied_and_nothing_else(self) -> None:
        self.lower.check()
        self.upper_filler.chain.check()
        for entry in self.lower_filler.content.values():
            lent = self.upper_filler.lent[id(entry)]
            assert entry.lent == entry.leases == lent, f"{entry.key}: {entry.lent}, {lent}"

    @invariant()
    def what_is_demanded_above_is_on_its_way_below(self) -> None:
        if not self.link.queue.has_room(Priority.DEMAND):
            return
        for key in self.upper_filler.chain._waiting:
            assert not self.lower_filler.is_resident(key), f"{key} is there, and not copied"
            if self.lower_filler.find(key) is None:
                content = self.lower_filler.content.values()
                others = [entry for entry in content if entry.key.part == key.part]
                assert not any(entry.is_idle for entry in others), f"{key} waits beside idle parts"
                assert len(others) == self.lower_slots[key.part].num_slots, f"{key} has no slot"

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "lower"):
            self.the_lower_tier_holds_what_is_copied_and_nothing_else()
            assert all(entry.is_idle for entry in self.lower_filler.content.values())
            assert not self.upper_filler.chain._waiting and not self.lower.feed.demands


CallersOfTwoTiers.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None
)
TestCallersOfTwoTiers = CallersOfTwoTiers.TestCase

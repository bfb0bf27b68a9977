"""Which resident weights to give up. Pure Python over names, so that a list of keys replays it."""

from collections.abc import Callable
from heapq import heapify, heappop, heappush

from windlass.ids import Part, WeightKey

_MIN_PROBABILITY = 1e-6  # keeps the expected distance finite

_Rank = tuple[float, int]  # probability, minus the count of keys added so far


class _Bucket:
    """Keys of one kind with the same next turn, the least probable first, of these the one added
    last. Entries of the heap whose rank is not the member's are stale."""

    __slots__ = ("turn", "members", "heap")

    def __init__(self, turn: int) -> None:
        self.turn = turn
        self.members: dict[WeightKey, _Rank] = {}
        self.heap: list[tuple[_Rank, WeightKey]] = []

    def add(self, key: WeightKey, rank: _Rank) -> None:
        self.members[key] = rank
        if len(self.heap) > 2 * len(self.members) + 16:
            self.rebuild()
        else:
            heappush(self.heap, (rank, key))

    def rebuild(self) -> None:
        """Puts the heap in order after ranks have changed."""
        self.heap = [(rank, key) for key, rank in self.members.items()]
        heapify(self.heap)

    def first(self) -> tuple[float, WeightKey]:
        """Probability and key of the foremost member; there must be one."""
        while True:
            rank, key = self.heap[0]
            if self.members.get(key) == rank:
                return rank[0], key
            heappop(self.heap)


class FarthestNextUse:
    """Gives up what is needed last: the turn of a key comes once per pass over `num_layers` layers,
    and the expected distance is the layers until its turn over the probability of its use then.

    `probability(key)` is of a use in one pass; None means that every key is used in every pass. It
    is asked when a key becomes evictable and again whenever its turn has passed.
    """

    def __init__(
        self, num_layers: int, *, probability: Callable[[WeightKey], float] | None = None
    ) -> None:
        assert num_layers >= 1, f"num_layers: got {num_layers}, allowed at least 1"
        self._num_layers = num_layers
        self._probability = probability
        self._now = 0  # layers since the start, over all passes
        self._turn: dict[WeightKey, int] = {}  # of keys used at least once: when it comes next
        self._bucket_of: dict[WeightKey, _Bucket] = {}  # the evictable keys
        self._buckets: dict[Part, dict[int, _Bucket]] = {part: {} for part in Part}  # by turn
        self._added = 0

    def note_use(self, key: WeightKey) -> None:
        steps = (self._place(key) - self._now) % self._num_layers
        if steps:
            self._now += steps
            self._carry_over()
        self._turn[key] = self._now + self._num_layers
        if key in self._bucket_of:
            self.discard(key)
            self.add(key)

    def add(self, key: WeightKey) -> None:
        turn = self._next_turn(key)
        self._added += 1
        buckets = self._buckets[key.part]
        bucket = buckets.get(turn)
        if bucket is None:
            bucket = buckets[turn] = _Bucket(turn)
        bucket.add(key, (self._chance(key), -self._added))
        self._bucket_of[key] = bucket

    def discard(self, key: WeightKey) -> None:
        bucket = self._bucket_of.pop(key, None)
        if bucket is None:
            return
        del bucket.members[key]
        if not bucket.members:
            del self._buckets[key.part][bucket.turn]

    def __contains__(self, key: WeightKey) -> bool:
        return key in self._bucket_of

    def victim(self, entering: WeightKey, layers: int | None) -> WeightKey | None:
        farthest = -1.0 if layers is None else layers / self._chance(entering)
        best: WeightKey | None = None
        for turn, bucket in self._buckets[entering.part].items():
            chance, key = bucket.first()
            if (turn - self._now) / chance > farthest:
                farthest = (turn - self._now) / chance
                best = key
        return best

    def _place(self, key: WeightKey) -> int:
        """Embedding, last norm and head, and a layer that drafts, have their turn with the last
        layer."""
        return key.layer if 0 <= key.layer < self._num_layers else self._num_layers - 1

    def _next_turn(self, key: WeightKey) -> int:
        turn = self._turn.get(key, -1)
        if turn >= self._now:
            return turn
        return self._now + (self._place(key) - self._now) % self._num_layers

    def _chance(self, key: WeightKey) -> float:
        return 1.0 if self._probability is None else max(self._probability(key), _MIN_PROBABILITY)

    def _carry_over(self) -> None:
        """Keys whose turn has passed wait for the next, with the probability of today."""
        for buckets in self._buckets.values():
            for turn in [turn for turn in buckets if turn < self._now]:
                bucket = buckets.pop(turn)
                bucket.turn += self._num_layers  # `now` never jumps a whole pass
                other = buckets.get(bucket.turn)
                if other is not None and len(other.members) > len(bucket.members):
                    bucket, other = other, bucket
                if other is not None:
                    for key in other.members:
                        self._bucket_of[key] = bucket
                    bucket.members.update(other.members)
                if self._probability is not None:
                    bucket.members = {k: (self._chance(k), r[1]) for k, r in bucket.members.items()}
                if other is not None or self._probability is not None:
                    bucket.rebuild()
                buckets[bucket.turn] = bucket

"""How many rows of prompts go into a pass where somebody waits for each answer: few enough that
nobody waits long for the next token, and no fewer than that helps. Counts and seconds alone.

A pass with fewer rows is shorter only as far as rows are what it takes long for: where it reads
weights, half the rows may take nearly as long, and a prompt twice as long in all. So sizes are
tried: half as many, as long as that saves a quarter of the time. What rows there are is shared
evenly: who wants less than a share gets all, and the others have more. So the first token of a
short prompt does not wait for the end of a long one, which loses as many rows as the short one has.
"""

from collections.abc import Sequence

from windlass.schedule.batch import CHUNK_TOKENS

ALONE_S = 2.0  # of a pass where nobody else is there: who comes meanwhile waits for its end
BESIDE_S = 0.5  # of a pass where others decode, or have prompts
_WORTH = 0.75  # of the time of twice the rows; more is not worth a smaller pass
_FIRST = 8  # chunks, before anything is known
_NEAR = 0.75  # of a size: passes of fewer rows tell nothing of it
_WEIGHT = 0.5  # of the last pass among those before it
_STEPS = 8  # from size to size, over those that are known
_FRESH = 16  # passes that a size is known for: rows far back in a long prompt take longer


class Pace:
    """Of one engine. Sizes are CHUNK_TOKENS times powers of two."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # by size, of passes of so many prompt rows
        self._known_at: dict[int, int] = {}  # by size, which pass was the last of it
        self._num_passes = 0
        self._size = _FIRST * CHUNK_TOKENS
        self.share = self._size  # of the next pass, that one prompt may have

    def took(self, prompt_rows: int, seconds: float) -> None:
        """The last pass."""
        if not prompt_rows:
            return
        self._num_passes += 1
        size = CHUNK_TOKENS
        while size < prompt_rows:
            size *= 2
        if prompt_rows >= _NEAR * size:
            before = self._seconds.get(size, seconds)
            self._seconds[size] = before + _WEIGHT * (seconds - before)
            self._known_at[size] = self._num_passes
        for other in [*self._seconds]:
            if self._num_passes - self._known_at[other] > _FRESH and len(self._seconds) > 1:
                del self._seconds[other]

    def split(self, wanted: Sequence[int], room: int, *, is_alone: bool) -> int:
        """Prompt rows of the next pass, at most `room`, for prompts that want so many each; sets
        `share`. `is_alone`: nobody decodes."""
        least = sum(min(one, CHUNK_TOKENS) for one in wanted)  # all come on
        paced = self.rows(room, is_alone=is_alone and len(wanted) < 2)
        rows = min(room, max(paced, least))
        self.share = share(wanted, rows)
        return rows

    def rows(self, most: int, *, is_alone: bool) -> int:
        """Prompt rows of the next pass, at most `most`. `is_alone`: nobody else waits for it."""
        target = ALONE_S if is_alone else BESIDE_S
        largest = CHUNK_TOKENS
        while 2 * largest <= most:
            largest *= 2
        self._size = min(self._size, largest)
        for _ in range(_STEPS):
            better = min(largest, max(CHUNK_TOKENS, self._better(target)))
            if better == self._size:
                break
            self._size = better
        return self._size

    def _better(self, target: float) -> int:
        """The size now, half of it or twice it: one that was not tried is, before any other."""
        size, known = self._size, self._seconds
        now, half, double = known.get(size), known.get(size // 2), known.get(2 * size)
        if now is None:
            return size
        if now <= target:
            return size if (2 * now if double is None else double) > target else 2 * size
        if double is not None and now > _WORTH * double:  # so few rows save nothing
            return 2 * size
        if size > CHUNK_TOKENS and (half is None or half <= _WORTH * now):
            return size // 2
        return 2 * size if double is None else size


def share(wanted: Sequence[int], rows: int) -> int:
    """The most rows that one prompt may have of a pass of `rows`: who wants fewer has all, others
    this. At least a chunk, and whole ones."""
    left, num = rows, len(wanted)
    for each in sorted(wanted):
        if each * num >= left:
            break
        left, num = left - each, num - 1
    even = left // num if num else rows
    return max(CHUNK_TOKENS, even // CHUNK_TOKENS * CHUNK_TOKENS)

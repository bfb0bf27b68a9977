"""What one caller waits for. Names only, no torch."""

from collections import deque

from windlass.ids import WeightKey


class Demand:
    """Keys that one caller demands, each in exactly one of three states."""

    __slots__ = ("waiting", "under_way", "ready")

    def __init__(self) -> None:
        self.waiting: deque[WeightKey] = deque()  # without a slot
        self.under_way = 0  # loading
        self.ready: deque[WeightKey] = deque()  # resident, in arrival order

    @property
    def is_over(self) -> bool:
        return not self.waiting and not self.under_way and not self.ready

    def arrived(self, key: WeightKey) -> None:
        """`key`, under way before, is resident."""
        self.under_way -= 1
        self.ready.append(key)

    def failed(self, key: WeightKey) -> None:
        """`key`, under way before, did not come: it waits again, in front."""
        self.under_way -= 1
        self.waiting.appendleft(key)

    def lost(self, key: WeightKey) -> None:
        """`key`, ready before, is given up to another caller: it waits again, in front."""
        self.ready.remove(key)
        self.waiting.appendleft(key)

"""What the weight store asks of whoever knows which weights are needed when. Names only, no torch;
implementations live in prefetch/policies.py."""

from typing import Protocol

from windlass.ids import Part, WeightKey


class EvictionPolicy(Protocol):
    """Keeps the keys that may be evicted and names the one whose loss costs least. Not thread-safe:
    the store calls it under its lock."""

    def note_use(self, key: WeightKey) -> None:
        """`key` is used now, resident before or not."""
        ...

    def add(self, key: WeightKey) -> None:
        """`key` may be evicted from now on."""
        ...

    def discard(self, key: WeightKey) -> None:
        """`key` may not be evicted any more (in use, wanted, or gone). Unknown keys are fine."""
        ...

    def __contains__(self, key: WeightKey) -> bool:
        """Whether `key` may be evicted."""
        ...

    def victim(self, part: Part, distance: float | None) -> WeightKey | None:
        """The key of `part` to give up; it stays known until `discard`. `distance`: layers until
        what comes in its place is used, as expected; None where all are needed sooner than that.
        For a demand (`distance` is None): None only where nothing of `part` may be evicted."""
        ...

"""What the weight store asks of whoever knows which weights are needed when. Names only, no torch;
implementations live in prefetch/."""

from typing import Protocol

from windlass.ids import WeightKey


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

    def victim(self, entering: WeightKey, layers: int | None) -> WeightKey | None:
        """The key of the same part to give up for `entering`; it stays known until `discard`.
        `layers`: until the turn of `entering`, where a hint brings it; None where all are needed
        sooner than that. Where it is demanded (`layers` is None): None only where nothing of this
        part may be evicted."""
        ...

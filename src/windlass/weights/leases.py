"""The right to read resident parts, one by one or as they arrive. Knows entries, not slots."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

from windlass.tensors import Tensors
from windlass.weights.demand import Demand
from windlass.weights.residency import Entry

if TYPE_CHECKING:
    from windlass.weights.store import WeightStore


class Lease:
    """The right to read one resident part until `release`. A context manager."""

    __slots__ = ("key", "_store", "_entry", "_tensors")

    def __init__(self, store: "WeightStore", entry: Entry, tensors: Tensors) -> None:
        self.key = entry.key
        self._store = store
        self._entry: Entry | None = entry
        self._tensors = tensors

    @property
    def tensors(self) -> Tensors:
        """Canonical tensors by name, in their stored type or packed, over the slot's memory."""
        assert self._entry is not None, f"{self.key} is read after its lease was released"
        return self._tensors

    def release(self) -> None:
        """Lets the part be evicted. Idempotent."""
        entry = self._end()
        if entry is not None:
            self._store._release((entry,))

    def _end(self) -> Entry | None:
        """What is to be released, once."""
        entry, self._entry = self._entry, None
        self._tensors = {}
        return entry

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Arrivals:
    """Iterator of leases in the order in which their parts become resident. The lease given out is
    released when the next is asked for; `close`, or dropping the iterator, gives up the rest.
    `ready` takes more at once."""

    def __init__(self, store: "WeightStore", demand: Demand) -> None:
        self._store = store
        self._visit = demand
        self._leases: list[Lease] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Lease:
        self._release()
        lease = self._store._next(self._visit)
        if lease is None:
            raise StopIteration
        self._leases.append(lease)
        return lease

    def ready(self, limit: int) -> list[Lease]:
        """Up to `limit` further leases, of parts that need no waiting; released with the one that
        `next` gave."""
        more = self._store._ready(self._visit, limit)
        self._leases += more
        return more

    def all(self) -> list[Lease]:
        """Leases of all that are left, waiting for them: each keeps its slot, so there must be
        enough. Released with the next call of `next` or `close`."""
        while (lease := self._store._next(self._visit)) is not None:
            self._leases.append(lease)
        return list(self._leases)

    def close(self) -> None:
        """Releases the current leases and demands the rest no more. Idempotent."""
        self._release()
        self._store._abandon(self._visit)

    def _release(self) -> None:
        entries = [entry for lease in self._leases if (entry := lease._end()) is not None]
        self._leases.clear()
        if entries:
            self._store._release(entries)

    def __del__(self) -> None:
        # The collector may run inside the store itself, so the store cleans up when it next can.
        self._store._dropped.append((self._visit, self._leases))

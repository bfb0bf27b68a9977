"""Counters of a weight store, as one frozen record. Knows no store."""

from collections.abc import Mapping
from dataclasses import dataclass

from windlass.ids import Part, Route


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """Totals since the store was made. A hit: resident when it was asked for."""

    bytes_read: int
    reads: int  # blocks
    link_bytes: Mapping[Route, int]  # all that arrived by each route, of which reads are one
    requests: Mapping[Part, int]
    hits: Mapping[Part, int]
    wait_s: float  # callers waited for weights
    prefetch_issued: int  # parts that hints began to read
    prefetch_used: int  # of these, parts that were used before they were evicted
    prefetch_cancelled: int  # given up while they were read
    prefetch_late: int  # demanded before they had arrived; most of these are used, too
    prefetch_issued_bytes: int
    prefetch_used_bytes: int
    prefetch_cancelled_bytes: int
    prefetch_late_bytes: int
    evictions: int

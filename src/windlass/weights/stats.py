"""Counters of a weight store, as one frozen record. Knows no store."""

from collections.abc import Mapping
from dataclasses import dataclass

from windlass.ids import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """Totals since the store was made. A hit: resident when it was asked for."""

    bytes_read: int
    reads: int  # blocks
    requests: Mapping[Part, int]
    hits: Mapping[Part, int]
    wait_s: float  # callers waited for weights
    prefetch_issued: int
    prefetch_used: int
    prefetch_cancelled: int
    evictions: int

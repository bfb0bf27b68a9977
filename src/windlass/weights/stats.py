"""Counters of a weight store and where its parts are, as frozen records. Know no store."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from windlass.ids import Part, Route, WeightKey


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
    hits_below: Mapping[Part, int] | None = None  # resident in the tier below alone; None without


class Place(IntEnum):
    """Of a part in one tier. Ahead: a hint brought it, and it was not used yet."""

    ABSENT = 0
    COMING = 1
    COMING_AHEAD = 2
    HELD = 3
    HELD_AHEAD = 4


class PartPlaces(NamedTuple):
    """Parts of one kind in one tier, at a moment. `places`: of those that have a slot. `uses`:
    since the store was made. `gone_s`: seconds since each was evicted last, of those that were."""

    places: Mapping[WeightKey, Place]
    uses: Mapping[WeightKey, int]
    gone_s: Mapping[WeightKey, float]

"""What a replay comes to: numbers of its measured passes, those without a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from windlass.replay.routing_trace import RoutingTrace
from windlass.replay.run import PassCounts

_NEAR = 0.02  # of all requests: as good as the steady share of hits
_WINDOW = 64  # passes over which a share of hits is taken
_SHORT_WINDOW = 8  # where many changes are laid over each other
_FEWEST_CHANGES = 4
CURVE_POINTS = 100  # of hits over passes, in reports


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Shares are of requests: of experts that a layer of a pass needs. `resident_hits`: there from
    earlier use; `prefetch_hits`: there because they were read ahead for this use, in time; `late`:
    under way already. Bytes are per token; `useful`: read ahead and used, late or not; `wasted`:
    read ahead and not used, in part or whole. Times are seconds, where a machine is only a ratio
    those of a layer of one row. `good`: of what was read ahead, what came in time and was used."""

    tokens: int
    token_s: float
    stall_s: float
    resident_hits: float
    prefetch_hits: float
    late: float
    bytes: float
    demand_bytes: float
    useful_bytes: float
    wasted_bytes: float
    cancelled: float  # experts per token that were given up while they were read
    good: float | None
    warm_after: int | None  # tokens, until hits stay near what they are in the second half
    recovery: int | None  # tokens after a change of domain, until hits are as good as later
    operating_point: float  # experts that a pass uses of a layer, in slots for a layer
    curve: tuple[float, ...]  # share of hits over time

    @property
    def hits(self) -> float:
        """Of both kinds."""
        return self.resident_hits + self.prefetch_hits

    @property
    def of_resident(self) -> float:
        """Speed, in what it would be with all experts in memory."""
        return 1 - self.stall_s / self.token_s

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "of_resident": self.of_resident, "tokens_per_s": 1 / self.token_s}


def measure(
    trace: RoutingTrace,
    counts: PassCounts,
    *,
    num_bytes: int,
    layer_slots: float,
    domains: Mapping[int, str] | None = None,
) -> Metrics:
    """`num_bytes`: of an expert; `layer_slots`: experts in memory for each layer with any;
    `domains`: of sequences, where they are known."""
    measured = ~counts.has_prompt
    own = {name: values[measured] for name, values in counts.values.items()}
    total = {name: float(values.sum()) for name, values in own.items()}
    rows = counts.rows[measured]
    tokens, requests = int(rows.sum()), total["requests"]
    demanded = (requests - total["hits"] - total["late"]) * num_bytes
    useful = total["used"] * num_bytes
    in_time = total["used"] - total["late"]
    hits = own["hits"]
    layers = sum(one is not None for one in trace.layers)
    return Metrics(
        tokens=tokens,
        token_s=total["seconds"] / tokens,
        stall_s=total["wait_s"] / tokens,
        resident_hits=(total["hits"] - in_time) / requests,
        prefetch_hits=in_time / requests,
        late=total["late"] / requests,
        bytes=total["bytes_read"] / tokens,
        demand_bytes=demanded / tokens,
        useful_bytes=useful / tokens,
        wasted_bytes=max(0.0, total["bytes_read"] - demanded - useful) / tokens,
        cancelled=total["cancelled"] / tokens,
        good=in_time / total["issued"] if total["issued"] else None,
        warm_after=_warm_after(hits, own["requests"], rows),
        recovery=None
        if domains is None
        else _recovery(hits, own["requests"], _domains(trace, measured, domains)),
        operating_point=requests / len(rows) / layers / layer_slots,
        curve=_curve(hits, own["requests"]),
    )


def _windows(hits: NDArray[Any], requests: NDArray[Any], size: int) -> NDArray[np.float64]:
    """Share of hits of each window."""
    size = min(size, len(hits))
    ones = np.ones(size)
    found: NDArray[np.float64] = np.convolve(hits, ones, "valid") / np.convolve(
        requests, ones, "valid"
    )
    return found


def _curve(hits: NDArray[Any], requests: NDArray[Any]) -> tuple[float, ...]:
    shares = _windows(hits, requests, _WINDOW)
    at = np.linspace(0, len(shares) - 1, min(CURVE_POINTS, len(shares))).astype(int)
    return tuple(shares[at].round(4).tolist())


def _warm_after(hits: NDArray[Any], requests: NDArray[Any], rows: NDArray[Any]) -> int | None:
    if len(hits) < 2 * _WINDOW:
        return None
    half = len(hits) // 2
    steady = hits[half:].sum() / requests[half:].sum()
    near = np.flatnonzero(_windows(hits, requests, _WINDOW) >= steady - _NEAR)
    return int(rows[: near[0]].sum()) if near.size else None


def _domains(
    trace: RoutingTrace, measured: NDArray[np.bool_], domains: Mapping[int, str]
) -> list[str]:
    passes = [rows for rows, counts in zip(trace.passes, measured, strict=True) if counts]
    return [domains.get(int(trace.sequences_R[rows[0]]), "") for rows in passes]


def _recovery(hits: NDArray[Any], requests: NDArray[Any], domains: Sequence[str]) -> int | None:
    """All changes laid over each other, as far as the shortest stay in a domain."""
    changes = [i for i in range(1, len(domains)) if domains[i] != domains[i - 1]]
    if len(changes) < _FEWEST_CHANGES:
        return None
    length = min(b - a for a, b in zip(changes, [*changes[1:], len(domains)], strict=True))
    if length < 2 * _SHORT_WINDOW:
        return None
    over = np.array(changes)[:, None] + np.arange(length)
    hits, requests = hits[over].sum(0), requests[over].sum(0)
    steady = hits[length // 2 :].sum() / requests[length // 2 :].sum()
    near = np.flatnonzero(_windows(hits, requests, _SHORT_WINDOW) >= steady - _NEAR)
    return int(near[0]) if near.size else None

"""Replays a trace under every policy, forecast, size and machine that is asked for, beside what no
policy can beat. Says it as a table for people and as plain data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from windlass.errors import UsageError
from windlass.forecast.interface import ExpertForecast
from windlass.forecast.learned import source_words
from windlass.forecast.registry import OFF, WITH_STATES, ForecastSetting, choose_forecast
from windlass.prefetch.prefetcher import Prefetcher
from windlass.prefetch.registry import choose_policy
from windlass.replay.bounds import Misses, belady, oracle
from windlass.replay.foretold import Foretold, measure_forecast
from windlass.replay.metrics import Metrics, measure
from windlass.replay.routers import are_logits, tell_routers
from windlass.replay.routing_trace import RoutingTrace
from windlass.replay.run import ClockedMachine, Deciders, TraceRun, guarded
from windlass.units import counted

ORACLE = "oracle"


@dataclass(frozen=True, slots=True)
class NamedMachine:
    """`of`: the machine with slots for so many experts. `rho`: None where it is a real one."""

    name: str
    rho: float | None
    of: Callable[[int], ClockedMachine]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyWishes:
    """`resident`: shares of all experts. `sees`: layers ahead that oracles know, None for all.
    `guards`: reading ahead is left out while it does not pay. `with_recall`: what forecasts
    foretell is counted, too. `domains`: of sequences."""

    forecasts: Sequence[str]
    policies: Sequence[str]
    resident: Sequence[float]
    machines: Sequence[NamedMachine]
    sees: Sequence[int | None] = ()
    guards: bool = True
    with_recall: bool = True
    domains: Mapping[int, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One replay. An oracle's forecast names the layers that it sees ahead."""

    forecast: str
    policy: str
    resident: float
    slots: int
    machine: str
    rho: float | None
    num_bytes: int  # of an expert
    metrics: Metrics
    sources: str  # of the forecast: which are on and off at the end; empty where all are on


@dataclass(frozen=True, slots=True)
class Bound:
    """Of one size. `causal`: the fewest misses of a run that knows no future and reads nothing
    ahead, None where there is none."""

    resident: float
    slots: int
    misses: Misses
    causal: float | None


@dataclass(frozen=True, slots=True)
class Study:
    """What was found."""

    trace: RoutingTrace
    runs: tuple[Run, ...]
    bounds: tuple[Bound, ...]
    foretold: Mapping[str, Foretold]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "trace": _describe(self.trace),
            "runs": [
                {
                    "forecast": run.forecast, "policy": run.policy, "resident": run.resident,
                    "slots": run.slots, "machine": run.machine, "rho": run.rho,
                    "expert_bytes": run.num_bytes, "forecast_sources": run.sources,
                    **run.metrics.to_json(),
                }
                for run in self.runs
            ],
            "bounds": [
                {
                    "resident": bound.resident, "slots": bound.slots,
                    "belady_misses": bound.misses.belady, "forced_misses": bound.misses.forced,
                    "causal_misses": bound.causal,
                    **({} if bound.causal is None else bound.misses.shares(bound.causal)),
                }
                for bound in self.bounds
            ],
            "forecasts": {name: asdict(found) for name, found in self.foretold.items()},
        }  # fmt: skip

    def lines(self) -> list[str]:
        """For people."""
        about = _describe(self.trace)
        return [
            f"trace: {about['model']}: {counted(about['layers'], 'layer')} of"
            f" {about['experts']} experts, top {about['top_k']};"
            f" {counted(about['sequences'], 'sequence')},"
            f" {counted(about['passes'], 'pass', 'passes')}, of which"
            f" {counted(about['tokens'], 'token')} without a prompt measured",
            *_table(self.runs),
            *(f"{_name(run)}: {run.sources}" for run in self.runs if run.sources),
            *(_bound_line(bound) for bound in self.bounds),
            *(line for name, found in self.foretold.items() for line in found.lines(name)),
        ]


def check_wishes(trace: RoutingTrace, wishes: StudyWishes) -> None:
    """UsageError for what cannot be replayed."""
    total, least = len(trace.table()), trace.top_k
    for share in wishes.resident:
        slots = slots_of(trace, share)
        if slots < least or share > 1:
            raise UsageError(
                f"resident: got {share:.4g} of {total} experts, allowed {least / total:.4g} (the"
                f" {least} of a token) to 1"
            )
    if not trace.num_decode_rows:
        raise UsageError(
            f"trace of {trace.model}: got {len(trace.passes)} passes, all with prompts: allowed one"
            " with tokens that were generated"
        )
    for name in wishes.forecasts:
        if name in WITH_STATES and not trace.has_states:
            raise UsageError(
                f"expert-forecast: got {name} for a trace without hidden states: record it with"
                " --routing-trace-inputs"
            )


def forecast_of(trace: RoutingTrace, name: str) -> ExpertForecast:
    """The forecast of that name, for the model of the trace."""
    hidden = 0 if trace.embedded_RD is None else trace.embedded_RD.shape[1]
    setting = ForecastSetting(trace.table(), hidden, are_logits=are_logits(trace))
    forecast = choose_forecast(name, setting)
    tell_routers(forecast, trace)
    return forecast


def slots_of(trace: RoutingTrace, share: float) -> int:
    """Experts that this share of all is."""
    return round(share * len(trace.table()))


def study(
    trace: RoutingTrace, wishes: StudyWishes, tell: Callable[[str], None] = lambda text: None
) -> Study:
    """Everything that `wishes` name; `tell` hears of each run that is done."""
    check_wishes(trace, wishes)
    runs: list[Run] = []
    bounds = []
    for share in wishes.resident:
        own: list[Run] = []
        slots = slots_of(trace, share)
        for machine in wishes.machines:
            for forecast, policy, deciders in _deciders(trace, wishes, slots):
                at = TraceRun(trace, machine.of(slots), deciders)
                metrics = measure(
                    trace, at.run(), num_bytes=at.machine.num_bytes,
                    layer_slots=slots / len(trace.table().layers), domains=wishes.domains,
                )  # fmt: skip
                own.append(Run(
                    forecast=forecast, policy=policy, resident=share, slots=slots,
                    machine=machine.name, rho=machine.rho,
                    num_bytes=at.machine.num_bytes, metrics=metrics,
                    sources=source_words(deciders.forecast),
                ))  # fmt: skip
                tell(_progress(own[-1]))
        runs += own
        causal = [
            1 - run.metrics.resident_hits for run in own
            if run.policy != ORACLE and run.forecast == OFF
        ]  # fmt: skip
        bounds.append(Bound(share, slots, belady(trace, slots), min(causal, default=None)))
    foretold = {
        name: measure_forecast(trace, forecast_of(trace, name))
        for name in wishes.forecasts if wishes.with_recall and name != OFF
    }  # fmt: skip
    return Study(trace, tuple(runs), tuple(bounds), foretold)


def _deciders(
    trace: RoutingTrace, wishes: StudyWishes, slots: int
) -> Iterator[tuple[str, str, Deciders]]:
    for name in wishes.forecasts:
        for policy_name in wishes.policies:
            forecast = forecast_of(trace, name)
            policy, observers = choose_policy(policy_name, forecast.outlook, slots)
            yield (
                name,
                policy_name,
                Deciders(forecast, policy, observers, guarded if wishes.guards else Prefetcher),
            )
    for sees in wishes.sees:
        name = "all" if sees is None else f"{sees} ahead"
        yield name, ORACLE, oracle(trace, sees)


def _describe(trace: RoutingTrace) -> dict[str, Any]:
    table = trace.table()
    return {
        "model": trace.model,
        "layers": len(table.layers),
        "experts": max(table.num_experts),
        "top_k": trace.top_k,
        "sequences": len({int(trace.sequences_R[rows[0]]) for rows in trace.passes}),
        "passes": len(trace.passes),
        "tokens": trace.num_decode_rows,
    }


# --- for people -----------------------------------------------------------------------------------

_HEAD = (
    "resident", "machine", "forecast", "policy", "hits", "ahead", "late", "read", "wasted",
    "time/token", "of resident", "warm", "recovers",
)  # fmt: skip


def _table(runs: Sequence[Run]) -> list[str]:
    rows = [_HEAD, *(_cells(run) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    texts = 4  # the first columns are words
    return [
        "  ".join(
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cells(run: Run) -> tuple[str, ...]:
    found = run.metrics
    per_token = found.bytes or 1.0
    time = f"{found.token_s:.2f}" if run.rho is not None else f"{1000 * found.token_s:.1f} ms"
    return (
        f"{100 * run.resident:.0f} %", run.machine, run.forecast, run.policy,
        f"{100 * found.resident_hits:.1f}", f"{100 * found.prefetch_hits:.1f}",
        f"{100 * found.late:.1f}", f"{per_token / run.num_bytes:.2f}",
        f"{100 * found.wasted_bytes / per_token:.1f}", time, f"{100 * found.of_resident:.0f} %",
        "-" if found.warm_after is None else str(found.warm_after),
        "-" if found.recovery is None else str(found.recovery),
    )  # fmt: skip


def _progress(run: Run) -> str:
    found = run.metrics
    return (
        f"{_name(run)}: {100 * found.hits:.1f} % hits, {100 * found.of_resident:.0f} % of the speed"
        " with all"
    )


def _name(run: Run) -> str:
    return f"{100 * run.resident:.0f} % resident, {run.machine}, {run.forecast}, {run.policy}"


def _bound_line(bound: Bound) -> str:
    misses = bound.misses
    text = (
        f"{100 * bound.resident:.0f} % resident: Belady hits {100 * (1 - misses.belady):.1f} %,"
        f" {100 * (1 - misses.forced):.1f} % where all that is read must be kept"
    )
    if bound.causal is None:
        return text
    shares = misses.shares(bound.causal)
    if shares["gap"] is None:
        return text
    text += (
        f"; the best on demand {100 * (1 - bound.causal):.1f} %: of its misses"
        f" {100 * shares['gap']:.0f} % could be saved"
    )
    if shares["admission"] is None or shares["victim"] is None:
        return text
    return (
        f"{text}, {100 * shares['victim']:.0f} % of that by the choice of victims and"
        f" {100 * shares['admission']:.0f} % by not keeping what is read"
    )

"""What a run says of its plan when it begins, and of its speed when it ends: lines for people,
fields for programs."""

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from windlass.engine.engine_stats import EngineStats
from windlass.engine.expectation import Check
from windlass.ids import DEVICE, DISK, HOST
from windlass.phases import MODULES
from windlass.units import counted, format_bytes, format_seconds

if TYPE_CHECKING:
    from windlass.engine.engine import Engine


def plan_lines(engine: "Engine") -> list[str]:
    """What an engine is about to do: where memory goes, and what is expected of its job."""
    return [*engine.plan.lines(), *engine.notes]


def memory_words(stats: EngineStats) -> str:
    """What was taken at once, of the process's memory and of a device's."""
    own = f"{format_bytes(stats.peak_rss_bytes)} at the peak"
    if not stats.peak_device_bytes:
        return own
    return f"{own}, {format_bytes(stats.peak_device_bytes)} of the device's"


def weights_words(stats: EngineStats) -> str:
    """Where experts were found."""
    shares = stats.expert_shares
    if not shares:
        return "experts found in memory: none needed"
    words = {DEVICE: "on the device", HOST: "in memory", DISK: "on disk"}
    found = (f"{words[tier]}: {100 * share:.1f} %" for tier, share in shares.items())
    return f"experts found {', '.join(found)}"


def prefetch_lines(stats: EngineStats) -> list[str]:
    """What became of reads ahead, nothing where there were none; which forecasts are off."""
    store, lines = stats.weights, [stats.forecast_sources] if stats.forecast_sources else []
    if not store.prefetch_issued:
        return lines
    parts = ", ".join(
        f"{what} {format_bytes(number)}"
        for what, number in (
            ("used", store.prefetch_used_bytes),
            ("late", store.prefetch_late_bytes),
            ("cancelled", store.prefetch_cancelled_bytes),
        )
    )
    found = f"; {stats.speculation}" if stats.speculation else ""
    return [f"prefetched: {format_bytes(store.prefetch_issued_bytes)}; {parts}{found}", *lines]


def draft_lines(stats: EngineStats) -> list[str]:
    """What became of guesses; nothing where none were asked for."""
    own = stats.drafts
    if own is None:
        return []
    share = f" ({100 * own.accepted / own.proposed:.0f} %)" if own.proposed else ""
    return [
        f"drafts: {own.accepted} of {own.proposed} right{share}, in"
        f" {counted(own.passes, 'pass', 'passes')};"
        f" {counted(own.passes_without, 'pass', 'passes')} could have guessed and did not;"
        f" {own.note}"
    ]


def burst_lines(stats: EngineStats) -> list[str]:
    """How sequences took turns; nothing where none did."""
    if not stats.burst_passes:
        return []
    passes = counted(stats.burst_passes, "pass", "passes")
    line = f"bursts: in {passes} one sequence decoded while others waited"
    if stats.bursts_have_lost:
        line += "; all together brought more tokens/s, so that bursts were given up"
    return [line]


def weights_json(stats: EngineStats) -> dict[str, Any]:
    """Counters of weights, for programs."""
    prefetch = {
        field.name: getattr(stats.weights, field.name)
        for field in fields(stats.weights)
        if field.name.startswith("prefetch_")
    }
    return {
        "bytes_read": stats.bytes_read,
        "expert_requests": stats.expert_requests,
        "expert_hits": stats.expert_hits,
        "expert_shares": stats.expert_shares,
        **({"drafts": asdict(stats.drafts)} if stats.drafts else {}),
        "evictions": stats.weights.evictions,
        **prefetch,
        "speculation": stats.speculation,
        "forecast_sources": stats.forecast_sources,
    }


def phase_lines(stats: EngineStats, check: Check | None) -> list[str]:
    """Prefill and decode, what worked meanwhile, and what was expected; nothing where no pass has
    run."""
    total = stats.total
    if not total.seconds:
        return []
    share = {name: 100 * seconds / total.seconds for name, seconds in total.modules.items()}
    modules = ", ".join(f"{name} {share[name]:.0f} %" for name in MODULES)
    disk, host, wait, other = (
        f"{100 * seconds / total.seconds:.0f} %"
        for seconds in (total.disk_s, total.host_s, total.wait_s, total.other_s)
    )
    return [
        f"prefill: {_rate(stats.prompt_tokens, stats.prefill_s)};"
        f" decode: {_rate(stats.decode_tokens, stats.decode_s)}",
        f"of the passes' time: disk busy {disk}; computing {host} ({modules}),"
        f" waiting for weights {wait}, the rest {other}",
        *(check.lines() if check else ()),
    ]


def phase_json(stats: EngineStats, check: Check | None) -> dict[str, Any]:
    """The same for programs."""
    return {
        "prefill_time": stats.prefill_s,
        "decode_time": stats.decode_s,
        "prefill_throughput": _per_second(stats.prompt_tokens, stats.prefill_s),
        "decode_throughput": _per_second(stats.decode_tokens, stats.decode_s),
        "phases": stats.phases_json(),
        "prediction": check.to_json() if check else None,
    }


def _rate(tokens: int, seconds: float) -> str:
    rate = _per_second(tokens, seconds)
    in_all = f"{counted(tokens, 'token')} in {format_seconds(seconds)}"
    return in_all if rate is None else f"{in_all}, {rate:.2f} per s"


def _per_second(tokens: int, seconds: float) -> float | None:
    """None where there was nothing to do."""
    return tokens / seconds if tokens and seconds else None

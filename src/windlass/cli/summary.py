"""What a run says of its plan when it begins, and of its speed when it ends: lines for people,
fields for programs."""

from typing import TYPE_CHECKING, Any

from windlass.engine.engine_stats import EngineStats
from windlass.phases import MODULES
from windlass.units import format_seconds

if TYPE_CHECKING:
    from windlass.engine.engine import Engine


def plan_lines(engine: "Engine") -> list[str]:
    """What an engine is about to do: where memory goes, and what is expected of its job."""
    return [*engine.plan.lines(), *engine.notes]


def phase_lines(stats: EngineStats) -> list[str]:
    """Prefill and decode, and what worked meanwhile; nothing where no pass has run."""
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
        *(stats.check.lines() if stats.check else ()),
    ]


def phase_json(stats: EngineStats) -> dict[str, Any]:
    """The same for programs."""
    return {
        "prefill_time": stats.prefill_s,
        "decode_time": stats.decode_s,
        "prefill_throughput": _per_second(stats.prompt_tokens, stats.prefill_s),
        "decode_throughput": _per_second(stats.decode_tokens, stats.decode_s),
        "phases": stats.phases_json(),
        "prediction": stats.check.to_json() if stats.check else None,
    }


def _rate(tokens: int, seconds: float) -> str:
    rate = _per_second(tokens, seconds)
    in_all = f"{tokens} tokens in {format_seconds(seconds)}"
    return in_all if rate is None else f"{in_all}, {rate:.2f} per s"


def _per_second(tokens: int, seconds: float) -> float | None:
    """None where there was nothing to do."""
    return tokens / seconds if tokens and seconds else None

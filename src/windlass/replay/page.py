"""A study as one HTML page that needs nothing else: tables, and lines drawn as SVG."""

from collections.abc import Mapping, Sequence
from html import escape

from windlass.replay.study import ORACLE, Run, Study

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 560, 300, 56, 40
_COLOURS = ("#0b6e99", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#a16207", "#0f766e", "#475569")
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#1e293b}
figure{display:inline-block;margin:0 1em 1.5em 0;vertical-align:top}
figcaption{font-weight:600;margin-bottom:.3em}svg text{font:11px system-ui,sans-serif;fill:#334155}
pre{overflow-x:auto;background:#f1f5f9;padding:1em;font-size:12px}
"""


def page(study: Study, title: str) -> str:
    """The whole page."""
    charts = [
        *(_sizes(study, machine) for machine in dict.fromkeys(r.machine for r in study.runs)),
        _hits(study),
        *_links(study),
        *(_curves(study, share) for share in dict.fromkeys(r.resident for r in study.runs)),
        *_recalls(study),
    ]
    text = "\n".join(study.lines())
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{''.join(charts)}"
        f"<pre>{escape(text)}</pre></html>\n"
    )


def _name(run: Run) -> str:
    return f"{run.policy}, {run.forecast}"


def _sizes(study: Study, machine: str) -> str:
    runs = [run for run in study.runs if run.machine == machine]
    lines = {
        name: [(100 * run.resident, 100 * run.metrics.of_resident) for run in own]
        for name, own in _grouped(runs).items()
    }
    return chart(f"How much memory for how much speed? {machine}", lines,
                 "% of experts in memory", "% of the speed with all")  # fmt: skip


def _hits(study: Study) -> str:
    first = study.runs[0].machine
    runs = [run for run in study.runs if run.machine == first and run.policy != ORACLE]
    lines = {
        name: [(100 * run.resident, 100 * run.metrics.resident_hits) for run in own]
        for name, own in _grouped(runs).items()
    }
    lines["Belady"] = [(100 * b.resident, 100 * (1 - b.misses.belady)) for b in study.bounds]
    return chart("Hits of what is kept", lines, "% of experts in memory", "% of requests")


def _links(study: Study) -> list[str]:
    if len({run.rho for run in study.runs}) < 2:
        return []
    charts = []
    for share in dict.fromkeys(run.resident for run in study.runs):
        runs = [run for run in study.runs if run.resident == share and run.rho is not None]
        lines = {
            name: [(run.rho or 0.0, 100 * run.metrics.of_resident) for run in own]
            for name, own in _grouped(runs).items()
        }
        charts.append(chart(f"Link and computation, {100 * share:.0f} % in memory", lines,
                            "rho", "% of the speed with all"))  # fmt: skip
    return charts


def _curves(study: Study, share: float) -> str:
    first = study.runs[0].machine
    lines: dict[str, Points] = {}
    for run in study.runs:
        if run.resident == share and run.machine == first:
            curve, tokens = run.metrics.curve, run.metrics.tokens
            step = tokens / max(1, len(curve))
            lines[_name(run)] = [(i * step, 100 * hits) for i, hits in enumerate(curve)]
    return chart(f"Hits over time, {100 * share:.0f} % in memory", lines, "tokens", "% of requests")


def _recalls(study: Study) -> list[str]:
    charts = []
    for name, found in study.foretold.items():
        lines = {
            horizon: [(float(layer), 100 * recall) for layer, recall in by_layer.items()]
            for horizon, by_layer in found.by_layer.items()
        }
        charts.append(chart(f"What {name} foretells, by horizon", lines, "layer", "recall, %"))
    return charts


def _grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_name(run), []).append(run)
    return found


# --- one chart ------------------------------------------------------------------------------------


def chart(title: str, lines: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """Lines over numbers from 0 on, with a legend."""
    points = [point for line in lines.values() for point in line]
    x_most, y_most = (max((p[i] for p in points), default=1) or 1 for i in (0, 1))
    x_step, y_step = _step(x_most), _step(y_most)
    across = (_WIDTH - _LEFT - 10) / x_most
    up = (_HEIGHT - _BOTTOM - 10) / y_most
    base = _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> str:
        return f"{_LEFT + x * across:.1f},{base - y * up:.1f}"

    parts = [f"<path d='M{_LEFT},10V{base}H{_WIDTH - 10}' fill=none stroke=#94a3b8 />"]
    for i in range(int(x_most / x_step) + 1):
        x = _LEFT + i * x_step * across
        parts.append(f"<text x={x:.1f} y={base + 16} text-anchor=middle>{i * x_step:g}</text>")
    for i in range(int(y_most / y_step) + 1):
        y = base - i * y_step * up
        parts.append(f"<text x={_LEFT - 6} y={y + 4:.1f} text-anchor=end>{i * y_step:g}</text>")
        parts.append(f"<path d='M{_LEFT},{y:.1f}H{_WIDTH - 10}' stroke=#e2e8f0 />")
    for number, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        dash = "" if number < len(_COLOURS) else " stroke-dasharray=5,3"
        path = " ".join(place(x, y) for x, y in line)
        parts.append(f"<polyline points='{path}' fill=none stroke={colour} stroke-width=2{dash} />")
        if len(line) <= 12:
            parts += [
                f"<circle cx={place(x, y).split(',')[0]} cy={place(x, y).split(',')[1]} r=3"
                f" fill={colour} />"
                for x, y in line
            ]
        at = _HEIGHT + 16 * number + 12
        parts.append(f"<path d='M{_LEFT},{at - 4}h24' stroke={colour} stroke-width=2{dash} />")
        parts.append(f"<text x={_LEFT + 30} y={at}>{escape(name)}</text>")
    parts.append(f"<text x={_WIDTH - 10} y={base + 32} text-anchor=end>{escape(x_label)}</text>")
    parts.append(f"<text x=4 y=10>{escape(y_label)}</text>")
    height = _HEIGHT + 16 * len(lines) + 8
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f"<svg width={_WIDTH} height={height} role=img>{''.join(parts)}</svg></figure>"
    )


def _step(most: float) -> float:
    """Between marks: 1, 2 or 5 times a power of ten, at most eight of them."""
    step = 1e-3
    while True:
        for factor in (1, 2, 5):
            if most <= 8 * factor * step:
                return factor * step
        step *= 10

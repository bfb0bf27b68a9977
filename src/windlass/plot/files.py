"""Writes a chart to a file, in the format that its name says."""

import importlib
from pathlib import Path
from typing import Any

from windlass.errors import UsageError
from windlass.plot.chart import Chart, Panel
from windlass.plot.svg import to_html, to_svg

ENDINGS = (".html", ".svg", ".png")
_DPI = 130


def check_plot(path: Path) -> None:
    """UsageError where `save_chart` could not write it: an unknown ending, no folder, no
    matplotlib."""
    if path.suffix not in ENDINGS:
        raise UsageError(f"plot: got {str(path)!r}, allowed a name ending in {', '.join(ENDINGS)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"plot: got {str(path)!r}: no such folder")
    if path.suffix == ".png":
        _pyplot()


def save_chart(chart: Chart, path: Path) -> None:
    """Writes `path`, as `check_plot` allows it."""
    check_plot(path)
    try:
        if path.suffix == ".png":
            _save_png(chart, path)
        else:
            draw = to_html if path.suffix == ".html" else to_svg
            path.write_text(draw(chart), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"plot: {path}: cannot be written: {error.strerror}") from error


def _pyplot() -> Any:
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise UsageError(
            "plot: .png needs matplotlib: install windlass[plot], or name a file .html or .svg"
        ) from error


def _save_png(chart: Chart, path: Path) -> None:
    pyplot = _pyplot()
    heights = [2.2 if panel.bars else 4.6 for panel in chart.panels]
    figure, axes = pyplot.subplots(
        len(chart.panels), 1, figsize=(11, sum(heights)), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    figure.suptitle(chart.title, fontsize=9)
    for panel, (ax,) in zip(chart.panels, axes, strict=True):
        _draw(panel, ax)
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)


def _draw(panel: Panel, ax: Any) -> None:
    ax.set_title(panel.title, fontsize=9)
    ax.set(xlabel=panel.x.label, xlim=(panel.x.low, panel.x.high))
    ax.set_ylim(panel.y.low, panel.y.high)
    if panel.x.is_log:
        ax.set_xscale("log")
    if panel.y.is_log:
        ax.set_yscale("log")
    if panel.y.names:
        ax.set_yticks(range(len(panel.y.names)), panel.y.names)
    else:
        ax.set_ylabel(panel.y.label)
    for line in panel.lines:
        xs, ys = zip(*line.points, strict=True)
        ax.plot(xs, ys, "--" if line.is_dashed else "-", label=line.label)
    for number, point in enumerate(panel.points, start=1):
        x = min(point.x, panel.x.high)
        ax.plot([x], [point.y], "ko", label=f"{number} {point.label}")
        ax.annotate(str(number), (x, point.y))
    for colour, label in enumerate(sorted({bar.label for bar in panel.bars})):
        own = [bar for bar in panel.bars if bar.label == label]
        ax.barh(
            [bar.y for bar in own], [bar.end - bar.begin for bar in own],
            left=[bar.begin for bar in own], height=0.7, color=f"C{colour}", label=label,
        )  # fmt: skip
    ax.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")

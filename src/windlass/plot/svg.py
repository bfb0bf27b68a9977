"""Draws a chart as SVG, alone or in a page of HTML. No dependency; nothing is loaded from
elsewhere."""

import math
from collections.abc import Iterator
from html import escape

from windlass.plot.chart import Axis, Chart, Panel

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 1000, 90, 250, 40, 50
_HEIGHT = {"lines": 460, "bars": 220}
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999",
            "#222255", "#bb5500")  # fmt: skip
_TEXT = 'font-family="sans-serif" font-size="12"'


def to_html(chart: Chart) -> str:
    """A page of its own."""
    text = escape("\n".join(chart.text))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>'
        f'{escape(chart.title)}</title></head>\n<body style="font-family:sans-serif">\n'
        f"{to_svg(chart)}\n<pre>{text}</pre>\n</body></html>\n"
    )


def to_svg(chart: Chart) -> str:
    """All panels, one below the other."""
    heights = [_HEIGHT["bars" if panel.bars else "lines"] for panel in chart.panels]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{sum(heights) + 30}" '
        f'viewBox="0 0 {_WIDTH} {sum(heights) + 30}">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" {_TEXT} font-weight="bold">{escape(chart.title)}</text>',
    ]
    top = 30
    for number, (panel, height) in enumerate(zip(chart.panels, heights, strict=True)):
        parts += _Frame(panel, number, top, height).draw()
        top += height
    return "\n".join([*parts, "</svg>"])


class _Frame:
    """One panel at its place."""

    def __init__(self, panel: Panel, number: int, top: int, height: int) -> None:
        self._panel = panel
        self._clip = f"panel{number}"
        self._x0, self._x1 = _LEFT, _WIDTH - _RIGHT
        self._y0, self._y1 = top + height - _BOTTOM, top + _TOP

    def draw(self) -> Iterator[str]:
        panel = self._panel
        width, height = self._x1 - self._x0, self._y0 - self._y1
        box = f'x="{self._x0}" y="{self._y1}" width="{width}" height="{height}"'
        yield f'<clipPath id="{self._clip}"><rect {box}/></clipPath>'
        yield _text(self._x0, self._y1 - 10, panel.title)
        yield from self._axes()
        yield f'<g clip-path="url(#{self._clip})">'
        yield from self._lines()
        yield from self._bars()
        yield "</g>"
        yield from self._points()
        yield f'<rect {box} fill="none" stroke="black"/>'
        yield from self._legend()

    def _x(self, value: float) -> float:
        return self._x0 + _share(self._panel.x, value) * (self._x1 - self._x0)

    def _y(self, value: float) -> float:
        return self._y0 + _share(self._panel.y, value) * (self._y1 - self._y0)

    def _axes(self) -> Iterator[str]:
        x, y = self._panel.x, self._panel.y
        for value, name in ticks(x):
            at = self._x(value)
            yield _rule(at, self._y0, at, self._y1)
            yield _text(at, self._y0 + 16, name, anchor="middle")
        for value, name in ticks(y):
            at = self._y(value)
            if not y.names:
                yield _rule(self._x0, at, self._x1, at)
            yield _text(self._x0 - 6, at + 4, name, anchor="end")
        middle = (self._x0 + self._x1) / 2
        yield _text(middle, self._y0 + 36, x.label, anchor="middle")
        if not y.names:
            yield _text(8, self._y1 - 10, y.label)

    def _lines(self) -> Iterator[str]:
        for line, colour in zip(self._panel.lines, _colours(), strict=False):
            points = " ".join(f"{self._x(a):.1f},{self._y(b):.1f}" for a, b in line.points)
            dash = ' stroke-dasharray="6 4"' if line.is_dashed else ""
            yield (
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}>'
                f"<title>{escape(line.label)}</title></polyline>"
            )

    def _bars(self) -> Iterator[str]:
        labels = _labels(self._panel)
        for bar in self._panel.bars:
            left, right = self._x(bar.begin), self._x(bar.end)
            top, bottom = self._y(bar.y + 0.35), self._y(bar.y - 0.35)
            yield (
                f'<rect x="{left:.2f}" y="{top:.1f}" width="{max(0.2, right - left):.2f}"'
                f' height="{bottom - top:.1f}" fill="{_colour(labels.index(bar.label))}">'
                f"<title>{escape(bar.label)}: {bar.begin:.4g} to {bar.end:.4g} s</title></rect>"
            )

    def _points(self) -> Iterator[str]:
        for number, point in enumerate(self._panel.points, start=1):
            x = min(max(self._x(point.x), self._x0), self._x1)
            y = min(max(self._y(point.y), self._y1), self._y0)
            yield (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="black"><title>'
                f"{escape(point.label)}: {point.x:.3g} FLOP/byte, {point.y:.3g} FLOP/s</title>"
                "</circle>"
            )
            yield _text(x + 7, y + 12, str(number))

    def _legend(self) -> Iterator[str]:
        x, y = self._x1 + 12, self._y1 + 8
        if self._panel.bars:
            entries = [(label, _colour(i)) for i, label in enumerate(_labels(self._panel))]
        else:
            labels = (line.label for line in self._panel.lines)
            entries = [(label, _colour(i)) for i, label in enumerate(labels)]
        for label, colour in entries:
            yield f'<rect x="{x}" y="{y - 8}" width="12" height="8" fill="{colour}"/>'
            yield _text(x + 18, y, label)
            y += 18
        for number, point in enumerate(self._panel.points, start=1):
            yield _text(x, y, f"{number}  {point.label}")
            y += 18


def ticks(axis: Axis) -> list[tuple[float, str]]:
    """Places and what is written there: powers of ten, names, or about six round numbers."""
    if axis.names:
        return [(float(i), name) for i, name in enumerate(axis.names)]
    if axis.is_log:
        first, last = math.ceil(math.log10(axis.low)), math.floor(math.log10(axis.high))
        return [(10.0**power, f"1e{power}") for power in range(first, last + 1)]
    step = 10 ** math.floor(math.log10((axis.high - axis.low) / 3))
    while (axis.high - axis.low) / step > 7:
        step *= 2
    count = math.floor((axis.high - axis.low) / step + 1e-9)
    return [(axis.low + i * step, f"{axis.low + i * step:.4g}") for i in range(count + 1)]


def _share(axis: Axis, value: float) -> float:
    """0 at the low end, 1 at the high end."""
    if axis.is_log:
        value = math.inf if value == math.inf else math.log10(max(value, 1e-300))
        low, high = math.log10(axis.low), math.log10(axis.high)
    else:
        low, high = axis.low, axis.high
    return min(10.0, max(-10.0, (value - low) / (high - low)))


def _labels(panel: Panel) -> list[str]:
    return sorted({bar.label for bar in panel.bars})


def _colours() -> Iterator[str]:
    yield from (_colour(i) for i in range(1000))


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _rule(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {_TEXT} text-anchor="{anchor}">{escape(text)}</text>'

"""A picture as data: panels with lines, points and bars, whoever draws them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Axis:
    """`low` to `high`, in the unit that `label` says; `names`: of places 0, 1, ... where it has no
    numbers."""

    label: str
    low: float
    high: float
    is_log: bool = False
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """Points joined, clipped to the panel."""

    label: str
    points: tuple[tuple[float, float], ...]
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """One mark with its words beside it."""

    label: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Bar:
    """From `begin` to `end` along x, at place `y` of a named axis; one colour for each label."""

    label: str
    y: int
    begin: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...] = ()
    points: tuple[Point, ...] = ()
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """Panels from top to bottom, and text below them."""

    title: str
    panels: tuple[Panel, ...]
    text: tuple[str, ...] = ()

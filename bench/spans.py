"""Where the time of a traced run went: seconds and counts of spans by lane and name. Knows the
trace's format, no engine."""

import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_PLACE = re.compile(r"\[\d+\]|\d+ ")  # `expert[3][17]` and `128 rows of ...` lose their numbers


@dataclass(slots=True)
class Total:
    """Spans of one name on one lane (all disk threads are one)."""

    lane: str
    name: str
    count: int = 0
    seconds: float = 0.0
    rows: int = 0
    num_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def totals(path: Path) -> list[Total]:
    """By lane, longest first."""
    events = _read(path)
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    found: dict[tuple[str, str], Total] = {}
    for event in events:
        if event["ph"] != "X":
            continue
        lane = lanes[event["tid"]].split(" ")[0]
        name = _PLACE.sub("", event["name"])
        total = found.setdefault((lane, name), Total(lane, name))
        total.count += 1
        total.seconds += event["dur"] / 1e6
        total.rows += event["args"].get("rows", 0)
        total.num_bytes += event["args"].get("bytes", 0)
    return sorted(found.values(), key=lambda total: (total.lane, -total.seconds))


def rows_histogram(path: Path, name: str) -> dict[int, tuple[int, float]]:
    """Spans called `name` by rows, in classes up to 4, 16, 64, 256, ...: (count, seconds)."""
    classes: dict[int, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for event in _read(path):
        if event["ph"] == "X" and event["name"] == name:
            top = 4
            while top < event["args"]["rows"]:
                top *= 4
            count, seconds = classes[top]
            classes[top] = (count + 1, seconds + event["dur"] / 1e6)
    return dict(sorted(classes.items()))


def _read(path: Path) -> list[dict[str, Any]]:
    """Also a trace without its end."""
    text = path.read_text(encoding="utf-8").rstrip().rstrip(",")
    events: list[dict[str, Any]] = json.loads(text if text.endswith("\n]") else text + "]")
    return events

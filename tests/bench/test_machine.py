"""What every benchmark writes: JSON with a measurement on each line."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import machine

DOCUMENT = {"bench": "x", "rates": {"fp32": 1.23456789e11}, "rows": [{"a": 1.0, "b": [1, 2]}, {}],
            "none": [], "numbers": [1, 2.5], "word": None}  # fmt: skip


def test_a_measurement_is_a_line():
    text = machine.to_text(DOCUMENT)
    assert '\n  {"a": 1.0, "b": [1, 2]},\n  {}\n ]' in text
    read = json.loads(text)
    assert read == DOCUMENT | {"rates": {"fp32": 1.23457e11}}
    assert machine.to_text(read) == text


def test_recorded_results_are_written_like_that():
    folder = Path(__file__).parents[2] / "bench" / "results"
    for path in folder.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert machine.to_text(json.loads(text)) == text, path.name

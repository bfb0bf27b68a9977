"""Traces are JSON that a viewer opens, also when the run is cut off."""

import json
import time

import pytest

from windlass.errors import UsageError
from windlass.trace import Tracer


def test_spans_and_counters_are_chrome_trace_events(tmp_path):
    file = tmp_path / "trace.json"
    tracer = Tracer(file)
    with tracer.span("outer", layer=3):
        with tracer.span("read", lane="disk 0", bytes=7):
            pass
    tracer.counter("rows", rows=12)
    cut = file.read_text()  # nothing was flushed, or a prefix of the events
    tracer.close()
    tracer.close()
    with tracer.span("late"):
        pass
    events = json.loads(file.read_text())
    assert file.read_text().startswith(cut)
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert set(spans) == {"outer", "read"}
    assert spans["outer"]["args"] == {"layer": 3} and spans["read"]["args"] == {"bytes": 7}
    assert spans["outer"]["ts"] <= spans["read"]["ts"]
    assert spans["outer"]["dur"] >= spans["read"]["dur"] >= 0
    names = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M"}
    assert names["disk 0"] == spans["read"]["tid"] != spans["outer"]["tid"] == names["compute"]
    assert [e["args"] for e in events if e["ph"] == "C"] == [{"rows": 12}]


def test_without_a_path_nothing_is_written():
    tracer = Tracer()
    with tracer.span("x"):
        tracer.counter("y", z=1)
    tracer.close()


def test_seconds_of_spans_are_summed_by_name_with_and_without_a_file(tmp_path):
    for path in (None, tmp_path / "trace.json"):
        tracer = Tracer(path)
        with tracer.span("outer"):
            for _ in range(2):
                with tracer.span("inner"):
                    time.sleep(0.001)
        assert tracer.seconds["outer"] >= tracer.seconds["inner"] >= 0.002
        assert set(tracer.seconds) == {"outer", "inner"}
        tracer.close()


def test_a_file_that_cannot_be_made_is_the_users_error(tmp_path):
    for path in (tmp_path / "nowhere" / "trace.json", tmp_path):
        with pytest.raises(UsageError, match="trace: got"):
            Tracer(path)

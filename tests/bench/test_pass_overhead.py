"""The bench of what a pass costs beside waiting runs both engines, and they agree."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import pass_overhead


def test_two_engines_take_turns_and_give_one_text():
    found = pass_overhead._measure("demo", ["8", None], 12)
    few, all_there = found["8"], found["None"]
    assert few["text"] == all_there["text"]
    assert all_there["reads"] < few["reads"]
    assert 0 < few["hits"] < all_there["hits"] <= 1
    for one in found.values():
        assert 0 < one["less_wait_tenth_ms"] <= one["less_wait_ms"]
        assert 0 < one["kernels_ms"] < one["mean_ms"]
        assert 0 < one["python_tenth_ms"] <= one["python_ms"]

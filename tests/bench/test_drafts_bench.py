"""The bench of drafts compares engines that give one answer."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import drafts


def test_all_kinds_answer_alike():
    options = argparse.Namespace(rounds=1, output_tokens=6)
    row = drafts.bench("8", "a b a b a b a", 0.0, options)
    assert row["off_tokens_per_s"] > 0 and row["gain_always"] > 0
    assert row["proposed"] >= row["accepted"]

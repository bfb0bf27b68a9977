"""The bench of the prefetcher runs passes, and times every layer and the head."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import prefetcher


def test_a_token_is_the_sum_of_its_layers():
    setting = prefetcher.Setting(layers=3, experts=64, resident=0.5, skew=2.0)
    model, routing = prefetcher._Model(setting), prefetcher._Routing(setting)
    assert len(prefetcher._one_pass(model, routing, setting)) == 4
    model.weights.cache.check()
    row = prefetcher.bench(setting, warm=1, passes=3)
    assert 0 < row["median_us"] <= row["p95_us"] and row["token_us"] > row["median_us"]
    assert 0 < row["hit_share"] < 1

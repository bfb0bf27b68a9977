"""The benches of many rows and many replicas do what they say."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import driver_scale
import replica_scale
from replica_scale import Costs, Fleet, Simulation

COSTS = Costs(message_s=0.0005, give_row_s=0.00005, store_row_s=0.00001)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are Linux's")
def test_steps_of_a_small_job(tmp_path: Path) -> None:
    driver_scale.write_rows(tmp_path / "in.jsonl", 100)
    found = driver_scale.steps(tmp_path)
    with (tmp_path / "steps.jsonl").open() as output:
        assert sum(1 for _ in output) == 100
    assert found["dispatch_s"] > 0 and found["match_peak_bytes"] > 0 < found["journal_bytes"]


def test_replicas_that_die_lose_work_and_no_row() -> None:
    calm = Fleet(replicas=4, rows=3000, rows_per_s=10, capacity=8, window=16)
    quiet = Simulation(calm, COSTS).run()
    assert quiet["deaths"] == quiet["rows_lost"] == 0 and 0 < quiet["driver_busy"] < 0.2
    assert 4 * 8 <= quiet["most_rows_held"] <= 4 * 16
    wild = replace(calm, death_every_s=30.0, start_s=5.0)
    found = Simulation(wild, COSTS).run()
    assert found["deaths"] > 2 and found["rows_lost"] > 0 and found["job_s"] > quiet["job_s"]
    assert found == Simulation(wild, COSTS).run()


def test_a_driver_can_be_what_binds() -> None:
    fast = Fleet(replicas=16, rows=5000, rows_per_s=2000, capacity=8, window=16)
    found = Simulation(fast, COSTS).run()
    assert found["driver_busy"] > 0.7 and found["rows_a_message"] > 2
    assert replica_scale.fleets(quick=True)[0].rows_per_s < 1

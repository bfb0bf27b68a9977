"""What the bench of predictions keeps of a run's summary."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import prediction


def test_a_row_has_predicted_and_measured_seconds_of_each_phase():
    phase = {"predicted_s": 9.0, "measured_s": 10.0, "error": -0.1, "bound": {"disk": 1.0}}
    check = {"share_of_bound": 0.5, "phases": {"decode": phase, "total": phase}}
    row = prediction._row(
        {"prediction": check, "passes": 3}, model="m", budget=0, lengths=(1, 2, 3)
    )
    kept = {"predicted_s": 9.0, "measured_s": 10.0, "error": -0.1}
    assert row["phases"] == {"decode": kept, "total": kept} and "passes" not in row
    assert prediction._cells(row) == ["m", "0", "1 x 2 x 3", "9.0", "10.0", "-10 %", "50 %"]

"""How many rows of prompts a pass has: over a clock that follows a formula."""

import pytest

from admission_machine import Machine
from windlass.engine.pace import ALONE_S, BESIDE_S, Pace, share
from windlass.schedule.batch import CHUNK_TOKENS


def settled(fixed_s: float, row_s: float, *, is_alone: bool = False, passes: int = 40) -> list[int]:
    """Rows of the last passes on a machine whose passes take so long."""
    pace, rows = Pace(), []
    for _ in range(passes):
        rows.append(pace.rows(8192, is_alone=is_alone))
        pace.took(rows[-1], fixed_s + rows[-1] * row_s)
    return rows[passes // 2 :]


@pytest.mark.parametrize(("is_alone", "most_s"), [(False, BESIDE_S), (True, ALONE_S)])
@pytest.mark.parametrize("row_s", [1e-5, 1e-4, 1e-3, 4e-3])
def test_passes_are_as_long_as_others_may_wait(row_s: float, is_alone: bool, most_s: float) -> None:
    for rows in settled(0.001, row_s, is_alone=is_alone):
        assert rows * row_s <= 1.05 * most_s
        assert rows == 8192 or 2 * rows * row_s > 0.95 * most_s


def test_where_rows_cost_little_a_pass_keeps_them() -> None:
    """Ten seconds to read weights, whatever rows there are: half of them would save nothing."""
    rows = settled(10.0, 1e-4)
    assert sum(one >= 4096 for one in rows) >= 0.8 * len(rows)


def test_what_is_known_of_the_beginning_of_a_prompt_is_forgotten() -> None:
    """Rows far back take longer, and those of the next prompt do not."""
    pace = Pace()
    for row_s in (1e-4, 1e-2, 1e-4):
        for _ in range(60):
            rows = pace.rows(8192, is_alone=False)
            pace.took(rows, rows * row_s)
        assert 0.2 * BESIDE_S < max(rows, CHUNK_TOKENS) * row_s <= 2 * BESIDE_S


def test_who_wants_little_has_all_of_it() -> None:
    assert share([30_000], 512) == 512
    assert share([30_000, 20], 512) == 448  # whole chunks of what the other leaves
    assert share([30_000, 30_000], 512) == 256
    assert share([100, 100, 100], 512) >= 100
    assert share([30_000] * 20, 512) == CHUNK_TOKENS
    assert share([], 512) == 512


def test_a_short_prompt_does_not_wait_for_a_long_ones_end() -> None:
    machine = Machine(pages=2000, seqs=4, rows=512, pace=Pace())
    for length in (5000, 3000, 20):
        machine.add(length, 4, name=str(length))
    machine.step()
    assert [one.num_prompt for one in machine.admission.running] == [5000, 3000, 20]
    short = machine.admission.running[2]
    assert len(short.output_ids) == 1
    while not machine.finished:
        machine.step()
    assert machine.finished == [short]
    while machine.admission.running:
        machine.step()
    assert [one.num_prompt for one in machine.finished] == [20, 3000, 5000]


def test_a_long_prompt_that_is_there_first_gives_way_too() -> None:
    machine = Machine(pages=2000, seqs=8, rows=512, pace=Pace())
    machine.add(5000, 4)
    machine.step()
    machine.add(20, 4)
    machine.step()
    assert [len(one.output_ids) for one in machine.admission.running] == [0, 1]

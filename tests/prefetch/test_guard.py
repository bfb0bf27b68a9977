"""Windows with and without, on a clock that is made up."""

import random

import pytest

from windlass.prefetch.guard import WindowGuard


def run(factor: float, passes: int, *, noise: float = 0.1, guard: WindowGuard | None = None):
    """Passes that take `factor` as long where the guard is on: the guard, share of passes that it
    was on, and their time over that of passes without."""
    chance, guard = random.Random(1), guard or WindowGuard()
    seconds, was_on = 0.0, 0
    for _ in range(passes):
        one = (factor if guard.is_on else 1.0) * (1 - noise / 2 + noise * chance.random())
        was_on += guard.is_on
        seconds += one
        guard.add("decode", one)
    return guard, was_on / passes, seconds / passes


@pytest.mark.parametrize("factor", [0.7, 0.85, 0.95])
def test_what_pays_stays_on(factor):
    guard, share, seconds = run(factor, 3000)
    assert guard.verdict == "pays" and share > 0.9 and seconds < factor + 0.01
    assert guard.gain == pytest.approx(1 - factor, abs=0.06)


@pytest.mark.parametrize(("factor", "most"), [(1.05, 1.01), (1.2, 1.01), (2.0, 1.03)])
def test_what_loses_is_off_but_for_ever_rarer_probes(factor, most):
    guard, share, seconds = run(factor, 3000)
    assert guard.verdict == "loses" and share < 0.05 and seconds < most


def test_a_change_of_the_work_is_noticed_both_ways():
    guard, *_ = run(1.2, 2000)
    guard, share, _ = run(0.8, 4000, guard=guard)
    assert guard.verdict == "pays" and share > 0.5
    guard, _, seconds = run(1.2, 4000, guard=guard)
    assert guard.verdict == "loses" and seconds < 1.15


def test_a_few_passes_that_others_hold_up_decide_nothing():
    chance, guard = random.Random(2), WindowGuard()
    for _ in range(2000):
        late = 20.0 if chance.random() < 0.02 else 0.0
        guard.add("decode", (0.9 if guard.is_on else 1.0) + late)
    assert guard.verdict != "loses"


def test_passes_of_different_kinds_are_never_compared():
    guard = WindowGuard(window=4)
    for number in range(400):
        guard.add(number // 5, 1.0 + number)  # four that count, then another kind
    assert guard.verdict == "open" and guard.gain == 0

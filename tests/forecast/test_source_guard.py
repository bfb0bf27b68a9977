"""What a source saves, made up."""

import numpy as np
import pytest

from windlass.forecast.source_guard import SourceGuard

WINDOW = 16


def speak(guard: SourceGuard, gain: float, passes: int, *, noise: float = 0.1) -> list[bool]:
    """Passes in which a source saves this share of the log loss: whether it spoke in each."""
    chance, spoke = np.random.default_rng(0), []
    used_E = np.arange(8) < 2
    for _ in range(passes):
        guard.turn()
        spoke.append(guard.speaks)
        if guard.speaks:
            stood = chance.uniform(0.4, 0.6)  # that each is guessed right
            share = 1 - gain + chance.normal(0, noise)
            said_E, stood_E = (np.where(used_E, q, 1 - q) for q in (stood**share, stood))
            guard.add(stood_E, said_E, used_E)
    return spoke


@pytest.mark.parametrize("gain", [0.05, 0.3])
def test_what_is_nearer_stays_on(gain):
    guard = SourceGuard(window=WINDOW)
    assert all(speak(guard, gain, 60 * WINDOW)) and guard.is_on


@pytest.mark.parametrize("gain", [-0.5, -0.05])
def test_what_is_further_off_is_asked_ever_more_rarely(gain):
    guard = SourceGuard(window=WINDOW)
    assert all(speak(guard, gain, 2 * WINDOW)), "one window to learn, one to be judged by"
    spoke = speak(guard, gain, 100 * WINDOW)
    assert not guard.is_on and sum(spoke) / len(spoke) < 0.15
    waits = [len(one) for one in "".join(".x"[one] for one in spoke).split("x") if one]
    assert waits[:6] == [n * WINDOW for n in (1, 2, 4, 8, 16, 32)] and max(waits) == 32 * WINDOW


def test_what_becomes_nearer_is_back_within_36_windows():
    guard = SourceGuard(window=WINDOW)
    speak(guard, -0.1, 200 * WINDOW)
    speak(guard, 0.2, 36 * WINDOW)
    assert guard.is_on and all(speak(guard, 0.2, 10 * WINDOW))


def test_noise_changes_nothing():
    """Hardly a gain, and passes that differ by more: what is on stays on, what is off stays off."""
    guard = SourceGuard(window=WINDOW)
    assert all(speak(guard, 0.02, 40 * WINDOW, noise=0.3))
    speak(guard, -0.5, 2 * WINDOW)
    speak(guard, 0.0, 40 * WINDOW, noise=0.3)
    assert not guard.is_on


def test_one_bad_window_decides_nothing_several_do():
    guard = SourceGuard(window=WINDOW)
    speak(guard, 0.3, 5 * WINDOW)
    assert all(speak(guard, -0.3, WINDOW)) and all(speak(guard, 0.3, 5 * WINDOW))
    speak(guard, -0.4, 3 * WINDOW + 1)
    assert not guard.is_on


def test_what_still_learns_is_taught_but_not_believed():
    guard = SourceGuard(window=WINDOW)
    for gain, is_on in ((-0.9, True), (-0.6, False), (-0.3, False), (0.3, True)):
        assert all(speak(guard, gain, WINDOW))
        guard.turn()
        assert guard.is_on == is_on and guard.speaks


def test_a_pass_in_which_nothing_was_said_counts_for_nothing():
    guard = SourceGuard(window=WINDOW)
    for _ in range(20 * WINDOW):
        guard.turn()
    assert guard.is_on and guard.speaks
    assert all(speak(guard, -1.0, 2 * WINDOW)) and not speak(guard, -1.0, 2)[1]

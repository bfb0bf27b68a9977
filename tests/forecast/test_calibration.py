"""Probabilities are what comes to be, and who knows nothing says the base rate."""

import numpy as np
import pytest

from windlass.forecast.calibration import Calibration

EXPERTS, TOP_K = 32, 4
BASE = TOP_K / EXPERTS


def chosen(z_TE: np.ndarray) -> np.ndarray:
    used = np.zeros(z_TE.shape, bool)
    np.put_along_axis(used, np.argsort(-z_TE, 1)[:, :TOP_K], True, 1)
    return used


def margin(z_TE: np.ndarray) -> np.ndarray:
    ordered = np.sort(z_TE, 1)
    return z_TE - 0.5 * (ordered[:, -TOP_K, None] + ordered[:, -TOP_K - 1, None])


def taught(noise: float, *, sign: float = 1.0, scale: float = 1.0, tokens: int = 1000):
    """A calibration, and what it said of the second half of the tokens, with what came."""
    chance = np.random.default_rng(1)
    calibration, said, came = Calibration(has_rates=False), [], []
    for i in range(tokens):
        truth = chance.normal(0, 1, (1, EXPERTS))
        seen = margin(sign * truth + noise * chance.normal(0, 1, truth.shape)) * scale
        used = chosen(truth)
        if i >= tokens // 2:
            said.append(calibration.say(seen, None).chances_TE)
            came.append(used)
        calibration.learn(calibration.say(seen, None), used)
    return np.concatenate(said), np.concatenate(came)


def error(said: np.ndarray, came: np.ndarray) -> float:
    bins = np.minimum((said * 10).astype(int), 9).ravel()
    gaps = np.bincount(bins, said.ravel()) - np.bincount(bins, came.ravel())
    return float(np.abs(gaps).sum() / said.size)


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("noise", [0.2, 0.5, 2.0])
def test_probabilities_come_true_at_any_noise_and_scale(noise, scale):
    said, came = taught(noise, scale=scale)
    assert error(said, came) < 0.02
    top = said > 0.8
    assert noise > 0.5 or (top.mean() > 0.3 * BASE and came[top].mean() > 0.8)


@pytest.mark.parametrize(("noise", "sign"), [(1e6, 1.0), (1.0, -1.0), (0.05, -1.0)])
def test_a_random_or_an_adversarial_source_passes_no_threshold(noise, sign):
    said, came = taught(noise, sign=sign)
    assert error(said, came) < 0.02
    assert said.mean() == pytest.approx(BASE, abs=0.02) and said.max() < 2 * BASE


def test_a_source_that_turns_into_a_liar_is_found_out_within_a_few_hundred_tokens():
    chance = np.random.default_rng(2)
    calibration = Calibration(has_rates=False)
    for i in range(1400):
        truth = chance.normal(0, 1, (1, EXPERTS))
        seen = margin(truth if i < 1000 else chance.normal(0, 1, truth.shape))
        said = calibration.say(seen, None)
        calibration.learn(said, chosen(truth))
        if i == 999:
            assert said.chances_TE.max() > 0.9
    assert said.chances_TE.max() < 0.4


def test_rates_help_where_margins_say_nothing():
    chance = np.random.default_rng(3)
    calibration = Calibration(has_rates=True)
    rate = np.full((1, EXPERTS), 0.02)
    rate[0, :8] = 0.4
    for _ in range(1000):
        used = chance.random((1, EXPERTS)) < rate
        calibration.learn(calibration.say(margin(chance.normal(0, 1, rate.shape)), rate), used)
    said = calibration.say(margin(chance.normal(0, 1, rate.shape)), rate).chances_TE
    assert said[0, :8].mean() == pytest.approx(0.4, abs=0.06)
    assert said[0, 8:].mean() == pytest.approx(0.02, abs=0.015)

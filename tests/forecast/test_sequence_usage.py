"""Usage by sequence, against a loop over single tokens."""

import numpy as np
import pytest

from routing import passing, segment
from windlass.forecast import sequence_usage
from windlass.forecast.interface import ExpertTable
from windlass.forecast.sequence_usage import HALF_LIVES, MOST_SEQUENCES, SequenceUsage, usage_bytes
from windlass.forecast.usage import UsageForecast
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens

EXPERTS, TOP_K = 8, 2


def routed(layer: int, one_pass: Batch, ids_TA: np.ndarray) -> RoutedTokens:
    return RoutedTokens(layer, one_pass, np.bincount(ids_TA.ravel(), minlength=EXPERTS), ids_TA)


def tell(forecast: SequenceUsage | UsageForecast, one_pass: Batch, ids_TA: np.ndarray) -> None:
    forecast.begin(one_pass)
    forecast.observe(routed(0, one_pass, ids_TA))
    forecast.end()


def random_ids(count: int, seed: int = 0) -> np.ndarray:
    chance = np.random.default_rng(seed)
    return np.stack([chance.permutation(EXPERTS)[:TOP_K] for _ in range(count)])


def rates(forecast: SequenceUsage, sequence: int) -> np.ndarray:
    return forecast._rates[forecast._slots[sequence]]


def by_token(start_E: np.ndarray, ids_TA: np.ndarray) -> np.ndarray:
    """(H, E)"""
    averages = np.tile(start_E, (len(HALF_LIVES), 1))
    for row in ids_TA:
        for average, half_life in zip(averages, HALF_LIVES, strict=True):
            left = 0.5 ** (1 / half_life)
            average *= left
            average[row] += 1 - left
    return averages


def test_a_prompt_in_one_step_is_its_tokens_one_by_one():
    table = ExpertTable([EXPERTS], TOP_K)
    ids = random_ids(40)
    whole, single, cut = (SequenceUsage(table) for _ in range(3))
    tell(whole, passing(segment(7, 40, 0)), ids)
    for i in range(40):
        tell(single, passing(segment(7, 1, i)), ids[i : i + 1])
    tell(
        cut,
        passing(segment(7, 25, 0, ends=False), segment(8, 3, 0)),
        np.vstack((ids[:25], ids[:3])),
    )
    tell(cut, passing(segment(7, 15, 25)), ids[25:])
    expected = by_token(table.uniform, ids)
    for forecast in (whole, single, cut):
        np.testing.assert_allclose(rates(forecast, 7), expected)
    np.testing.assert_allclose(rates(cut, 8), by_token(table.uniform, ids[:3]))


def test_tokens_of_a_pass_are_merged_as_independent():
    forecast = SequenceUsage(ExpertTable([EXPERTS] * 2, TOP_K))
    one_pass = passing(segment(0, 1, 5), segment(1, 1, 9), segment(2, 64, 0, ends=False))
    for _ in range(3):
        tell(forecast, one_pass, random_ids(66))
    q_SE = np.array([forecast._chances[forecast._slots[i], :EXPERTS] for i in range(3)])
    q_SE = np.clip(q_SE, 0, 1)
    part = slice(0, EXPERTS)
    log_spared = np.log1p(-q_SE)
    usage = 1 - np.exp(log_spared.sum(0))
    np.testing.assert_allclose(forecast.outlook.usage[part], usage)
    ahead = 1 - np.exp(log_spared[0] + log_spared[1] + 64 * log_spared[2])
    np.testing.assert_allclose(forecast.outlook.next[part], np.where(ahead > 0.999, 1, ahead))
    forecast.begin(passing(segment(0, 1, 8), segment(1, 1, 12)))
    now = 1 - (1 - q_SE[0]) * (1 - q_SE[1])
    np.testing.assert_allclose(forecast.outlook.now[part], now)


def test_a_layer_that_has_routed_is_known():
    forecast = SequenceUsage(ExpertTable([EXPERTS, 0, EXPERTS], TOP_K))
    one_pass = passing(segment(0, 1, 0))
    forecast.begin(one_pass)
    before = forecast.outlook.version
    forecast.observe(routed(2, one_pass, np.array([[3, 5]])))
    assert forecast.outlook.now[EXPERTS:].tolist() == [0, 0, 0, 1, 0, 1, 0, 0]
    assert forecast.outlook.now[:EXPERTS].tolist() == pytest.approx([TOP_K / EXPERTS] * EXPERTS)
    assert forecast.outlook.version > before


def test_sequences_do_not_mix_and_newcomers_begin_with_what_all_use():
    forecast = SequenceUsage(ExpertTable([EXPERTS], TOP_K))
    both = passing(segment(0, 1, 1), segment(1, 1, 1))
    for _ in range(60):
        tell(forecast, both, np.array([[0, 1], [6, 7]]))
    forecast.begin(passing(segment(0, 1, 61)))
    assert forecast.outlook.now[0] > 0.8 and forecast.outlook.now[6] < 0.15
    forecast.begin(passing(segment(1, 1, 61)))
    assert forecast.outlook.now[6] > 0.8 and forecast.outlook.now[0] < 0.15
    forecast.begin(passing(segment(2, 1, 0)))
    shares = forecast._shared.shares
    np.testing.assert_allclose(forecast.outlook.now, shares)
    assert 0.3 < shares[0] < 0.6 and shares[0] == shares[7] > 2 * shares[3]


def test_the_half_life_that_foretells_best_weighs_most():
    switching, steady = (SequenceUsage(ExpertTable([EXPERTS], TOP_K)) for _ in range(2))
    for i in range(400):
        pair = 2 * (i // 25 % 4)
        tell(switching, passing(segment(0, 1, i + 1)), np.array([[pair, pair + 1]]))
        tell(steady, passing(segment(0, 1, i + 1)), random_ids(1, seed=i))
    assert switching._losses[0].argmin() == 0, "eight tokens"
    assert steady._losses[0].argmin() == len(HALF_LIVES), "what all text uses"


def test_a_sequence_number_that_begins_again_is_another_sequence():
    forecast = SequenceUsage(ExpertTable([EXPERTS], TOP_K))
    for i in range(60):
        tell(forecast, passing(segment(0, 1, i + 1)), np.array([[0, 1]]))
    for i in range(100):  # so that what all use is something else
        tell(forecast, passing(segment(1, 50, 50 * i)), random_ids(50, seed=i))
    forecast.begin(passing(segment(0, 1, 61)))
    assert forecast.outlook.now[0] > 0.8
    forecast.begin(passing(segment(0, 4, 0)))
    np.testing.assert_allclose(forecast.outlook.usage, forecast._shared.shares)


def test_sequences_not_seen_for_long_are_forgotten_and_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(sequence_usage, "_REMEMBERED", 4)
    table = ExpertTable([EXPERTS], TOP_K)
    forecast = SequenceUsage(table)
    for i in range(12):
        tell(forecast, passing(segment(0, 1, i + 1)), np.array([[0, 1]]))
        tell(forecast, passing(segment(100 + i, 1, 1)), np.array([[6, 7]]))
    assert list(forecast._slots) == [109, 110, 0, 111]
    assert sorted(forecast._slots.values()) == [0, 1, 2, 3]
    expected = by_token(table.uniform, np.tile([0, 1], (12, 1)))
    np.testing.assert_allclose(rates(forecast, 0)[:, 6], expected[:, 6])
    held = (forecast._rates, forecast._chances, *vars(forecast.outlook).values())
    assert sum(one.nbytes for one in held if isinstance(one, np.ndarray)) <= usage_bytes(table)


def test_of_many_sequences_the_average_counts_as_ever():
    table = ExpertTable([EXPERTS], TOP_K)
    ours, today = SequenceUsage(table), UsageForecast(table)
    count = MOST_SEQUENCES + 1
    for i in range(5):
        one_pass = passing(*(segment(s, 1, i + 1) for s in range(count)))
        ids = np.sort(random_ids(count, seed=i), axis=1) // 2  # some are never used
        for forecast in (ours, today):
            tell(forecast, one_pass, ids)
    assert not ours._slots
    assert ours.outlook.usage.tolist() == today.outlook.usage.tolist()
    ours.begin(one_pass)
    assert ours.outlook.now.tolist() == today.outlook.now.tolist()


def test_without_ids_the_shared_usage_is_learnt():
    forecast = SequenceUsage(ExpertTable([EXPERTS], TOP_K))
    one_pass = passing(segment(0, 1, 1))
    for _ in range(200):
        forecast.begin(one_pass)
        counts = np.bincount([2, 3], minlength=EXPERTS)
        forecast.observe(RoutedTokens(0, one_pass, counts))
    assert forecast.outlook.next[2] > 0.7 > 0.1 > forecast.outlook.next[0]

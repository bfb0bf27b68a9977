"""The forecast by usage of all text."""

import pytest

from routing import rows, told
from windlass.forecast.interface import ExpertTable
from windlass.forecast.usage import UsageForecast
from windlass.ids import Part, WeightKey


def expert(layer: int, index: int) -> WeightKey:
    return WeightKey(Part.EXPERT, layer, index)


def test_the_forecast_begins_uniform_and_learns():
    forecast = UsageForecast(ExpertTable([0, 8], top_k=2))
    assert forecast.outlook.now.tolist() == pytest.approx([0.25] * 8)
    forecast.begin(rows(4))
    assert forecast.probability(expert(1, 3)) == pytest.approx(1 - 0.75**4)
    forecast.begin(rows(1))
    for _ in range(100):
        forecast.observe(told(1, {0: 10, 1: 6, 2: 4}, 8))
    assert forecast.probability(expert(1, 0)) > 0.9
    assert 0 < forecast.probability(expert(1, 7)) < 0.05
    assert forecast.outlook.now.sum() == pytest.approx(2), "every token uses top_k experts"
    forecast.begin(rows(10_000))
    assert forecast.probability(expert(1, 0)) == 1 == forecast.probability(WeightKey(Part.BLOCK, 1))


def test_the_forecast_follows_a_change_of_topic_and_stays_finite():
    forecast = UsageForecast(ExpertTable([4], top_k=1))
    for _ in range(300):
        forecast.observe(told(0, {0: 1000}, 4))
    for _ in range(20):
        forecast.observe(told(0, {1: 1000}, 4))
    assert forecast.probability(expert(0, 1)) > 0.9
    assert forecast.probability(expert(0, 0)) < 0.1
    assert forecast._shared._weight[0] <= 1e12

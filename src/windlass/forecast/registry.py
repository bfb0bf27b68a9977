"""Forecasts by name, for the engine and for replay."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from windlass.forecast.interface import ExpertForecast, ExpertTable
from windlass.forecast.told import ToldForecast
from windlass.forecast.usage import UsageForecast

OFF = "off"  # nothing is read ahead but what is certain; what is kept goes by usage


class ForecastSetting(NamedTuple):
    """What forecasts are made from."""

    table: ExpertTable
    hidden_size: int


def _usage(setting: ForecastSetting) -> ExpertForecast:
    return UsageForecast(setting.table)


def _off(setting: ForecastSetting) -> ExpertForecast:
    return ToldForecast(_usage(setting), proposes=False)


FORECASTS: Mapping[str, Callable[[ForecastSetting], ExpertForecast]] = {
    "usage": _usage,
    OFF: _off,
}


def choose_forecast(name: str, setting: ForecastSetting) -> ExpertForecast:
    """The forecast of that name."""
    return FORECASTS[name](setting)

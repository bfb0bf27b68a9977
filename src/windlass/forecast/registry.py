"""Forecasts by name, for the engine and for replay."""

from collections.abc import Callable
from typing import NamedTuple

from windlass.forecast.finemoe import FineMoeForecast, FineMoeSettings, MapFile
from windlass.forecast.interface import ExpertForecast, ExpertTable
from windlass.forecast.kept_usage import KeptUsage
from windlass.forecast.learned import LearnedForecast
from windlass.forecast.moe_infinity import MoeInfinityForecast
from windlass.forecast.sequence_usage import SequenceUsage
from windlass.forecast.told import ToldForecast

OFF = "off"  # nothing is read ahead but what is certain; what is kept goes by usage
WITH_STATES = ("learned", "finemoe", "gate")  # those that want hidden states


class ForecastSetting(NamedTuple):
    """What forecasts are made from. `are_logits`: of the scores that routers report.
    `limit_bytes`: of what gates hold. `clock`: seconds; without one no forecast depends on time,
    and what a thread would find is known one layer later. `maps`: where FineMoE's are kept."""

    table: ExpertTable
    hidden_size: int
    are_logits: bool = False
    limit_bytes: int | None = None
    clock: Callable[[], float] | None = None
    maps: MapFile | None = None
    earlier: KeptUsage | None = None  # what runs before this one used


def _seeded(forecast: LearnedForecast | SequenceUsage, setting: ForecastSetting) -> ExpertForecast:
    """With what earlier runs used."""
    if setting.earlier is not None:
        forecast.seed(setting.earlier.counts, setting.earlier.tokens)
    return forecast


def _learned(setting: ForecastSetting, *, is_fixed: bool = False) -> ExpertForecast:
    forecast = LearnedForecast(
        setting.table, setting.hidden_size, limit_bytes=setting.limit_bytes, is_fixed=is_fixed,
        clock=setting.clock,
    )  # fmt: skip
    return _seeded(forecast, setting)


def _gate(setting: ForecastSetting) -> ExpertForecast:
    return _learned(setting, is_fixed=True)


def _finemoe(setting: ForecastSetting) -> ExpertForecast:
    settings = FineMoeSettings(delay=1 if setting.clock is None else None)
    return FineMoeForecast(
        setting.table, setting.hidden_size, settings, are_logits=setting.are_logits,
        file=setting.maps,
    )  # fmt: skip


def _moe_infinity(setting: ForecastSetting) -> ExpertForecast:
    return MoeInfinityForecast(setting.table)


def _usage(setting: ForecastSetting) -> ExpertForecast:
    forecast = SequenceUsage(setting.table)
    return _seeded(forecast, setting)


def _off(setting: ForecastSetting) -> ExpertForecast:
    return ToldForecast(_usage(setting), proposes=False)


FORECASTS: dict[str, Callable[[ForecastSetting], ExpertForecast]] = {
    "learned": _learned,
    "finemoe": _finemoe,
    "moe-infinity": _moe_infinity,
    "gate": _gate,
    "usage": _usage,
    OFF: _off,
}


def choose_forecast(name: str, setting: ForecastSetting) -> ExpertForecast:
    """The forecast of that name. One that has a `close` wants it called, one that is a
    `RouterReader` the routers."""
    return FORECASTS[name](setting)

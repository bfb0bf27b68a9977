"""Who expects uses of experts in an engine, which of them are given up, and what is known of
earlier runs: put together from options."""

import logging
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from windlass.build.recording import open_recorder
from windlass.checkpoint.folder import CheckpointFolder
from windlass.errors import UsageError
from windlass.forecast.finemoe import FineMoeForecast, MapFile
from windlass.forecast.gate_shares import are_logits
from windlass.forecast.interface import ExpertForecast, ExpertTable
from windlass.forecast.kept_usage import KeptUsage
from windlass.forecast.learned import LearnedForecast
from windlass.forecast.registry import ForecastSetting, choose_forecast
from windlass.forecast.usage import UsageForecast
from windlass.ids import Part
from windlass.options import EngineOptions
from windlass.plan import Plan
from windlass.prefetch.guard import WindowGuard
from windlass.prefetch.prefetcher import Prefetcher
from windlass.prefetch.registry import DEFAULT_POLICY, ChosenPolicy, choose_policy
from windlass.replay.recorder import RoutingRecorder
from windlass.runtime.host import Foresight
from windlass.schedule.observer import RoutingObserver
from windlass.schedule.passes import PassShape
from windlass.weights.store import WeightStore

_logger = logging.getLogger(__name__)


class Outfit(NamedTuple):
    """What is made before the weights are: the store needs the policy, the prefetcher the store."""

    forecast: ExpertForecast
    chosen: ChosenPolicy
    usage: KeptUsage | None
    recorder: RoutingRecorder | None
    is_guarded: bool  # whether reading ahead is left when it does not pay
    below: ChosenPolicy | None = None  # of the host, where it is not what passes take weights from

    def foresight(self, plan: Plan, shape: PassShape, weights: WeightStore) -> Foresight:
        """What the runtime is given; what earlier runs used most begins to be read."""
        observers: list[RoutingObserver] = [
            *self.chosen.observers,
            *(() if self.below is None else self.below.observers),
            *(one for one in (self.usage, self.recorder) if one is not None),
        ]
        readers = (self.forecast,) if isinstance(self.forecast, LearnedForecast) else ()
        if not plan.overlap:
            return Foresight(self.forecast, None, tuple(observers), readers)
        prefetcher = Prefetcher(
            shape,
            weights.cache,
            self.forecast,
            usage=None if self.usage is None else self.usage.shares,
            guard=WindowGuard() if self.is_guarded else None,
            below=weights.supply.below,
        )
        if plan.host_experts:
            prefetcher.leave_to_host(plan.host_experts)
        prefetcher.fill()
        return Foresight(self.forecast, prefetcher, tuple(observers), readers)


def make_outfit(
    options: EngineOptions, model: CheckpointFolder, plan: Plan, stamp: str, opened: ExitStack
) -> Outfit:
    """As `options` say. `stamp`: the checkpoint's. What has to be closed is left to `opened`."""
    table = ExpertTable.of(model.spec.trunk)
    slots = plan.top.of(Part.EXPERT).slots
    usage = None
    if isinstance(options.expert_usage, Path) and slots < len(table):
        usage = KeptUsage(options.expert_usage, stamp, table)
        opened.callback(_save, usage)
    maps = options.expert_map_store
    if maps is not None:
        _prepare_folder(maps)
    setting = ForecastSetting(
        table,
        model.spec.hidden_size,
        are_logits=are_logits(model.spec),
        limit_bytes=plan.host.forecast_bytes,
        clock=time.perf_counter,
        maps=None if maps is None else MapFile(maps, stamp),
        earlier=usage,
    )
    if slots >= len(table):  # all stay: nothing is to be foretold
        forecast: ExpertForecast = UsageForecast(table)
    else:
        forecast = choose_forecast(_useful(options, plan), setting)
    if isinstance(forecast, FineMoeForecast):
        opened.callback(_close, forecast)
    chosen, *below = (
        choose_policy(options.expert_cache_policy, forecast.outlook, tier.of(Part.EXPERT).slots)
        for tier in (plan.top, plan.host)[: len(plan.tiers)]
    )
    recorder = open_recorder(options, model, stamp, opened)
    # the systems of the papers have no guard: who compares with them wants them as they are
    is_guarded = options.expert_forecast in ("learned", "gate", "usage")
    return Outfit(forecast, chosen, usage, recorder, is_guarded, *below)


def _useful(options: EngineOptions, plan: Plan) -> str:
    """The forecast that was asked for. Gates foretell few sequences, for which the plan has room;
    of many, usage says as much."""
    asked = options.expert_forecast
    has_room = asked not in ("learned", "gate") or plan.host.forecast_bytes
    return asked if has_room else "usage"


def follows_sequences(options: EngineOptions) -> bool:
    """Whether experts stay because their sequence used them."""
    by_usage = options.expert_forecast not in ("finemoe", "moe-infinity")
    return by_usage and options.expert_cache_policy == DEFAULT_POLICY


def _prepare_folder(path: Path) -> None:
    """Found before anything runs rather than at its end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"expert_map_store: got {str(path)!r}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"expert_map_store: got {str(path)!r}: its folder is not writable")


def _close(forecast: FineMoeForecast) -> None:
    try:
        forecast.close()
    except UsageError as error:  # as of usage
        _logger.warning("%s", error)


def _save(usage: KeptUsage) -> None:
    try:
        usage.save()
    except UsageError as error:  # a run that has ended well does not fail for it
        _logger.warning("%s", error)

"""Who expects uses of experts in an engine, which of them are given up, and what is known of earlier
runs: put together from options."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from windlass.build.recording import open_recorder
from windlass.checkpoint.folder import CheckpointFolder
from windlass.errors import UsageError
from windlass.forecast.interface import ExpertForecast, ExpertTable
from windlass.forecast.kept_usage import KeptUsage
from windlass.forecast.usage import UsageForecast
from windlass.ids import Part
from windlass.options import EngineOptions, checkpoint_stamp
from windlass.plan import Plan
from windlass.prefetch.expert_pool import ExpectedNextUse, floor_of
from windlass.prefetch.guard import WindowGuard
from windlass.prefetch.prefetcher import Prefetcher
from windlass.replay.recorder import RoutingRecorder
from windlass.runtime.host import Foresight
from windlass.schedule.observer import RoutingObserver
from windlass.schedule.passes import PassShape
from windlass.weights.cache import WeightCache
from windlass.weights.eviction import EvictionPolicy

_logger = logging.getLogger(__name__)


class Outfit(NamedTuple):
    """What is made before the weights are: the store needs the policy, the prefetcher the store."""

    forecast: ExpertForecast
    policy: EvictionPolicy
    usage: KeptUsage | None
    recorder: RoutingRecorder | None

    def foresight(self, plan: Plan, shape: PassShape, cache: WeightCache) -> Foresight:
        """What the runtime is given; what earlier runs used most begins to be read."""
        observers: list[RoutingObserver] = [
            one for one in (self.usage, self.recorder) if one is not None
        ]
        if not plan.overlap:
            return Foresight(self.forecast, None, tuple(observers))
        prefetcher = Prefetcher(
            shape,
            cache,
            self.forecast,
            usage=None if self.usage is None else self.usage.shares,
            guard=WindowGuard(),
        )
        prefetcher.fill()
        return Foresight(self.forecast, prefetcher, tuple(observers))


def make_outfit(
    options: EngineOptions, model: CheckpointFolder, plan: Plan, opened: ExitStack
) -> Outfit:
    """As `options` say. What has to be closed is left to `opened`."""
    table = ExpertTable.of(model.spec)
    slots = plan.host.of(Part.EXPERT).slots
    usage = None
    if isinstance(options.expert_usage, Path) and slots < len(table):
        usage = KeptUsage(options.expert_usage, checkpoint_stamp(model.folder), table)
        opened.callback(_save, usage)
    forecast = UsageForecast(table)
    policy = ExpectedNextUse(forecast.outlook, floor=floor_of(table, slots))
    return Outfit(forecast, policy, usage, open_recorder(options, model, opened))


def _save(usage: KeptUsage) -> None:
    try:
        usage.save()
    except UsageError as error:  # a run that has ended well does not fail for it
        _logger.warning("%s", error)

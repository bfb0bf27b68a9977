"""How well a forecast foretells the passes of a trace, and what it takes. No cache, no clock."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from windlass.forecast.interface import ExpertForecast
from windlass.forecast.recall import WIDTHS, RecallMeter
from windlass.replay.router import TraceRouter
from windlass.replay.routing_trace import RoutingTrace


@dataclass(frozen=True, slots=True)
class Foretold:
    """`means`: recall by width, share of whole routings and the worst layer's calibration error, by
    horizon (layers ahead, `start` of the pass, `before` it); `by_layer`: recall at top-k.
    `layer_us`: what a layer took this machine, the forecast and the measuring of it."""

    means: Mapping[str, Mapping[str, float]]
    by_layer: Mapping[str, Mapping[int, float]]
    layer_us: float

    def lines(self, name: str) -> list[str]:
        """For people."""
        return [
            f"{name} foretells, {_words(horizon)}: {100 * found['recall_1k']:.1f} % of the experts"
            f" among as many, {100 * found['recall_2k']:.1f} % among twice as many,"
            f" {100 * found['whole']:.1f} % of routings whole, probabilities off by at most"
            f" {found['worst_calibration_error']:.3f}"
            for horizon, found in self.means.items()
        ]


def measure_forecast(trace: RoutingTrace, forecast: ExpertForecast) -> Foretold:
    """Of the passes without a prompt; the forecast is told of all."""
    meter = RecallMeter(
        forecast, counts=lambda batch: not any(segment.is_prompt for segment in batch.segments)
    )
    router, layers = TraceRouter(trace), trace.table().layers
    begin = time.perf_counter()
    for rows in trace.passes:
        batch = router.enter(rows)
        meter.begin(batch, router.begin(batch))
        for layer in layers:
            meter.observe(router.route(layer, batch, batch.groups[0]))
        meter.end(router.end())
    seconds = time.perf_counter() - begin
    horizons = sorted({horizon for horizon, _ in meter.by_layer}, key=str)
    at_k = WIDTHS.index(1.0)
    return Foretold(
        {str(horizon): meter.mean(horizon) for horizon in horizons},
        {
            str(horizon): {
                layer: one.at_widths[at_k]
                for (at, layer), one in sorted(meter.by_layer.items(), key=lambda item: item[0][1])
                if at == horizon
            }
            for horizon in horizons
        },
        1e6 * seconds / (len(trace.passes) * len(layers)),
    )


def _words(horizon: str) -> str:
    match horizon:
        case "start":
            return "as a pass begins"
        case "before":
            return "a pass before"
        case _:
            return f"{horizon} layer{'s' if horizon != '1' else ''} ahead"

"""Time of the prefetcher by layer, at 48 layers of 128 experts and one token, nothing read.

    python bench/prefetcher.py [--resident SHARE ...] [--skew S ...] [--json FILE] [--quick]

The prefetcher, its forecast and the weight cache are those of a run; slots hold no bytes, and reads
arrive on a virtual clock that goes on while a layer computes. Routing is drawn from a seed: with
skew 0 every expert is as likely, with more some become likely enough for a hint. Timed is each
`enter(layer)` alone.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, table, write

from windlass import ids
from windlass.checkpoint.part_reads import Read
from windlass.forecast.interface import ExpertTable
from windlass.forecast.usage import UsageForecast
from windlass.ids import Part, WeightKey
from windlass.prefetch import prefetcher as prefetching
from windlass.prefetch.expert_pool import ExpectedNextUse
from windlass.runtime import simulated
from windlass.runtime.clock import Clock, LaneJob, Lanes, LaneWork
from windlass.schedule import passes
from windlass.schedule.batch import CHUNK_TOKENS, Segment, make_batch
from windlass.schedule.observer import RoutedTokens

_TOP_K = 8
_DEPTH = 5  # blocks in flight, as planned for four threads
_BLOCK_S = 1e-4  # a part on the disk's lane
_LAYER_S = 5e-4  # what a layer computes meanwhile
_SEED = 0
_ONE_TOKEN = make_batch(
    [
        Segment(
            sequence=0, token_ids=(0,), first_position=0, pages=(), state_slot=-1,
            is_prompt=False, long_rope=False, wants_logits=True,
        )
    ],
    micro_batch_tokens=CHUNK_TOKENS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """A model of one kind of layer, and what its job does. `resident`: share of experts that have
    slots; `skew`: standard deviation of the logarithm of how much an expert is liked."""

    layers: int
    experts: int
    resident: float
    skew: float


class _Disk:
    """What reading a part asks of the lanes."""

    def block(self, key: WeightKey, num_bytes: int) -> tuple[tuple[Any, float], ...]:
        return ((getattr(ids, "DISK_TO_HOST", "disk"), _BLOCK_S),)


class _Model:
    """Prefetcher, forecast and cache as a run has them; all that knows their constructors."""

    def __init__(self, setting: Setting) -> None:
        layers, experts = setting.layers, setting.experts
        self.forecast = UsageForecast(ExpertTable([experts] * layers, _TOP_K))
        self.lanes = Lanes(Clock(), ("disk", "host"))
        keys = {Part.EXPERT: layers * experts, Part.BLOCK: layers, Part.HEAD: 1}
        costs: Any = _Disk()
        parts = {
            "num_keys": keys,
            "slots": keys
            | {Part.EXPERT: max(4 * _TOP_K, int(setting.resident * layers * experts))},
            "reads": lambda key: (Read("", 0, 1, 0),),
        }
        more: Any = {
            "policy": ExpectedNextUse(self.forecast.outlook, floor=_TOP_K + 1),
            "depth": _DEPTH,
        }
        record: Any = getattr(simulated, "SimulatedParts", None)  # a record since then
        make: Any = simulated.SimulatedWeights
        if record is None:
            self.weights = make(self.lanes, costs, **parts, **more)
        else:
            self.weights = make(self.lanes, costs, record(**parts), **more)
        layer: Any = getattr(passes, "LayerShape", None)  # a record since then, too
        shape: Any = True if layer is None else layer(True, "experts")
        self.prefetcher = prefetching.Prefetcher(
            passes.PassShape((shape,) * layers, 1), self.weights.cache, self.forecast,
        )  # fmt: skip


class _Routing:
    """Different experts of one token, drawn with a liking that each layer has of its own."""

    def __init__(self, setting: Setting) -> None:
        self._random = np.random.default_rng(_SEED)
        self._liking = self._random.normal(
            scale=setting.skew, size=(setting.layers, setting.experts)
        )

    def draw(self, layer: int) -> list[int]:
        noise = self._random.gumbel(size=self._liking.shape[1])
        best: list[int] = np.argpartition(-(self._liking[layer] + noise), _TOP_K)[:_TOP_K].tolist()
        return sorted(best)


def _one_pass(model: _Model, routing: _Routing, setting: Setting) -> list[float]:
    """Seconds of each `enter`, the head's last."""
    seconds = []

    def enter(layer: int) -> None:
        begin = time.perf_counter()
        model.prefetcher.enter(layer)
        seconds.append(time.perf_counter() - begin)

    model.forecast.begin(_ONE_TOKEN)
    for layer in range(setting.layers):
        enter(layer)
        with model.weights.lease(WeightKey(Part.BLOCK, layer)):
            chosen = routing.draw(layer)
            counts_E = np.bincount(chosen, minlength=setting.experts)
            model.forecast.observe(RoutedTokens(layer, _ONE_TOKEN, counts_E))
        for _ in model.weights.arrivals([WeightKey(Part.EXPERT, layer, i) for i in chosen]):
            pass
        model.lanes.start(LaneWork(LaneJob("host", _LAYER_S)), "layer")()
    enter(setting.layers)
    with model.weights.lease(WeightKey(Part.HEAD, -1, 0)):
        pass
    return seconds


def bench(setting: Setting, *, warm: int, passes: int) -> dict[str, Any]:
    """`warm` passes fill slots and forecast, `passes` are timed."""
    model, routing = _Model(setting), _Routing(setting)
    for _ in range(warm):
        _one_pass(model, routing, setting)
    before = model.weights.cache.stats()
    each = [_one_pass(model, routing, setting) for _ in range(passes)]
    after = model.weights.cache.stats()
    requests = after.requests[Part.EXPERT] - before.requests.get(Part.EXPERT, 0)
    hits = after.hits.get(Part.EXPERT, 0) - before.hits.get(Part.EXPERT, 0)
    layers = sorted(1e6 * seconds for one in each for seconds in one)
    return {
        "layers": setting.layers, "experts": setting.experts, "resident": setting.resident,
        "skew": setting.skew, "passes": passes, "median_us": statistics.median(layers),
        "p95_us": layers[int(0.95 * len(layers))],
        "token_us": statistics.median(1e6 * sum(one) for one in each),
        "hit_share": hits / requests,
    }  # fmt: skip


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['layers']} x {row['experts']}, {100 * row['resident']:.0f} % resident,"
        f" skew {row['skew']:g}",
        *(f"{row[name]:.1f}" for name in ("median_us", "p95_us", "token_us")),
        f"{100 * row['hit_share']:.0f} %",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of the prefetcher by layer.")
    add = parser.add_argument
    add("--layers", type=int, default=48, metavar="N", help="default: 48")
    add("--experts", type=int, default=128, metavar="N", help="of a layer (default: 128)")
    add("--resident", type=float, nargs="+", default=[0.1, 0.33, 0.8], metavar="SHARE",
        help="of experts that have slots (default: 0.1 0.33 0.8)")  # fmt: skip
    add("--skew", type=float, nargs="+", default=[0.0, 2.0], metavar="S", help="default: 0 2")
    add("--passes", type=int, default=30, metavar="N", help="timed (default: 30)")
    add("--json", type=Path, metavar="FILE", help="also write the results here")
    add("--quick", action="store_true", help="two passes: says only that the script works")
    options = parser.parse_args()
    warm, passes = (1, 2) if options.quick else (30, options.passes)
    document: dict[str, Any] = {"bench": "prefetcher", **describe()}
    document["code"] = str(Path(prefetching.__file__).parents[2])
    rows = [
        bench(Setting(options.layers, options.experts, share, skew), warm=warm, passes=passes)
        for share in options.resident
        for skew in options.skew
    ]
    heads = ("one token", "us, median", "95 %", "us a token", "experts found in memory")
    print(table(heads, [_cells(row) for row in rows]))
    write(document | {"rows": rows}, options.json)


if __name__ == "__main__":
    main()

"""What the forecasts of experts cost, at the shape of a real layer: one JSON line.

    python bench/forecast_cost.py --hidden 2048 --experts 128 --top-k 8 --layers 8 --tokens 1

Microseconds of processor time for one layer: what `observe` takes of the layer's own time, and what
waits for `work`: what is said ahead (by piece), and what is learnt.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from windlass.forecast.interface import ExpertForecast, ExpertTable
from windlass.forecast.learned import LearnedForecast, forecast_bytes
from windlass.forecast.sequence_usage import SequenceUsage
from windlass.models.spec import Ffn, Moe, RmsNorm, SoftmaxTopK
from windlass.schedule.batch import Batch, Segment, make_batch
from windlass.schedule.observer import RoutedTokens, RouterWeights

_PASSES = 12


def _pass(at: int, tokens: int) -> Batch:
    segments = [
        Segment(
            sequence=i, token_ids=(0,), first_position=at, pages=(), state_slot=-1,
            is_prompt=False, long_rope=False, wants_logits=True,
        )
        for i in range(tokens)
    ]  # fmt: skip
    return make_batch(segments, micro_batch_tokens=1 << 20)


class _Timer:
    """Processor time of calls by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, call: Callable[[], object]) -> object:
        begin = time.thread_time()
        result = call()
        self.seconds.setdefault(name, []).append(time.thread_time() - begin)
        return result


def _measure(forecast: ExpertForecast, shape: argparse.Namespace) -> dict[str, float]:
    chance, timer = np.random.default_rng(0), _Timer()
    tokens, experts = shape.tokens, shape.experts
    for at in range(_PASSES):
        batch = _pass(at, tokens)
        x_TD = chance.normal(0, 1, (tokens, shape.hidden)).astype(np.float32)
        timer.time("begin", lambda b=batch, x=x_TD: forecast.begin(b, x))  # type: ignore[misc]
        for layer in range(shape.layers):
            scores = chance.random((tokens, experts)).astype(np.float32)
            ids = np.argsort(-scores, 1)[:, : shape.top_k]
            counts = np.bincount(ids.ravel(), minlength=experts)
            told = RoutedTokens(layer, batch, counts, ids, scores, None, x_TD)
            timer.time("observe", lambda told=told: forecast.observe(told))  # type: ignore[misc]
            pieces = 0
            while timer.time("say" if _is_saying(forecast) else "learn", forecast.work):
                pieces += 1
        timer.time("end", lambda x=x_TD: forecast.end(x))  # type: ignore[misc]
    found = {f"{name}_us": 1e6 * float(np.median(all_s)) for name, all_s in timer.seconds.items()}
    # of later passes: all that follows from a layer
    for name in ("say", "learn"):
        layers = (_PASSES - 2) * shape.layers
        count = len(timer.seconds.get(name, [])) * layers / (_PASSES * shape.layers)
        found[f"{name}_of_a_layer"] = count / layers
    return {name: round(value, 2) for name, value in found.items()}


def _is_saying(forecast: ExpertForecast) -> bool:
    if not isinstance(forecast, LearnedForecast):
        return False
    return bool(forecast._ahead or forecast._next or forecast._start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, value in (
        ("hidden", 2048),
        ("experts", 128),
        ("top-k", 8),
        ("layers", 8),
        ("tokens", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    shape = parser.parse_args()
    table = ExpertTable([shape.experts] * shape.layers, shape.top_k)
    learned = LearnedForecast(table, shape.hidden)
    moe = Moe(
        num_experts=shape.experts,
        top_k=shape.top_k,
        routing=SoftmaxTopK(renorm_floor=0.0),
        expert=Ffn(intermediate=1),
    )
    chance = np.random.default_rng(1)
    for layer in range(shape.layers):
        weight = chance.normal(0, 0.02, (shape.hidden, shape.experts)).astype(np.float32)
        bias = np.zeros(shape.experts, np.float32)
        learned.set_router(RouterWeights(layer, moe, RmsNorm(eps=1e-6), weight, bias, None))
    print(
        json.dumps(
            {
                "shape": vars(shape),
                "learned": _measure(learned, shape),
                "usage": _measure(SequenceUsage(table), shape),
                "bytes": forecast_bytes(table, shape.hidden),
            }
        )
    )


if __name__ == "__main__":
    main()

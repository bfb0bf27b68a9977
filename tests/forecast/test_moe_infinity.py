"""MoE-Infinity: its formulas against plain forms of them."""

import numpy as np
import pytest

from remembered import Topics, chunks, cosine, play
from windlass.forecast.interface import ExpertTable
from windlass.forecast.moe_infinity import MoeInfinityForecast
from windlass.ids import Part, WeightKey
from windlass.prefetch.paper_pools import MoeInfinityPool

LAYERS, EXPERTS, TOP_K = 6, 8, 2
TABLE = ExpertTable([EXPERTS] * LAYERS, TOP_K)


def expert(layer, index):
    return WeightKey(Part.EXPERT, layer, index)


def counts_of(routing):
    counts = np.zeros((LAYERS, EXPERTS))
    for layer in range(LAYERS):
        counts[layer, np.argsort(-routing.shares_TLE[0, layer], kind="stable")[:TOP_K]] += 1
    return counts


def test_moe_infinity_is_its_formula():
    topics = Topics(LAYERS, EXPERTS, topics=4, noise=1.0)
    forecast = MoeInfinityForecast(TABLE, capacity=10, matches=2)
    requests: list[np.ndarray] = []
    for number in range(6):
        total = np.zeros((LAYERS, EXPERTS))
        for _ in range(5):
            routing = topics.routing([number % 4])
            told = play(forecast, TABLE, routing, chunks([1], first=number))
            own = counts_of(routing)
            total += own
            for l_now, (places, values) in enumerate(told):
                expected = {}
                if requests and l_now:
                    scores = [cosine(own[:l_now], r[:l_now]) for r in requests]
                    best = np.argsort(scores)[::-1][:2]
                    gap = scores[best[-1]] - max(
                        (s for i, s in enumerate(scores) if i not in best), default=-1
                    )
                    if gap < 1e-6:
                        continue  # either may be matched
                    matched = np.sum([requests[i] for i in best], axis=0)
                    for i in range(l_now, LAYERS):
                        for j in range(EXPERTS):
                            share = matched[i, j] / matched[i].sum()
                            if share:
                                expected[i * EXPERTS + j] = share * (1 - (i - (l_now - 1)) / LAYERS)
                expected = {k: v for k, v in expected.items() if v > 0}
                assert dict(zip(places, values, strict=True)) == pytest.approx(expected, rel=1e-3)
        requests.append(total)
    assert forecast.num_kept == 5, "a request is kept when another one runs without it"


def test_moe_infinity_keeps_requests_apart_and_replaces_the_most_similar():
    topics = Topics(LAYERS, EXPERTS, topics=3, noise=0.01)
    forecast = MoeInfinityForecast(TABLE, capacity=2)
    for number, topic in enumerate([0, 1, 1, 2]):
        for _ in range(3):
            play(forecast, TABLE, topics.routing([topic, 0]), chunks([1, 1], first=10 * number))
    assert forecast.num_kept == 2 and len(forecast._requests) == 2
    assert all(own.sum() == 3 * TOP_K for one in forecast._requests.values() for own in one)


def test_moe_infinity_keeps_early_layers():
    forecast = MoeInfinityForecast(TABLE)
    shares = np.random.default_rng(0).dirichlet([1] * EXPERTS, LAYERS)
    forecast.outlook.next[:] = forecast.outlook.now[:] = shares.ravel()
    pool = MoeInfinityPool(forecast.outlook)
    for key in TABLE.keys:
        pool.add(key)
    keep = (
        (shares + 1e-6) / shares.sum(1, keepdims=True) * (1 - np.arange(LAYERS) / LAYERS)[:, None]
    )
    for place in np.argsort(keep.ravel()):
        assert pool.victim(expert(0, 0), None) == TABLE.keys[place]
        pool.discard(TABLE.keys[place])
    even = MoeInfinityPool(MoeInfinityForecast(TABLE).outlook)
    for key in TABLE.keys:
        even.add(key)
    last = even.victim(expert(0, 0), None)
    assert last is not None and last.layer == LAYERS - 1

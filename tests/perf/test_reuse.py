"""Misses by how sequences take turns, against what simulations of real routing gave."""

from dataclasses import replace

import pytest

from planning import SPECS
from windlass.models.spec import Moe
from windlass.perf.reuse import missed_in_burst, missed_together

THIRD = 1 / 3


def _moe(num_experts: int, top_k: int = 4) -> Moe:
    moe = SPECS["olmoe-1b-7b"].blocks[0].ffn
    assert isinstance(moe, Moe)
    return replace(moe, num_experts=num_experts, top_k=top_k)


DEMO, LARGER = _moe(24), _moe(64)


@pytest.mark.parametrize(
    ("moe", "held", "hits"),
    [(DEMO, 0.2, 0.417), (DEMO, THIRD, 0.596), (DEMO, 0.5, 0.768),
     (LARGER, 0.2, 0.603), (LARGER, THIRD, 0.765), (LARGER, 0.5, 0.885)],
)  # fmt: skip
def test_hits_of_one_sequence(moe, held, hits):
    assert 1 - missed_together(moe, held, 1) / moe.top_k == pytest.approx(hits, abs=0.075)


@pytest.mark.parametrize(
    ("moe", "beside_one"),
    [(DEMO, {2: 1.13, 4: 1.15, 8: 1.01}), (LARGER, {2: 1.35, 4: 1.61, 8: 1.77})],
)
def test_misses_of_a_token_in_lockstep_beside_those_of_one_sequence(moe, beside_one):
    one = missed_together(moe, THIRD, 1)
    for rows, simulated in beside_one.items():
        found = missed_together(moe, THIRD, rows) / rows / one
        assert found == pytest.approx(simulated, rel=0.1)


@pytest.mark.parametrize(
    ("moe", "slower"),
    [(DEMO, {16: 1 / 0.95, 32: 1 / 0.98}), (LARGER, {16: 1 / 0.76, 32: 1 / 0.86})],
)
def test_misses_in_bursts_beside_those_of_one_sequence(moe, slower):
    """Simulated where the link takes nearly all of the time."""
    one = missed_together(moe, THIRD, 1)
    for tokens, simulated in slower.items():
        assert missed_in_burst(moe, THIRD, tokens) / one == pytest.approx(simulated, rel=0.06)


def test_the_union_brings_lockstep_ahead_again():
    """Many sequences use every expert anyway: each is read once for all of them."""
    one = missed_together(LARGER, THIRD, 1)
    ahead = [n for n in range(1, 200) if missed_together(LARGER, THIRD, n) / n <= one]
    assert ahead == [1, *range(46, 200)]


@pytest.mark.parametrize("top_k", [1, 2, 8, 16])
def test_more_memory_misses_less_and_longer_bursts_do(top_k):
    moe = _moe(16, top_k)
    shares = [i / 20 for i in range(21)]
    for rows in (1, 3, 100):
        missed = [missed_together(moe, held, rows) for held in shares]
        assert missed == sorted(missed, reverse=True) and missed[-1] == 0 < missed[-2]
        assert missed[0] <= 16
    for held in shares:
        missed = [missed_in_burst(moe, held, tokens) for tokens in (1, 4, 16, 32, 1000)]
        assert missed == sorted(missed, reverse=True)
        assert missed[-1] >= missed_together(moe, held, 1)

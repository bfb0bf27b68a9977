"""One gate: the step that it learns by, and what it begins with."""

import numpy as np
import pytest

from windlass.forecast.gate import (
    BY_WORTH,
    FIXED,
    Source,
    gate_bytes,
    make_gate,
    normalised,
    targets,
)
from windlass.forecast.interface import ExpertTable
from windlass.forecast.learned import STEP
from windlass.models.spec import Ffn, LayerNorm, Moe, RmsNorm, Routing, SigmoidTopK, SoftmaxTopK
from windlass.schedule.observer import RouterWeights

HIDDEN, EXPERTS, TOP_K = 24, 16, 3
CHANCE = np.random.default_rng(0)


def router(routing: Routing | None = None, experts: int = EXPERTS) -> RouterWeights:
    routing = routing or SoftmaxTopK(renorm_floor=0.0)
    moe = Moe(num_experts=experts, top_k=TOP_K, routing=routing, expert=Ffn(intermediate=1))
    weight = CHANCE.normal(0, 0.3, (HIDDEN, experts)).astype(np.float32)
    bias = CHANCE.normal(0, 0.3, experts).astype(np.float32)
    return RouterWeights(1, moe, RmsNorm(eps=1e-6), weight, bias, None)


def states(count: int) -> np.ndarray:
    return normalised(RmsNorm(eps=1e-6), CHANCE.normal(0, 3, (count, HIDDEN)).astype(np.float32))


@pytest.mark.parametrize("routing", [SoftmaxTopK(renorm_floor=0.0), SigmoidTopK(renorm_eps=None)])
def test_one_token_is_one_step_of_normalised_least_squares(routing):
    weights = router(routing)
    gate = make_gate(weights, Source.ONE_BEFORE, is_first=False, step=0.3)
    x = states(1)
    said = gate.foretell(x)
    np.testing.assert_allclose(said.logits_TE, x @ weights.weight_DE + weights.bias_E, rtol=1e-5)
    true = CHANCE.normal(0, 1, (1, EXPERTS)).astype(np.float32)
    gate.learn(x, said, true, true > 1)
    error = true - said.logits_TE
    if isinstance(routing, SoftmaxTopK):  # logits are known up to a number
        error -= error.mean()
    turned = weights.weight_DE + 0.3 * x.T @ error / (x @ x.T)
    expected = x @ turned + weights.bias_E + 0.05 * 0.3 * error
    np.testing.assert_allclose(gate.foretell(x).logits_TE, expected, rtol=1e-4, atol=1e-5)


def test_many_tokens_alike_do_not_overshoot():
    gate = make_gate(router(), Source.ONE_BEFORE, is_first=False, step=0.4)
    x = (states(1) + 0.01 * states(16)).astype(np.float32)
    true = np.tile(CHANCE.normal(0, 1, EXPERTS).astype(np.float32), (16, 1))
    true -= true.mean(-1, keepdims=True)
    misses = []
    for _ in range(8):
        said = gate.foretell(x)
        error = true - said.logits_TE
        misses.append(np.abs(error - error.mean(-1, keepdims=True)).mean())
        gate.learn(x, None, true, true > 1)
    assert misses[0] > 0.5 and misses[1] < 0.1 and max(misses[2:]) < 0.02


def test_a_stale_forecast_is_made_again_before_it_is_learnt_from():
    one, other = (make_gate(weights, Source.ONE_BEFORE, is_first=False, step=0.3)
                  for weights in [router()] * 2)  # fmt: skip
    x, true = states(1), CHANCE.normal(0, 1, (1, EXPERTS)).astype(np.float32)
    stale = one.foretell(x)
    for gate, said in ((one, stale), (other, None)):
        gate.learn(x, stale if gate is one else None, true, true > 1)
        gate.learn(x, said, true, true > 1)
    np.testing.assert_allclose(
        one.foretell(x).logits_TE, other.foretell(x).logits_TE, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("experts", [8, 128, 512])
def test_it_learns_what_a_linear_map_can_say(experts):
    true_map = CHANCE.normal(0, 0.3, (HIDDEN, experts)).astype(np.float32)
    gate = make_gate(router(experts=experts), Source.TWO_BEFORE, is_first=False, step=STEP)
    found = []
    for _ in range(600):
        x = states(1)
        true = x @ true_map
        said = gate.foretell(x)
        best = set(np.argsort(-true[0])[:TOP_K])
        found.append(len(best & set(np.argsort(-said.logits_TE[0])[:TOP_K])) / TOP_K)
        gate.learn(x, said, true, np.isin(np.arange(experts), list(best))[None])
    assert np.mean(found[-100:]) > 0.9 > 0.7 > np.mean(found[:5])


def test_a_fixed_gate_shares_the_routers_matrix_and_never_turns():
    weights = router()
    gates = [make_gate(weights, source, is_first=False, step=0.0) for source in FIXED]
    x, true = states(4), CHANCE.normal(0, 1, (4, EXPERTS)).astype(np.float32)
    before = gates[0].foretell(x).logits_TE
    for gate in gates:
        assert gate._weight_DE is weights.weight_DE
        gate.learn(x, gate.foretell(x), true, true > 1)
    np.testing.assert_array_equal(gates[0].foretell(x).logits_TE, before)


def test_a_gate_at_the_tokens_start_begins_with_the_first_layers_router_on_the_embedding():
    weights = router()
    first, later = (make_gate(weights, Source.START, is_first=f, step=0.3) for f in (True, False))
    x = states(2)
    both = np.concatenate((x, states(2)), 1)
    expected = x @ weights.weight_DE + weights.bias_E
    np.testing.assert_allclose(first.foretell(both).logits_TE, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(later.foretell(both).logits_TE, np.tile(weights.bias_E, (2, 1)))


def test_states_are_normalised_as_norms_without_weights_do():
    x = CHANCE.normal(2, 3, (3, HIDDEN)).astype(np.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(normalised(RmsNorm(eps=0.5), x), expected, rtol=1e-5)
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt(x.var(-1, keepdims=True) + 0.5)
    norm = LayerNorm(eps=0.5, bias=True)
    np.testing.assert_allclose(normalised(norm, x), expected, rtol=1e-4, atol=1e-5)


def test_bytes_of_gates_are_those_of_their_matrices():
    table = ExpertTable([0, EXPERTS, EXPERTS, 0, EXPERTS], TOP_K)
    assert targets(table, Source.TWO_BEFORE) == (4,)
    held = 0
    for source in BY_WORTH:
        for layer in targets(table, source):
            gate = make_gate(router(), source, is_first=layer == 1, step=STEP)
            held += gate._weight_DE.nbytes + gate._bias_E.nbytes
    assert held == gate_bytes(table, HIDDEN, BY_WORTH)

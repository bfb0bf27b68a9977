"""Routers as forecasts read them: with the norm before them, they say of a layer's own states what
the router itself says, in every family."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from engines import FAMILIES, engine_for, make_model, prompts, request, run_all
from windlass.build import open as build
from windlass.forecast.gate import Source
from windlass.forecast.interface import ExpertTable
from windlass.forecast.learned import LearnedForecast
from windlass.forecast.recall import RouterControl
from windlass.forecast.selection import is_relative, logits_of, margins
from windlass.models.registry import read_spec
from windlass.runtime.host import HostRuntime
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens, RouterWeights


class OwnStates:
    """Implements `RouterReader` and `RoutingObserver`: what each router says of its own states, by
    its weights."""

    wants_scores = True
    wants_states = True

    def __init__(self) -> None:
        self.control = RouterControl()
        self.routers: dict[int, RouterWeights] = {}
        self.num_tokens = 0

    def set_router(self, router: RouterWeights) -> None:
        self.control.set_router(router)
        self.routers[router.layer] = router

    def begin(self, batch: Batch, embedded_TD: Any) -> None:
        pass

    def observe(self, tokens: RoutedTokens) -> None:
        router = self.routers[tokens.layer]
        moe, ids_TA = router.moe, np.asarray(tokens.ids_TA)
        found_TE = self.control.logits(tokens)
        true_TE = logits_of(moe.routing, np.asarray(tokens.scores_TE))
        if is_relative(moe.routing):
            found_TE, true_TE = (z - z.mean(-1, keepdims=True) for z in (found_TE, true_TE))
        np.testing.assert_allclose(found_TE, true_TE, rtol=2e-3, atol=2e-3)
        chosen_TE = margins(moe, found_TE, router.select_bias_E) > 0
        assert (chosen_TE.sum(-1) == moe.top_k).all()
        assert np.take_along_axis(chosen_TE, ids_TA, 1).all(), "the control is not 100 %"
        self.num_tokens += len(ids_TA)

    def end(self, final_TD: Any) -> None:
        pass


@contextmanager
def foreseen_by(*readers: OwnStates | LearnedForecast) -> Iterator[None]:
    """Engines that are opened meanwhile tell `readers` of routers and of routing."""

    def runtime(spec: Any, machine: Any, weights: Any, kv: Any, foresight: Any) -> HostRuntime:
        told = replace(foresight, observers=readers, router_readers=readers)
        return HostRuntime(spec, machine, weights, kv, told)

    with mock.patch.object(build, "HostRuntime", runtime):
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_routers_say_of_own_states_what_routers_say(family, tmp_path):
    make_model(family, tmp_path)
    own = OwnStates()
    with foreseen_by(own), engine_for(tmp_path, moe_backend="torch") as engine:
        run_all(engine, [request("0", prompts([40])[0], max_tokens=3)])
    assert own.num_tokens == 42 * len(own.routers) and own.routers


def test_a_forecast_learns_from_an_engine_at_no_bits_expense(tmp_path):
    make_model("qwen3_moe", tmp_path)
    spec, _ = read_spec(json.loads((tmp_path / "config.json").read_text()))
    forecast = LearnedForecast(ExpertTable.of(spec), spec.hidden_size)
    requests = [request(f"{i}", prompts([20 + i])[0], max_tokens=12) for i in range(2)]
    found = []
    for readers in ((), (forecast,)):
        with foreseen_by(*readers), engine_for(tmp_path, moe_backend="torch") as engine:
            results = run_all(engine, requests)
        found.append([results[one.request_id].outputs[0].token_ids for one in requests])
    assert found[0] == found[1]
    while forecast.work():
        pass
    turned = {source for (source, _), gate in forecast._gates.items() if gate._version}
    assert turned == {Source.ONE_BEFORE, Source.START, Source.TOKEN_BEFORE}, "of two layers"

"""Groups of rows in a pass: the same bits, whenever their attention is computed; the same routing
told; what they read."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from deferred import deferred
from engines import BY_KIND, engine_for, make_model, prompts, request, run_all
from fakes import FakeDevice
from recorder import RoutingRecorder, observed_by
from windlass.schedule.observer import RoutedTokens
from windlass.speculative import SpeculativeConfig

LENGTHS = (90, 3, 33, 150)


def _bits(results):
    """Everything that must be equal, floats included."""
    return {
        name: (one.token_ids, one.cumulative_logprob, one.logprobs, one.finish_reason)
        for name, output in results.items()
        for one in output.outputs
    }


def _run(path, requests, **options):
    options = {"max_num_batched_tokens": 208, "micro_batch_size": 64, **options}
    with engine_for(path, **options) as engine:
        return _bits(run_all(engine, requests)), engine.stats(), engine.plan


def _requests():
    """Prompts in chunks, and answers beside them."""
    return [
        request(f"r{i}", prompt, max_tokens=3 + 2 * i, logprobs=2)
        for i, prompt in enumerate(prompts(LENGTHS))
    ]


@pytest.mark.parametrize("family", BY_KIND)
def test_bits_do_not_depend_on_groups_nor_on_when_attention_is_computed(family, tmp_path):
    make_model(family, tmp_path, dtype=torch.bfloat16)
    expected, _, plan = _run(tmp_path, _requests())
    assert plan.groups == 1
    for groups, slots in ((2, "64"), (3, "2")):
        device = FakeDevice(seed=groups) if slots == "2" else None
        options = dict(batch_groups=groups, moe_expert_cache_size=slots, device=device)
        with deferred(seed=groups) as made:
            found, stats, plan = _run(tmp_path, _requests(), **options)
        assert plan.groups == groups and made[0].most_begun > 1
        assert found == expected, options
        assert (stats.expert_hits < stats.expert_requests) or slots == "64"


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next"])
def test_many_that_decode_do_so_in_groups(family, tmp_path):
    make_model(family, tmp_path, dtype=torch.bfloat16)
    many = [
        request(f"r{i}", prompt, max_tokens=3, logprobs=1)
        for i, prompt in enumerate(prompts([3 + i % 5 for i in range(100)]))
    ]
    options = dict(max_num_seqs=100, max_num_batched_tokens=320, moe_expert_cache_size="2")
    expected, one, _ = _run(tmp_path, many, **options)
    for groups in (2, 3):
        with deferred(seed=groups):
            found, stats, _ = _run(tmp_path, many, batch_groups=groups, **options)
        assert found == expected
        assert stats.passes == one.passes and stats.expert_requests > 1.5 * one.expert_requests


def test_of_a_pass_in_groups_every_token_is_told_of_once_per_layer(tmp_path):
    """And with the same bits, whoever wants scores and states."""
    make_model("deepseek_v3", tmp_path, dtype=torch.bfloat16)
    told: dict[int, Any] = {}
    for groups in (1, 3):
        recorder, states = RoutingRecorder(), _States()
        with observed_by(recorder, states):
            _run(tmp_path, _requests(), batch_groups=groups, moe_expert_cache_size="2")
        told[groups] = recorder, states.rows
    (alone, states), (apart, states_apart) = told[1], told[3]
    assert apart.layers == alone.layers and apart.passes == alone.passes
    assert apart.seen.keys() == alone.seen.keys()
    for token, seen in apart.seen.items():
        assert all(map(torch.equal, seen, alone.seen[token])), token
    assert len(states) == len(states_apart) > 10
    assert all(map(torch.equal, states, states_apart))


class _States(RoutingRecorder):
    """Keeps the residual stream before each router, and counts."""

    def __init__(self) -> None:
        super().__init__(wants_states=True)
        self.rows: list[torch.Tensor] = []

    def observe(self, tokens: RoutedTokens) -> None:
        self.rows += [
            torch.as_tensor(rows).clone() for rows in (tokens.residual_TD, tokens.counts_E)
        ]


def test_prompts_in_groups_share_prefixes_drafts_and_scores(tmp_path):
    """What one group fills in a pass another reads in it; guesses and scored rows of all."""
    make_model("gpt_oss", tmp_path, dtype=torch.bfloat16)
    common = prompts((140,))[0]
    requests = [
        request(f"r{i}", [*common, 5 + i, 6, 7, 6, 7], max_tokens=6, logprobs=1) for i in range(3)
    ]
    scored = replace(requests[0], params=replace(requests[0].params, prompt_logprobs=0))
    requests.append(replace(scored, request_id="scored"))
    guess = SpeculativeConfig(method="ngram", num_speculative_tokens=2)
    options: dict[str, Any] = dict(max_num_batched_tokens=512, speculative_config=guess)
    found = {}
    for groups in (1, 2, 3):
        with (
            deferred(seed=groups),
            engine_for(tmp_path, micro_batch_size=64, batch_groups=groups, **options) as engine,
        ):
            results = run_all(engine, requests)
            found[groups] = _bits(results), results["scored"].prompt_logprobs
            stats = engine.stats()
        assert stats.prefix_cache_hits > 0
    assert found[1] == found[2] == found[3]

"""Answers with guesses are those without, bit for bit: whatever is asked for, however memory is
divided, whether the guesses are right or wrong."""

import json

import pytest
import torch

from backends import LIBRARY
from drafters import Eager, Oracle, answers, bits, varied_requests
from engines import engine_for, make_model, prompts, request, run_all
from windlass.cli import main
from windlass.engine.drafting import Drafting
from windlass.errors import UsageError
from windlass.llm import LLM
from windlass.speculative import SpeculativeConfig

CONFIG = SpeculativeConfig(method="ngram")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("qwen3_moe", path, dtype=torch.bfloat16)
    return path


def _oracle(results, requests, wrong):
    """Guesses of what has been answered, with mistakes."""
    known = {one.prompt_token_ids: results[one.request_id].outputs[0].token_ids for one in requests}
    seeds = iter(range(1000))
    return lambda config: Eager(
        config.num_speculative_tokens, lambda: Oracle(known, wrong=wrong, seed=next(seeds))
    )


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({}, 0.0),
        ({}, 0.3),
        ({}, 1.0),
        ({"kv_cache_dtype": "int8"}, 0.3),
        ({"moe_backend": "torch", "moe_expert_cache_size": "2"}, 0.3),
        ({"schedule": "model-based", "micro_batch_size": 64, "enable_prefix_caching": False}, 0.3),
    ],
    ids=["right", "mixed", "wrong", "int8", "torch", "model-based"],
)
def test_answers_are_those_without(folder, options, wrong, monkeypatch):
    requests = varied_requests()
    plain, without = answers(folder, requests, **options)
    monkeypatch.setattr(Drafting, "of", _oracle(plain, requests, wrong))
    found, stats = answers(folder, requests, speculative_config=CONFIG, **options)
    assert bits(found) == bits(plain)
    assert stats.drafts is not None and stats.drafts.proposed > 50
    assert stats.generated_tokens == without.generated_tokens
    assert (stats.drafts.accepted < 5) == (wrong == 1.0)
    assert wrong == 1.0 or stats.passes < without.passes


@pytest.mark.parametrize("wrong", [0.0, 0.4])
def test_so_are_those_of_sequences_that_give_way(folder, wrong, monkeypatch):
    """Three answers of three pages each on five pages: one sequence is computed again with several
    generated rows in a pass, and guesses behind them."""
    requests = [
        request(f"{i}", text, max_tokens=70, logprobs=1, temperature=0.9)
        for i, text in enumerate(prompts([20, 20, 20]))
    ]
    plain, without = answers(folder, requests, left_pages=5)
    monkeypatch.setattr(Drafting, "of", _oracle(plain, requests, wrong))
    found, stats = answers(folder, requests, left_pages=5, speculative_config=CONFIG)
    assert bits(found) == bits(plain)
    assert stats.num_preemptions and without.num_preemptions
    assert stats.drafts is not None and stats.drafts.accepted > 20


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "gemma4_text", "minimax_m2"])
def test_so_are_those_of_other_families(family, tmp_path, monkeypatch):
    make_model(family, tmp_path)
    requests = [
        request(f"{i}", text, max_tokens=24, logprobs=2, temperature=0.8, seed=i)
        for i, text in enumerate(prompts([9, 70]))
    ]
    plain, _ = answers(tmp_path, requests)
    monkeypatch.setattr(Drafting, "of", _oracle(plain, requests, 0.3))
    found, stats = answers(tmp_path, requests, speculative_config=CONFIG)
    assert bits(found) == bits(plain)
    assert stats.drafts is not None and 0 < stats.drafts.accepted < stats.drafts.proposed


def test_tokens_of_a_pass_come_as_one_delta(folder, monkeypatch):
    one = request("a", prompts([6])[0], max_tokens=11, n=2)
    plain, _ = answers(folder, [one])
    monkeypatch.setattr(Drafting, "of", _oracle(plain, [one], 0.0))
    with engine_for(folder, speculative_config=CONFIG) as engine:
        engine.add(one)
        steps = [engine.step().deltas]
        while engine.has_work:
            steps.append(engine.step().deltas)
        stats = engine.stats()
    assert [len(delta.token_ids) for step in steps for delta in step] == [1, 1, 5, 5, 5, 5]
    for index, output in enumerate(plain["a"].outputs):
        mine = [delta for step in steps for delta in step if delta.index == index]
        assert "".join(delta.text for delta in mine) == output.text
        assert tuple(t for delta in mine for t in delta.token_ids) == output.token_ids
    assert stats.total.output_tokens == stats.generated_tokens == 22
    assert stats.drafts is not None and stats.drafts.accepted == 16


@pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"the native library {LIBRARY}")
def test_passes_with_guesses_are_captured(folder, monkeypatch):
    one = request("a", prompts([6])[0], max_tokens=40, logprobs=2)
    plain, _ = answers(folder, [one])
    monkeypatch.setattr(Drafting, "of", _oracle(plain, [one], 0.1))
    with engine_for(folder, speculative_config=CONFIG) as engine:
        found = run_all(engine, [one])
        capture = engine._parts.runtime._capture  # type: ignore[attr-defined]
        assert capture._passes[5].capture.num_replayed > 0
    assert bits(found) == bits(plain)


def test_a_guess_that_was_wrong_is_never_found_by_a_prompt(folder, monkeypatch):
    """A prompt that goes on as an answer did, of which every position has had a wrong guess."""
    text = prompts([60])[0]
    first = request("a", text, max_tokens=70)
    plain, _ = answers(folder, [first])
    answer = plain["a"].outputs[0].token_ids
    second = request("b", [*text, *answer[:66]], logprobs=1)
    (wanted, _), wrong = answers(folder, [second]), _oracle(plain, [first], 1.0)
    monkeypatch.setattr(Drafting, "of", wrong)
    with engine_for(folder, speculative_config=CONFIG) as engine:
        run_all(engine, [first])
        found = run_all(engine, [second])
        assert engine.stats().prefix_cache_hits == 64
    assert bits(found) == bits(wanted)


def test_a_pass_that_fails_takes_nothing_of_a_guess(folder, monkeypatch):
    one = request("a", prompts([6])[0], max_tokens=30, logprobs=1)
    plain, _ = answers(folder, [one])
    monkeypatch.setattr(Drafting, "of", _oracle(plain, [one], 0.3))
    with engine_for(folder, speculative_config=CONFIG) as engine:
        engine.add(one)
        engine.step()
        engine.step()
        finish = engine._parts.runtime.finish
        monkeypatch.setattr(engine._parts.runtime, "finish", lambda final: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
        monkeypatch.setattr(engine._parts.runtime, "finish", finish)
        assert bits(run_all(engine, [])) == bits(plain)


def test_what_was_seen_before_is_guessed_while_it_pays(folder):
    """Prompt lookup as users get it: when it guesses depends on the clock, the answer does not."""
    text = prompts([8])[0] * 6
    asked = [request(f"{i}", text[i:], max_tokens=60, logprobs=1, n=2) for i in range(2)]
    plain, _ = answers(folder, asked)
    found, stats = answers(folder, asked, speculative_config=CONFIG)
    assert bits(found) == bits(plain)
    assert stats.drafts is not None
    assert stats.drafts.passes + stats.drafts.passes_without > 0 and stats.drafts.note


def test_what_became_of_guesses_is_said(folder, capsys):
    arguments = ["generate", "-m", str(folder), "--host-memory", "4GiB", "-n", "40", "--temp", "0",
                 "--max-model-len", "64", "--json", "w5 w6 w7 " * 4]  # fmt: skip
    lines = []
    for more in ([], ["--speculative-config", '{"method": "ngram"}']):
        assert main([*arguments, *more]) == 0
        said = capsys.readouterr()
        lines.append(json.loads(said.out.splitlines()[-1]))
    plain, guessed = lines
    assert guessed["token_ids"] == plain["token_ids"] and "drafts" not in plain
    assert "drafts: ngram, up to 4 tokens where the last 1 to 3 were seen" in said.err
    assert f"drafts: {guessed['drafts']['accepted']} of " in said.err
    with LLM(str(folder), host_memory="4GiB", speculative_config={"method": "ngram"}) as llm:
        assert llm.get_metrics().drafts is not None


def test_models_with_a_state_are_refused(tmp_path):
    make_model("lfm2_moe", tmp_path)
    with pytest.raises(UsageError, match=r"^speculative_config: got a model with recurrent layers"):
        engine_for(tmp_path, speculative_config=CONFIG)

"""Scores and answers for lm-eval's tasks, without the harness."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engines import make_model
from windlass import LLM
from windlass.errors import RequestError, UsageError
from windlass.evals.__main__ import main
from windlass.evals.answering import cut, sampling_params
from windlass.evals.jobs import Jobs
from windlass.evals.scoring import Pair, Score, scores

LONGEST = 256


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Jobs, Any]]:
    """A tiny random model here and in transformers."""
    before, path = torch.get_num_threads(), tmp_path_factory.mktemp("model")
    model = make_model("mixtral", path)
    with LLM(str(path), host_memory="4GiB", max_model_len=LONGEST, threads=1) as llm:
        yield llm, Jobs(llm), model
    torch.set_num_threads(before)


def expected(model: Any, pair: Pair) -> Score:
    """By transformers."""
    tokens = [*pair.context, *pair.continuation]
    with torch.inference_mode():
        logits = model(torch.tensor([tokens[:-1]])).logits[0, len(pair.context) - 1 :]
    own = torch.tensor(tokens[len(pair.context) :])
    logprobs = logits.double().log_softmax(-1).gather(1, own[:, None])
    return Score(float(logprobs.sum()), bool((logits.argmax(-1) == own).all()))


def scored(jobs: Jobs, pairs: list[Pair]) -> list[Score]:
    found: dict[int, Score] = {}

    def note(place: int, score: Score) -> None:
        assert place not in found
        found[place] = score

    scores(jobs, pairs, note)
    return [found[place] for place in range(len(pairs))]


def test_scores_are_those_of_transformers_and_a_context_is_computed_once(
    made: tuple[LLM, Jobs, Any],
) -> None:
    llm, jobs, model = made
    context = [7 * i % 90 + 1 for i in range(150)]
    with torch.inference_mode():
        likeliest = int(model(torch.tensor([context])).logits[0, -1].argmax())
    pairs = [
        Pair(context, [5, 6]),
        Pair([3], [4, 5, 6]),
        Pair(context, [likeliest]),
        Pair(context, [9, 8, 7, 6, 5]),
        Pair(context, [5, 6]),  # computed once
        Pair([*context, 5], [6]),  # the same text, cut elsewhere
    ]
    before = llm.get_metrics()
    found = scored(jobs, pairs)
    after = llm.get_metrics()
    for ours, theirs in zip(found, (expected(model, pair) for pair in pairs), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4, rel=0)
        assert ours.is_greedy == theirs.is_greedy
    assert found[2].is_greedy and found[4] == found[0] and not found[1].is_greedy
    assert after.prefix_cache_hits - before.prefix_cache_hits == 2 * 128
    assert after.prompt_tokens - before.prompt_tokens == 4 + 152 + (151 - 128) + (155 - 128)


def test_what_is_too_long_loses_its_beginning(made: tuple[LLM, Jobs, Any]) -> None:
    _, jobs, model = made
    tokens = [3 * i % 80 + 1 for i in range(LONGEST + 40)]
    kept = tokens[-(LONGEST - 1) :]
    one, other = scored(jobs, [Pair(tokens[:-4], tokens[-4:]), Pair(tokens[:2], tokens[2:])])
    assert one.logprob == pytest.approx(
        expected(model, Pair(kept[:-4], kept[-4:])).logprob, abs=1e-4, rel=0
    )
    assert other.logprob == pytest.approx(
        expected(model, Pair(kept[:1], kept[1:])).logprob, abs=1e-4, rel=0
    )


def test_a_prompt_that_cannot_run_is_an_error(made: tuple[LLM, Jobs, Any]) -> None:
    with pytest.raises(RequestError, match="prompt token ids"):
        scored(made[1], [Pair([1], [10**6])])


def test_what_tasks_ask_of_answers() -> None:
    wanted = {"until": ["\n\n", ""], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    params = sampling_params(wanted, usual_length=256, stops_early=True)
    assert (params.max_tokens, params.stop, params.is_greedy) == (12, ("\n\n",), True)
    params = sampling_params({"until": "x"}, usual_length=256, stops_early=False)
    assert (params.max_tokens, params.stop, params.is_greedy) == (256, (), True)
    params = sampling_params(
        {"do_sample": True, "top_p": 0.9, "max_new_tokens": 3}, usual_length=256, stops_early=True
    )
    assert (params.temperature, params.top_p, params.max_tokens) == (1.0, 0.9, 3)
    with pytest.raises(UsageError, match="generation_kwargs: .*num_beams"):
        sampling_params({"num_beams": 4}, usual_length=256, stops_early=True)


def test_reasoning_and_what_follows_a_stop_are_cut_off() -> None:
    wanted = {"until": ["\n\n", "Q:"]}
    assert cut("An answer Q: and more\n\n", wanted, None) == "An answer "
    assert cut("a\n\nthought</think>\n It is.\n\nMore", wanted, "</think>") == "It is."
    assert cut("no end of thought\n\nx", wanted, "</think>") == "no end of thought"


def test_without_the_harness_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert str(main()).startswith("windlass-lm-eval: lm_eval")

"""What observers of routing are told: of every token once per layer, the same from captured layers
as from others, and at no bit's expense."""

import json
from collections import defaultdict

import pytest
import torch

from backends import LIBRARY
from engines import BY_KIND, engine_for, make_model, prompts, request, run_all
from recorder import RoutingRecorder, Seen, observed_by
from windlass.forecast.usage import UsageForecast
from windlass.kernels.cpu.native_capture import NativeCapture
from windlass.models.registry import read_spec
from windlass.models.spec import Moe, SigmoidTopK, SoftmaxTopK
from windlass.schedule import batch as batches

needs_library = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"the native library {LIBRARY}")
LENGTHS = (5, 70, 30)
TOKENS = (9, 14, 5)


def run(path, *observers, **options):
    """Sequences that begin and end at different times; the token ids of each."""
    requests = [
        request(f"{i}", prompt, max_tokens=tokens, temperature=0.8, seed=i)
        for i, (prompt, tokens) in enumerate(zip(prompts(LENGTHS), TOKENS, strict=True))
    ]
    with observed_by(*observers), engine_for(path, **options) as engine:
        results = run_all(engine, requests[:1]) | run_all(engine, requests[1:])
    return {name: output.outputs[0].token_ids for name, output in results.items()}


def moes_of(path):
    """By layer."""
    spec, _ = read_spec(json.loads((path / "config.json").read_text()))
    return {i: block.ffn for i, block in enumerate(spec.blocks) if isinstance(block.ffn, Moe)}


@pytest.mark.parametrize("family", BY_KIND)
def test_every_token_of_every_family_is_told_of_once_per_layer(family, tmp_path):
    make_model(family, tmp_path)
    recorder, moes = RoutingRecorder(), moes_of(tmp_path)
    assert run(tmp_path, recorder) == run(tmp_path)
    positions = defaultdict(set)
    for token in recorder.seen:  # a recorder refuses what comes twice
        positions[token.layer, token.sequence].add(token.position)
    counts = [length + tokens - 1 for length, tokens in zip(LENGTHS, TOKENS, strict=True)]
    for layer in moes:
        found = [seen for (at, _), seen in positions.items() if at == layer]
        assert sorted(map(len, found)) == sorted(counts)
        assert all(seen == set(range(len(seen))) for seen in found)
    assert {layer for layer, _ in positions} == set(moes)
    for token, seen in recorder.seen.items():
        check_scores(moes[token.layer], seen.scores_E, seen.ids_A)


def test_without_scores_the_rest_is_the_same(tmp_path):
    make_model("mixtral", tmp_path)
    whole, bare = RoutingRecorder(), RoutingRecorder(wants_scores=False)
    run(tmp_path, whole)
    run(tmp_path, bare, expert_forecast="usage")  # which wants none itself
    assert whole.seen.keys() == bare.seen.keys()
    for token, seen in bare.seen.items():
        assert seen.scores_E is None
        assert torch.equal(seen.h_D, whole.seen[token].h_D)
        assert torch.equal(seen.ids_A, whole.seen[token].ids_A)


def check_scores(moe, scores_E, ids_A):
    assert scores_E.shape == (moe.num_experts,) and ids_A.shape == (moe.top_k,)
    if isinstance(moe.routing, SoftmaxTopK):
        assert scores_E.sum() == pytest.approx(1, abs=1e-5)
    if isinstance(moe.routing, SigmoidTopK):
        assert ((scores_E > 0) & (scores_E < 1)).all()
    has_plain_choice = not getattr(moe.routing, "select_bias", False) and not hasattr(
        getattr(moe.routing, "groups", None), "kept"
    )
    if has_plain_choice:
        assert torch.equal(scores_E[ids_A], scores_E.topk(moe.top_k).values)


def is_equal(one: Seen, two: Seen) -> bool:
    """The same bits, scores included."""
    assert one.scores_E is not None and two.scores_E is not None
    return torch.equal(one.scores_E, two.scores_E) and all(map(torch.equal, one[:2], two[:2]))


@needs_library
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "gemma4_text"])
def test_captured_layers_tell_the_same(family, tmp_path, monkeypatch):
    make_model(family, tmp_path)
    captures: list[NativeCapture] = []
    begin = NativeCapture.begin

    def watched(self, work):
        captures.append(self)
        begin(self, work)

    monkeypatch.setattr(NativeCapture, "begin", watched)
    captured, plain = RoutingRecorder(), RoutingRecorder()
    results = run(tmp_path, captured, moe_backend="cpu")
    assert sum(one.num_replayed for one in set(captures)) > 20
    monkeypatch.setattr(batches, "MOST_CAPTURED", 0)
    captures.clear()
    assert run(tmp_path, plain, moe_backend="cpu") == results and not captures
    assert captured.layers == plain.layers
    assert captured.seen.keys() == plain.seen.keys()
    for token, seen in captured.seen.items():
        assert is_equal(seen, plain.seen[token]), token


@pytest.mark.parametrize("schedule", ["module-based", "model-based"])
def test_prompts_beside_answers_keep_their_tokens(schedule, tmp_path):
    """Both kinds in one pass, and a pass in several parts: what each token gets does not change."""
    make_model("mixtral", tmp_path)
    alone, mixed = RoutingRecorder(), RoutingRecorder()
    parts = prompts(LENGTHS)
    for i, prompt in enumerate(parts):
        one = RoutingRecorder()
        with observed_by(one), engine_for(tmp_path) as engine:
            run_all(engine, [request("0", prompt, max_tokens=TOKENS[i])])
        alone.seen |= {t._replace(sequence=len(prompt)): seen for t, seen in one.seen.items()}
    with observed_by(mixed), engine_for(tmp_path, schedule=schedule) as engine:
        engine.add(request("0", parts[0], max_tokens=TOKENS[0]))
        for _ in range(3):
            engine.step()
        run_all(engine, [request(f"{i}", parts[i], max_tokens=TOKENS[i]) for i in (1, 2)])
    totals = {LENGTHS[i] + TOKENS[i] - 1: LENGTHS[i] for i in range(3)}
    counts: dict[tuple[int, int], int] = {}
    for token in mixed.seen:
        key = token.layer, token.sequence
        counts[key] = max(counts.get(key, 0), token.position + 1)
    named = {
        token._replace(sequence=totals[counts[token.layer, token.sequence]]): seen
        for token, seen in mixed.seen.items()
    }
    assert named.keys() == alone.seen.keys()
    for token, seen in named.items():
        assert is_equal(seen, alone.seen[token]), token


@needs_library
def test_the_forecast_hears_nothing_of_captured_layers_observers_do(tmp_path, monkeypatch):
    make_model("mixtral", tmp_path)
    told = []
    monkeypatch.setattr(UsageForecast, "observe", lambda self, tokens: told.append(tokens.layer))
    recorder = RoutingRecorder(wants_scores=False)
    run(tmp_path, recorder, moe_backend="cpu")
    heard = told[:]
    monkeypatch.setattr(batches, "MOST_CAPTURED", 0)
    told.clear()
    run(tmp_path, moe_backend="cpu")
    assert recorder.layers == told and len(heard) < len(told)

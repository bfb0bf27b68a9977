"""Guesses of a checkpoint's own layer for multi-token prediction: what it says, that it changes no
answer, when it runs, and what it takes."""

import json
import random
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters import Corrected, Eager, answers, bits, varied_requests
from engines import engine_for, make_model, prompts, request, run_all
from fakes import FakeDevice
from families import rewrite_config
from nextn import LAYERS, Nextn, make_nextn
from quantised import fp8_block
from sequences import PlainStarts
from windlass.cli import main
from windlass.engine import layer_drafts
from windlass.engine.drafting import Drafting
from windlass.engine.drafts import LayerGuess
from windlass.engine.request import Request
from windlass.engine.sequence import QueuedSequence
from windlass.errors import UsageError
from windlass.ids import Part
from windlass.params import SamplingParams
from windlass.phases import PhaseStats
from windlass.schedule import passes
from windlass.schedule.batch import Batch, Segment
from windlass.speculative import SpeculativeConfig

CONFIG = SpeculativeConfig(method="mtp")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
       "weight_block_size": [128, 128]}  # fmt: skip
PACKED = tuple(f"{name}_proj.weight" for name in ("gate", "up", "down", "q", "k", "v", "o"))
TOLERANCE = 2e-5


class _Case(NamedTuple):
    path: Any
    nextn: Nextn


@pytest.fixture(scope="module", params=["deepseek_v3", "glm4_moe"])
def case(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return _Case(path, make_nextn(request.param, path))


@pytest.fixture
def said(monkeypatch) -> list[tuple[Batch, torch.Tensor]]:
    """What the layer was run over, and the logits that it gave."""
    runs: list[tuple[Batch, torch.Tensor]] = []
    run = passes.run_draft

    def noted(runtime, shape, batch, states, rows):
        outcome = run(runtime, shape, batch, states, rows)
        runs.append((batch, outcome.logits.clone()))
        return outcome

    monkeypatch.setattr(layer_drafts, "run_draft", noted)
    return runs


def _eagerly(monkeypatch, results=None):
    """All that the layer guesses is computed; of `results`, every other guess is what comes."""
    made = Eager(1, LayerGuess, is_heard=True) if results is None else Corrected(results)
    monkeypatch.setattr(Drafting, "of", lambda config: made)
    return made


@pytest.mark.parametrize("gives_way", [False, True], ids=["together", "gives-way"])
def test_the_layer_says_what_a_reference_says(case, said, gives_way, monkeypatch):
    """A prompt in chunks, two that share pages, and right guesses among the rows; or a sequence
    that is computed again."""
    long, short, other = prompts([140, 9, 20])
    options: dict[str, Any] = {"max_num_batched_tokens": 136}
    texts, count = [long, short, [*long[:70], *other]], 16
    if gives_way:
        options, texts, count = {"left_pages": 5}, prompts([20, 20, 20]), 70
    asked = [request(f"{i}", text, max_tokens=count) for i, text in enumerate(texts)]
    plain, _ = answers(case.path, asked, **options)
    numbers = _eagerly(monkeypatch, plain).numbers
    found, stats = answers(case.path, asked, speculative_config=CONFIG, **options)
    assert bits(found) == bits(plain)
    assert stats.drafts is not None and stats.drafts.accepted >= 12
    assert stats.num_preemptions if gives_way else stats.prefix_cache_hits >= 64
    compared = 0
    for one in asked:
        ids = torch.tensor([*one.prompt_token_ids, *plain[one.request_id].outputs[0].token_ids])
        with torch.no_grad():
            expected = case.nextn.logits(ids)
        for batch, logits in said:
            for row, segment in enumerate(s for s in batch.segments if s.wants_logits):
                if numbers[segment.sequence] == one.request_id:
                    last = segment.first_position + segment.num_tokens - 1
                    torch.testing.assert_close(logits[row], expected[last], rtol=0, atol=TOLERANCE)
                    compared += 1
    assert compared == sum(s.wants_logits for batch, _ in said for s in batch.segments) > 20


@pytest.mark.parametrize(
    ("options", "knows"),
    [
        ({}, True),
        ({}, False),
        ({"kv_cache_dtype": "int8", "max_num_batched_tokens": 100}, True),
        ({"moe_backend": "torch"}, True),
        ({"schedule": "model-based", "micro_batch_size": 64, "enable_prefix_caching": False}, True),
        ({"moe_expert_cache_size": "2", "max_num_seqs": 2}, True),
        ({"moe_expert_cache_size": "3", "expert_cache_policy": "lru", "expert_forecast": "finemoe"},
         False),
    ],
    ids=["corrected", "own", "int8", "torch", "model-based", "from-disk", "papers"],
)  # fmt: skip
def test_answers_are_those_without(case, options, knows, monkeypatch):
    asked = varied_requests()
    if options.keys() & {"moe_backend", "moe_expert_cache_size"}:
        asked = asked[:2]  # they take their time
    plain, without = answers(case.path, asked, **options)
    _eagerly(monkeypatch, plain if knows else None)
    found, stats = answers(case.path, asked, speculative_config=CONFIG, **options)
    assert bits(found) == bits(plain)
    assert stats.drafts is not None and stats.drafts.proposed > 20
    assert stats.generated_tokens == without.generated_tokens
    assert not knows or (stats.drafts.accepted >= 18 and stats.passes < without.passes)
    assert "moe_expert_cache_size" not in options or stats.weights.evictions > 0


def test_nor_do_they_depend_on_when_weights_come(case, monkeypatch):
    asked = varied_requests()[:3]
    plain, _ = answers(case.path, asked)
    _eagerly(monkeypatch, plain)
    with engine_for(
        case.path, device=FakeDevice(seed=1), max_model_len=160, max_num_batched_tokens=72,
        moe_expert_cache_size="130KiB", speculative_config=CONFIG,
    ) as engine:  # fmt: skip
        assert bits(run_all(engine, asked)) == bits(plain)
        assert engine.stats().weights.evictions > 0


def test_the_layer_runs_while_its_guesses_are_wanted(case, said):
    """As users get it: a window without, one to try, and rest where what is random guesses
    nothing. Prompts are seen in any case."""
    asked = [request(f"{i}", text, max_tokens=60, logprobs=1)
             for i, text in enumerate(prompts([70, 9]))]  # fmt: skip
    plain, _ = answers(case.path, asked)
    found, stats = answers(case.path, asked, speculative_config=CONFIG)
    assert bits(found) == bits(plain)
    prompt = [batch for batch, _ in said if any(s.is_prompt for s in batch.segments)]
    assert sum(batch.num_tokens for batch in prompt) == 79
    assert 8 <= len(said) - len(prompt) < 30
    assert stats.drafts is not None and stats.drafts.passes_without > 20


def test_nobody_is_told_of_what_the_layer_routes(case, said, tmp_path):
    """A trace of routing, with what routers read, is that without guesses."""
    asked = [request(f"{i}", text, max_tokens=5) for i, text in enumerate(prompts([70, 9]))]
    traces = []
    for config in (None, CONFIG):
        file = tmp_path / f"{config is None}.trace"
        answers(
            case.path, asked, speculative_config=config, routing_trace=file,
            routing_trace_inputs=True, moe_expert_cache_size="4", expert_usage="off",
        )  # fmt: skip
        traces.append(file.read_bytes())
    assert said and traces[0] == traces[1]


def test_a_layer_that_fails_takes_nothing_with_it(case, monkeypatch):
    one = request("a", prompts([6])[0], max_tokens=20, logprobs=1)
    plain, _ = answers(case.path, [one])
    _eagerly(monkeypatch, plain)
    with engine_for(case.path, speculative_config=CONFIG) as engine:
        engine.add(one)
        engine.step()
        engine.step()
        runtime: Any = engine._parts.runtime
        monkeypatch.setattr(runtime, "join", lambda *rows: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
        monkeypatch.delattr(runtime, "join")
        assert bits(run_all(engine, [])) == bits(plain)


def test_what_it_takes_is_part_of_the_plan(case):
    with engine_for(case.path) as engine:
        plain = engine.plan.host
    with engine_for(case.path, speculative_config=CONFIG) as engine:
        host, shape = engine.plan.host, engine._parts.shape
    assert host.kv_page_bytes * LAYERS == plain.kv_page_bytes * (LAYERS + 1)
    more = {own.part: own.num_parts for own in host.parts}
    for own in plain.parts:
        extra = {Part.BLOCK: 1, Part.EXPERT: 16}.get(own.part, 0)
        assert own.num_parts is not None and more.pop(own.part) == own.num_parts + extra
    assert more == {Part.JOIN: 1}
    assert host.activation_bytes > plain.activation_bytes
    assert len(shape.layers) == LAYERS and len(shape.whole.layers) == LAYERS + 1


def test_weights_may_be_packed(tmp_path, monkeypatch):
    """Matrices of the layer's block in fp8 as all others, what joins its rows not."""
    make_nextn("glm4_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(file).items():
        if name.endswith(PACKED):
            found, _ = fp8_block()(tensor)
            module = name.removesuffix(".weight")
            stored |= {module + ending: own.contiguous() for ending, own in found.items()}
        else:
            stored[name] = tensor
    save_file(stored, file)
    rewrite_config(tmp_path, quantization_config=FP8)
    asked = varied_requests()[:2]
    plain, _ = answers(tmp_path, asked)
    _eagerly(monkeypatch, plain)
    found, stats = answers(tmp_path, asked, speculative_config=CONFIG)
    assert bits(found) == bits(plain)
    assert stats.drafts is not None and stats.drafts.accepted >= 18


# --- when, on a made-up clock ---------------------------------------------------------------------


def _seconds(right, row_cost, layer_cost, *, tokens=2000):
    """What `tokens` take, a plain pass taking a second and a guess `layer_cost`."""
    chance = random.Random(3)
    asked = Request("r", (1, 2), SamplingParams(max_tokens=5000), "")
    sequence = PlainStarts().start(QueuedSequence(asked, 0, 5000, 5000))
    sequence.number, sequence.output_ids = 0, [0]
    drafting = Drafting.of(CONFIG)
    total = 0.0
    while len(sequence.output_ids) < tokens:
        place = len(sequence.output_ids)
        seconds = 1.0
        if drafting.wants_guesses:
            drafting.hear(sequence, place if chance.random() < right else 5000)
            seconds += layer_cost
        drafts = drafting.propose(sequence)
        accepted = int(drafts == (place,))
        sequence.output_ids += range(place, place + accepted + 1)
        seconds = (seconds + row_cost * len(drafts)) * (1 + 0.2 * chance.uniform(-1, 1))
        total += seconds
        segment = Segment(
            sequence=0, token_ids=(0, *drafts), first_position=place, pages=(), state_slot=-1,
            is_prompt=False, long_rope=False, wants_logits=True, num_drafts=len(drafts),
        )  # fmt: skip
        drafting.count(len(drafts), accepted)
        drafting.passed([segment], PhaseStats(seconds=seconds, output_tokens=accepted + 1))
    return total, drafting.stats()


def test_guesses_of_a_layer_are_computed_where_they_pay():
    total, stats = _seconds(0.85, 0.1, 0.03)
    assert total < 2000 * 1.12 * 1.13 / 1.85  # within an eighth of the best there is
    assert stats.accepted > 0.7 * stats.proposed and not stats.note.startswith("off")


@pytest.mark.parametrize(
    ("right", "row_cost", "layer_cost"),
    [(0.0, 0.1, 0.03), (0.3, 0.4, 0.05), (0.85, 0.95, 0.05), (0.85, 0.2, 1.0), (0.02, 0.0, 0.3)],
)
def test_they_do_not_lose_where_they_do_not(right, row_cost, layer_cost):
    """The layer's own time counts too."""
    total, stats = _seconds(right, row_cost, layer_cost)
    assert total < 2000 * 1.03 and stats.note.startswith("off")


# --- what users are told --------------------------------------------------------------------------


def test_it_is_said_what_guesses(case, capsys):
    arguments = ["generate", "-m", str(case.path), "--host-memory", "4GiB", "-n", "20", "--temp",
                 "0", "--max-model-len", "64", "--json", "w5 w6 w7"]  # fmt: skip
    assert main(arguments) == 0
    plain = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main([*arguments, "--speculative-config", '{"method": "mtp"}']) == 0
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1])["token_ids"] == plain["token_ids"]
    assert "drafts: mtp, one token by the layer for multi-token prediction" in told.err
    assert "join of drafts 1 of 1" in told.err


def test_checkpoints_without_such_a_layer_are_refused(case, tmp_path):
    make_model("mixtral", tmp_path / "mixtral")
    make_model("glm4_moe", tmp_path / "glm")
    rewrite_config(tmp_path / "glm", num_nextn_predict_layers=0)
    for name in ("mixtral", "glm"):
        with pytest.raises(UsageError, match=r"got 'mtp', allowed ngram for this checkpoint"):
            engine_for(tmp_path / name, speculative_config=CONFIG)
    rewrite_config(tmp_path / "glm", num_nextn_predict_layers=1)
    with pytest.raises(UsageError, match=r"allowed ngram for these files: .* tensor of layers\.3,"):
        engine_for(tmp_path / "glm", speculative_config=CONFIG)
    with engine_for(tmp_path / "glm"), engine_for(case.path):
        pass  # without guesses neither matters


def test_a_random_model_has_the_layer_too(case):
    one = request("a", prompts([9])[0])
    plain, _ = answers(case.path, [one], load_format="dummy")
    found, _ = answers(case.path, [one], load_format="dummy", speculative_config=CONFIG)
    assert bits(found) == bits(plain)

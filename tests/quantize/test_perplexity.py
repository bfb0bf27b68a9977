"""Log-probabilities of prompts, and the perplexity of a text, against transformers."""

import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dequantised import dequantised
from engines import engine_for, logprob_rows, make_model, prompts, request, run_all
from windlass.cli import main
from windlass.decoder.score import begin_scan, count_before
from windlass.decoder.score import scores as scores_of
from windlass.device.host_memory import HostAllocator
from windlass.engine.outputs import RequestOutput
from windlass.engine.sampling import _with_logprobs
from windlass.errors import UsageError
from windlass.kernels.logit_scan import scan_logits
from windlass.options import EngineOptions
from windlass.quantize.perplexity import measure

WINDOW = 48


def expected_logprobs(model: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """Of each token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor(ids)[None]).logits[0, :-1]
    rows = logits.double().log_softmax(-1)
    return rows.gather(1, torch.tensor(ids)[1:, None])[:, 0]


def scores(output: RequestOutput) -> torch.Tensor:
    """Of each token but the first."""
    steps = output.prompt_logprobs
    assert steps is not None and steps[0] is None and len(steps) == len(output.prompt_token_ids)
    pairs = zip(output.prompt_token_ids[1:], steps[1:], strict=True)
    return torch.tensor([step[token].logprob for token, step in pairs if step], dtype=torch.float64)


def test_logprobs_from_ranges_of_the_vocabulary() -> None:
    """Also the likeliest and ranks, with equal logits within ranges and across."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 90, generator=generator) * 30
    logits[4:] = (logits[4:] / 30).round() / 2  # many are equal, some -0.0
    targets = torch.tensor([0, 89, 30, 29, 60, 45])
    every = logits.double().log_softmax(-1)
    order = logits.sort(dim=1, descending=True, stable=True)[1]
    for top in (1, 20, 40, 90):  # more than a range has, and all
        scan = begin_scan(HostAllocator(), len(targets), targets, top=top)
        ranks = torch.zeros_like(targets)
        for again in (False, True):
            for column, rows in product((0, 30, 60), (slice(0, 4), slice(4, 8))):
                some = logits[rows, column : column + 30].clone()
                if again:
                    count_before(scan.rows(rows), ranks[rows], some, column)
                else:
                    scan_logits(scan.rows(rows), some, column)
        own, best, best_logprobs = scores_of(scan)
        expected = every.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(own.double(), expected, rtol=1e-6, atol=1e-6)
        assert scan.ids_R.equal(logits.argmax(1)) and scan.tops_R.equal(logits.amax(1))
        assert best.equal(order[:, :top])
        expected = every.gather(1, best)
        torch.testing.assert_close(best_logprobs.double(), expected, rtol=1e-6, atol=1e-6)
        assert ranks.equal((order == targets[:, None]).nonzero()[:, 1])
    nothing = scores_of(begin_scan(HostAllocator(), 0))
    assert [tuple(one.shape) for one in nothing] == [(0,), (0, 1), (0, 1)]


def test_bits_of_scores_do_not_depend_on_ranges_and_are_those_of_generated_tokens() -> None:
    """Also where more rows come than are looked at together."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(70, 40_000, generator=generator) * 4
    targets = torch.arange(70) * 3
    found = []
    for size in (40_000, 4096, 1000):
        scan = begin_scan(HostAllocator(), 70, targets, top=5)
        for column in range(0, 40_000, size):
            scan_logits(scan, logits[:, column : column + size].contiguous(), column)
        found.append(scores_of(scan))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    own, best, best_logprobs = found[0]
    for row in range(70):
        drawn = _with_logprobs(logits[row].numpy(), int(targets[row]), 5)
        assert drawn.logprob == own[row]
        assert [one[:2] for one in drawn.top] == list(
            zip(best[row].tolist(), best_logprobs[row].tolist(), strict=True)
        )


def expected_steps(model: torch.nn.Module, ids: Sequence[int], top: int) -> list[dict[int, int]]:
    """Of each token but the first: ranks of itself and the likeliest."""
    with torch.no_grad():
        order = model(torch.tensor(ids)[None]).logits[0, :-1].argsort(-1, descending=True)
    found = []
    for token, row in zip(ids[1:], order.tolist(), strict=True):
        found.append({token: 1 + row.index(token), **{i: 1 + n for n, i in enumerate(row[:top])}})
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "phimoe"])  # one with a bias of the head
def test_alternatives_are_those_of_transformers_in_any_company(family: str, tmp_path: Path) -> None:
    model = make_model(family, tmp_path)
    texts = prompts((2, 70, 140))
    tops = (5, 20, 3)
    requests = [
        request(str(i), ids, max_tokens=1, logprobs=20, prompt_logprobs=top)
        for i, (ids, top) in enumerate(zip(texts, tops, strict=True))
    ]
    with engine_for(tmp_path, max_num_batched_tokens=128, max_num_seqs=8) as engine:
        company = [
            request("n", texts[1], max_tokens=2, prompt_logprobs=1, prompt_logprob_ranks=False)
        ]
        together = run_all(engine, [*company, *requests])
        # the tokens that came first, as tokens of a prompt
        longer = [
            request(f"{i}", [*ids, *together[str(i)].outputs[0].token_ids], max_tokens=1,
                    prompt_logprobs=20, prompt_logprob_start=len(ids))
            for i, ids in enumerate(texts)
        ]  # fmt: skip
        told = run_all(engine, longer)
    alone: dict[str, RequestOutput] = {}
    tiny: dict[str, Any] = {
        "max_num_seqs": 1,
        "max_num_batched_tokens": 72,
        "moe_expert_cache_size": "1",
    }
    with engine_for(tmp_path, schedule="model-based", micro_batch_size=64, **tiny) as engine:
        for one in requests:
            alone |= run_all(engine, [one])
    for i, (ids, top) in enumerate(zip(texts, tops, strict=True)):
        steps = together[str(i)].prompt_logprobs
        assert steps is not None and steps == alone[str(i)].prompt_logprobs
        assert [{t: own.rank for t, own in (step or {}).items()} for step in steps[1:]] == (
            expected_steps(model, ids, top)
        )
        with torch.no_grad():
            rows = model(torch.tensor(ids)[None]).logits[0, :-1].double().log_softmax(-1)
        for step, row in zip(steps[1:], rows, strict=True):
            assert step is not None
            for token, own in step.items():
                assert own.logprob == pytest.approx(float(row[token]), abs=1e-4)
                assert own.decoded_token is not None
        drawn, again = together[str(i)].outputs[0].logprobs, told[str(i)].prompt_logprobs
        assert drawn is not None and again is not None and dict(drawn[0]) == again[-1]
    known = together["n"].prompt_logprobs
    assert known is not None and {one.rank for one in known[5].values()} <= {1, None}  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next", "phimoe"])
def test_prompts_are_scored_as_by_transformers(family: str, tmp_path: Path) -> None:
    model = make_model(family, tmp_path)
    texts = prompts((2, 70, 33, 129, 1))
    with engine_for(tmp_path, max_num_batched_tokens=128, max_num_seqs=8) as engine:
        requests = [
            request(str(i), ids, max_tokens=1, prompt_logprobs=0) for i, ids in enumerate(texts)
        ]
        results = run_all(engine, requests)
    for i, ids in enumerate(texts):
        found = scores(results[str(i)])
        assert len(found) == len(ids) - 1
        if len(ids) > 1:
            torch.testing.assert_close(found, expected_logprobs(model, ids), rtol=0, atol=1e-4)


def test_scores_are_the_same_bits_in_any_company_and_do_not_change_it(tmp_path: Path) -> None:
    make_model("qwen3_moe", tmp_path)
    texts = prompts((100, 65, 7))
    wanted = {"prompt_logprobs": 0, "max_tokens": 4, "logprobs": -1}
    alone: dict[str, RequestOutput] = {}
    with engine_for(tmp_path, max_num_seqs=1, max_num_batched_tokens=128) as engine:
        for i, ids in enumerate(texts):
            alone |= run_all(engine, [request(str(i), ids, **wanted)])
    with engine_for(tmp_path, moe_expert_cache_size="1") as engine:
        mixed = [request(str(i), ids, n=2, **wanted) for i, ids in enumerate(texts)]
        plain = [request(f"p{i}", ids, max_tokens=4, logprobs=-1) for i, ids in enumerate(texts)]
        together = run_all(engine, [*mixed, *plain])
    for i in range(len(texts)):
        one, other = alone[str(i)], together[str(i)]
        assert torch.equal(scores(one), scores(other))
        assert torch.equal(logprob_rows(one), logprob_rows(other))
        assert torch.equal(logprob_rows(one), logprob_rows(together[f"p{i}"]))
        assert together[f"p{i}"].prompt_logprobs is None


def test_a_prompt_that_is_computed_again_is_scored_once(tmp_path: Path) -> None:
    """Pages for one and a half of the sequences: the younger one is driven out."""
    make_model("qwen3_moe", tmp_path)
    texts = prompts((90, 90))
    with engine_for(tmp_path, max_model_len=128, max_num_seqs=2, max_num_batched_tokens=128) as one:
        wanted = run_all(one, [request("1", texts[1], max_tokens=30, prompt_logprobs=0)])
        kv = one._admission._kv.device
        kv.take_pages(kv.num_free_pages - 7)
        both = [request(str(i), ids, max_tokens=30, prompt_logprobs=0)
                for i, ids in enumerate(texts)]  # fmt: skip
        again = run_all(one, both, check=False)
        assert one.stats().num_preemptions > 0
    assert torch.equal(scores(wanted["1"]), scores(again["1"]))


def text_of(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def expected_perplexity(model: torch.nn.Module, ids: Sequence[int]) -> tuple[float, int]:
    windows = [ids[first : first + WINDOW] for first in range(0, len(ids), WINDOW)]
    found = torch.cat([expected_logprobs(model, one) for one in windows if len(one) > 1])
    return math.exp(-found.mean()), len(found)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen3_5_moe_text"])
@pytest.mark.parametrize("length", [200, 193, 30])  # the last window: short, of one token, none
def test_perplexity_is_transformers(family: str, length: int, tmp_path: Path) -> None:
    model = make_model(family, tmp_path)
    (ids,) = prompts((length,), seed=4)
    steps: list[tuple[int, int]] = []
    options = EngineOptions(model=str(tmp_path), host_memory=4 << 30)
    found = measure(options, text_of(ids), window=WINDOW, on_step=lambda *s: steps.append(s))
    expected, count = expected_perplexity(model, ids)
    assert found.num_tokens == count
    assert found.perplexity == pytest.approx(expected, rel=1e-4)
    assert steps[-1][0] == steps[-1][1] == length - (length % WINDOW == 1)
    small = EngineOptions(
        model=str(tmp_path), host_memory=4 << 30, max_num_seqs=1, max_num_batched_tokens=128,
        moe_expert_cache_size="1",
    )  # fmt: skip
    assert measure(small, text_of(ids), window=WINDOW) == found


def test_a_text_of_one_token_is_refused(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path)
    with pytest.raises(UsageError, match="text: got 1 token, allowed 2 or more"):
        measure(EngineOptions(model=str(tmp_path), host_memory=4 << 30), "w5", window=WINDOW)


def twin(out: Path, folder: Path) -> Path:
    """The quantised checkpoint as a dense one."""
    folder.mkdir()
    save_file(dequantised(out), folder / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((out / "tokenizer.json").read_bytes())
    return folder


def test_the_command_measures_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    model = make_model("mixtral", tmp_path / "model", **wide)
    (ids,) = prompts((150,), seed=4)
    (tmp_path / "text").write_text(text_of(ids))
    arguments = [
        "quantize", "-m", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--format", "int4",
        "--group", "32", "--text", str(tmp_path / "text"), "--window", str(WINDOW), "--json",
        "--host-memory", "4GiB",
    ]  # fmt: skip
    assert main(arguments) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    before, count = expected_perplexity(model, ids)
    assert document["perplexity_before"] == pytest.approx(before, rel=1e-4)
    assert f"({count} tokens, windows of {WINDOW})" in printed
    options = EngineOptions(model=str(twin(tmp_path / "out", tmp_path / "twin")))
    after = measure(options, text_of(ids), window=WINDOW).perplexity
    assert document["perplexity_after"] == pytest.approx(after, rel=1e-5)
    assert abs(after / before - 1) > 1e-3
    assert main(arguments) == 0  # nothing to write, still measured
    assert f"perplexity after: {after:.4f}" in capsys.readouterr().out

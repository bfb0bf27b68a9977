"""What keys and values in fewer bits cost: error against fp32 ones, on models that can be had here.

    python bench/kv_error.py [--json FILE] [--text FILE] [--quick]

The shipped model on English and Python that it never saw (`texts/`), then random checkpoints of
the test suite on random tokens. Every type computes the same windows, scored token by token (the
context is given, errors do not add up over an answer), and the same greedy answers. Then rows of
random numbers through the attention kernel alone, some with one column much larger than the others,
as keys of published models have them.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from math import exp
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, describe, set_threads, table, write

from windlass.build.open import open_engine
from windlass.device.host_memory import HostAllocator
from windlass.engine.engine import Engine
from windlass.engine.outputs import RequestOutput
from windlass.engine.request import WINDOW, Request
from windlass.kernels.interface import AttentionOptions, AttentionWork
from windlass.kernels.reference import TorchKernels
from windlass.kvcache.kv_cache import KvCache, PagedShape
from windlass.options import EngineOptions
from windlass.params import SamplingParams
from windlass.units import GIB

sys.path.insert(0, str(ROOT / "tests" / "models"))
sys.path.insert(0, str(ROOT / "tests" / "support"))
from engines import make_model, prompts

_EXACT = "float32"
_TYPES = ("float32", "bfloat16", "float16", "int8")
_FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next")
# This project's documents and code of November 2026, as they were first scored: kept, so that
# figures stay comparable while documents and code change
_TEXTS = ("english", "python")
_PAGE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class _Case:
    """Token ids to score, and prompts to answer."""

    name: str
    model: str
    windows: list[list[int]]
    prompts: list[list[int]]
    answer: int  # tokens

    @property
    def longest(self) -> int:
        lengths = [len(ids) + 1 for ids in self.windows]
        return max(lengths + [len(ids) + self.answer for ids in self.prompts])


@dataclass(frozen=True, slots=True)
class _Run:
    """One case with keys and values in one type."""

    scores: torch.Tensor  # log-probabilities of all tokens of windows but each first
    answers: list[list[int]]
    bytes_per_token: float


# --- runs -----------------------------------------------------------------------------------------


def _run(case: _Case, dtype: Any) -> _Run:
    options = EngineOptions(
        model=case.model, kv_cache_dtype=dtype, max_model_len=case.longest,
        host_memory=2 * GIB, generation_config="vllm",
    )  # fmt: skip
    scored = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=0, prompt_logprob_ranks=False,
        detokenize=False, ignore_eos=True,
    )  # fmt: skip
    greedy = SamplingParams(
        max_tokens=case.answer, temperature=0.0, detokenize=False, ignore_eos=True
    )
    with closing(open_engine(options)) as engine:
        found = _finish(engine, case.windows, scored)
        answers = _finish(engine, case.prompts, greedy)
        page_bytes, page_tokens = engine.plan.host.kv_page_bytes, engine.plan.page_tokens
    scores = [score for output in found for score in _scores(output)]
    return _Run(
        torch.tensor(scores, dtype=torch.float64),
        [list(output.outputs[0].token_ids) for output in answers],
        page_bytes / page_tokens,
    )


def _finish(
    engine: Engine, rows: Sequence[Sequence[int]], params: SamplingParams
) -> list[RequestOutput]:
    """Results in the order of `rows`; a bounded number is in the engine."""
    results: dict[int, RequestOutput] = {}
    waiting = iter(enumerate(rows))
    num_added = 0
    while len(results) < len(rows):
        while num_added - len(results) < WINDOW * engine.capacity:
            entry = next(waiting, None)
            if entry is None:
                break
            engine.add(Request(str(entry[0]), tuple(entry[1]), params, seed_key=str(entry[0])))
            num_added += 1
        for output in engine.step().finished:
            assert output.error is None, output.error
            results[int(output.request_id)] = output
    return [results[i] for i in range(len(rows))]


def _scores(output: RequestOutput) -> Iterator[float]:
    assert output.prompt_logprobs is not None, "they were asked for"
    for token, step in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
        if step is not None:
            yield step[token].logprob


# --- what they say --------------------------------------------------------------------------------


def _row(case: _Case, dtype: str, run: _Run, exact: _Run) -> dict[str, Any]:
    error = run.scores - exact.scores
    same, different = _agreement(run.answers, exact.answers)
    return {
        "case": case.name,
        "kv_cache_dtype": dtype,
        "bytes_per_token": run.bytes_per_token,
        "tokens": len(error),
        "mean_abs_error": error.abs().mean().item(),
        "p99_abs_error": error.abs().quantile(0.99).item(),
        "max_abs_error": error.abs().max().item(),
        "mean_error": error.mean().item(),
        "perplexity": exp(-run.scores.mean().item()),
        "greedy_steps_compared": same + different,
        "greedy_steps_equal": same,
        "greedy_answers": len(run.answers),
        "greedy_answers_equal": len(run.answers) - different,
    }


def _agreement(answers: list[list[int]], exact: list[list[int]]) -> tuple[int, int]:
    """Steps at which both chose the same token after the same tokens, and at which not: at most one
    of an answer, since what follows has another context."""
    same = different = 0
    for mine, theirs in zip(answers, exact, strict=True):
        equal = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        same += len(mine) if equal is None else equal
        different += equal is not None
    return same, different


def _cells(row: dict[str, Any]) -> list[str]:
    steps = row["greedy_steps_compared"]
    return [
        row["case"], row["kv_cache_dtype"], f"{row['bytes_per_token']:.0f}", str(row["tokens"]),
        *(f"{row[name]:.1e}" for name in ("mean_abs_error", "p99_abs_error", "max_abs_error")),
        f"{row['perplexity']:.4f}",
        f"{100 * row['greedy_steps_equal'] / steps:.2f} % of {steps}",
        f"{row['greedy_answers_equal']} of {row['greedy_answers']}",
    ]  # fmt: skip


def bench_models(cases: Sequence[_Case]) -> list[dict[str, Any]]:
    rows = []
    for case in cases:
        exact = _run(case, _EXACT)
        for dtype in _TYPES:
            run = exact if dtype == _EXACT else _run(case, dtype)
            rows.append(_row(case, dtype, run, exact))
    heads = ("model, tokens", "keys, values", "B/token", "scored", "mean error", "99 %", "largest",
             "perplexity", "greedy steps equal", "answers equal")  # fmt: skip
    print("\n" + table(heads, [_cells(row) for row in rows]))
    return rows


# --- cases ----------------------------------------------------------------------------------------


def _demo_cases(text: Path | None, *, quick: bool) -> list[_Case]:
    from windlass.engine.tokenizer import load
    from windlass.options import resolve_model

    tokenizer = load(resolve_model("demo"))
    window, most = (128, 4) if quick else (768, 1000)
    texts = {name: ROOT / "bench" / "texts" / f"{name}.txt" for name in _TEXTS}
    if text is not None:
        texts = {text.name: text}
    cases = []
    for name, path in texts.items():
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
        windows = [ids[i : i + window] for i in range(0, len(ids) - 1, window)][:most]
        starts = [ids[i : i + 96] for i in range(0, len(ids) - 96, 192)][: 4 if quick else 48]
        cases.append(_Case(f"demo, {name}", "demo", windows, starts, 16 if quick else 128))
    return cases


def _random_cases(folder: Path, *, quick: bool) -> list[_Case]:
    cases = []
    for family in _FAMILIES[:1] if quick else _FAMILIES:
        path = folder / family
        make_model(family, path)
        windows = prompts([250] * (2 if quick else 24))
        starts = prompts([40] * (2 if quick else 24), seed=1)
        cases.append(_Case(f"random {family}", str(path), windows, starts, 16 if quick else 128))
    return cases


# --- rows alone -----------------------------------------------------------------------------------


def bench_rows(*, quick: bool) -> list[dict[str, Any]]:
    """Attention over 512 positions of normally distributed keys and values. `outlier`: one column
    of the keys is that many times larger, and queries that many times smaller there."""
    rows, cells = [], []
    shapes = {"64": PagedShape(2, 64, 64), "128": PagedShape(2, 128, 128),
              "latent 512 + 64": PagedShape(1, 576, 512, value_in_key=True)}  # fmt: skip
    for name, shape in list(shapes.items())[: 1 if quick else None]:
        for outlier in (1, 10, 30, 100):
            for dtype in (torch.bfloat16, torch.int8):
                error = _row_error(shape, outlier, dtype)
                rows.append({
                    "row": name, "outlier": outlier, "kv_cache_dtype": str(dtype)[6:],
                    "relative_rms_error": error,
                })  # fmt: skip
                cells.append([name, str(outlier), str(dtype)[6:], f"{100 * error:.2f} %"])
    print("\n" + table(("attention over rows of", "outlier", "keys, values", "rms error"), cells))
    return rows


def _row_error(shape: PagedShape, outlier: int, dtype: torch.dtype) -> float:
    torch.manual_seed(0)
    positions, heads = 512, 4 * shape.num_heads
    key = torch.randn(positions, shape.num_heads, shape.key_dim)
    value = torch.randn(positions, shape.num_heads, shape.value_dim)
    q_THd = torch.randn(positions, heads, shape.key_dim)
    key[..., -1] *= outlier
    q_THd[..., -1] /= outlier
    found = [_attention(shape, kept, q_THd, (key, value)) for kept in (torch.float32, dtype)]
    return ((found[1] - found[0]).square().mean() / found[0].square().mean()).sqrt().item()


def _attention(
    shape: PagedShape,
    dtype: torch.dtype,
    q_THd: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    count = len(q_THd) // _PAGE_TOKENS
    store = KvCache(
        [shape],
        HostAllocator(),
        dtype=dtype,
        num_pages=count,
        page_tokens=_PAGE_TOKENS,
    )
    pages = store.take_pages(count)
    positions = torch.arange(len(q_THd))
    page_of = torch.tensor(pages)[positions // _PAGE_TOKENS]
    kernels = TorchKernels()
    for rows, x_TKd in zip(store.stored(0), kv, strict=False):
        kernels.write_rows(rows, page_of, positions % _PAGE_TOKENS, x_TKd)
    work = AttentionWork((0,), (len(q_THd),), (0,), (tuple(pages),), (True,))
    options = AttentionOptions(scale=shape.key_dim**-0.5, value_dim=shape.value_dim)
    return kernels.attention(q_THd, *store.paged(0), work, options)


def main() -> None:
    parser = argparse.ArgumentParser(description="Error of keys and values in fewer bits.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--text", type=Path, metavar="FILE", help="instead of bench/texts/")
    parser.add_argument("--quick", action="store_true", help="a few tokens, some seconds")
    options = parser.parse_args()
    set_threads(None)
    document: dict[str, Any] = {"bench": "kv_error", **describe()}
    cases = _demo_cases(options.text, quick=options.quick)
    with tempfile.TemporaryDirectory() as folder:
        cases += _random_cases(Path(folder), quick=options.quick)
        document["models"] = bench_models(cases)
    document["rows"] = bench_rows(quick=options.quick)
    document["tokens_digest"] = {
        case.name: blake2b(json.dumps(case.windows).encode(), digest_size=8).hexdigest()
        for case in cases
    }
    write(document, options.json)


if __name__ == "__main__":
    main()

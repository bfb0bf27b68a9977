"""How fast the kernels are, beside what the machine could do, all in one run.

    python bench/kernels.py [--json FILE] [--quick] [--threads N]

Experts are called in turn from a set larger than the last-level cache, as in a run, where each is
used once per pass. A bound is the larger of two times: stored bytes at the memory's read rate,
FLOPs at the rate of a large fp32 product. Shape legend: kernels/base.py.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from machine import (
    Others,
    Rates,
    Timing,
    describe,
    head,
    measure,
    measure_rates,
    set_threads,
    table,
    write,
)
from torch.nn.functional import linear, silu

from windlass.kernels.base import AttentionOptions, AttentionWork, Tensors
from windlass.kernels.reference import TorchKernels
from windlass.packed import PagedRows
from windlass.spec.model import SwiGlu
from windlass.units import MIB, round_up

_COLD_BYTES = 160 * MIB  # of experts called in turn
_MEMORY_BOUND_ROWS = 4  # up to here, bytes per second say more than FLOPs
_PAGE_TOKENS = 32
_SEQUENCES = 32
_PROMPT = 512
_KV_TYPE = torch.bfloat16  # keys and values are kept in the checkpoint's type


@dataclass(frozen=True, slots=True)
class _Expert:
    """An expert's shape and the row counts to measure; `torch_rows`: up to here also torch's own
    bf16 product, which takes seconds beyond."""

    model: str
    hidden: int
    intermediate: int
    rows: tuple[int, ...]
    torch_rows: int

    @property
    def num_bytes(self) -> int:
        return 2 * 3 * self.hidden * self.intermediate

    def flops(self, rows: int) -> int:
        return 2 * 3 * self.hidden * self.intermediate * rows


_ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
_EXPERTS = (
    _Expert("qwen3-30b-a3b", 2048, 768, _ROWS, 2048),
    _Expert("olmoe-1b-7b", 2048, 1024, _ROWS, 2048),
    _Expert("mixtral-8x7b", 4096, 14336, (1, 16, 128, 512), 128),
)
_QUICK_EXPERTS = (_Expert("qwen3-30b-a3b", 2048, 768, (1, 16, 128), 16),)


@dataclass(frozen=True, slots=True)
class _Heads:
    """H query heads, K key/value heads, d each."""

    query: int
    kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.query}/{self.kv} x {self.dim}"

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.kv * self.dim * _KV_TYPE.itemsize


_HEADS = (_Heads(16, 8, 64), _Heads(32, 4, 128))


# --- experts --------------------------------------------------------------------------------------


def _experts(shape: _Expert) -> Iterator[Tensors]:
    """Random bf16 experts, forever in turn."""
    count = max(1, -(-_COLD_BYTES // shape.num_bytes))
    sizes = {
        "gate": (shape.intermediate, shape.hidden),
        "up": (shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
    }
    return cycle(
        [
            {name: (torch.randn(size) / size[1] ** 0.5).bfloat16() for name, size in sizes.items()}
            for _ in range(count)
        ]
    )


def _torch_ffn(x_ND: torch.Tensor, w: Tensors) -> torch.Tensor:
    return linear(silu(linear(x_ND, w["gate"])) * linear(x_ND, w["up"]), w["down"])


def _expert_row(
    shape: _Expert, rows: int, *, weights: Iterator[Tensors], kernels: TorchKernels, rates: Rates
) -> dict[str, Any]:
    x_ND = torch.randn(rows, shape.hidden)
    ours = measure(lambda: kernels.expert_ffn(x_ND, next(weights), SwiGlu()))
    narrow = x_ND.bfloat16()
    theirs = None
    if rows <= shape.torch_rows:
        theirs = measure(lambda: _torch_ffn(narrow, next(weights)), repeats=5, limit_s=0.5)
    bandwidth_s = shape.num_bytes / rates.read_bytes_per_s
    compute_s = shape.flops(rows) / rates.fp32_flops_per_s
    bound_s = max(bandwidth_s, compute_s)
    return {
        "model": shape.model,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "rows": rows,
        "windlass": ours.to_json(),
        "torch_bf16": theirs and theirs.to_json(),
        "flops_per_s": shape.flops(rows) / ours.median_s,
        "share_of_fp32_rate": compute_s / ours.median_s,
        "stored_bytes_per_s": shape.num_bytes / ours.median_s,
        "bound_s": bound_s,
        "binds": "memory" if bandwidth_s > compute_s else "compute",
        "share_of_bound": bound_s / ours.median_s,
        "speedup_over_torch_bf16": theirs and theirs.median_s / ours.median_s,
    }


def _expert_cells(row: dict[str, Any]) -> list[str]:
    theirs, speedup = row["torch_bf16"], row["speedup_over_torch_bf16"]
    ours = Timing(**row["windlass"])
    few = row["rows"] <= _MEMORY_BOUND_ROWS
    return [
        row["model"],
        str(row["rows"]),
        f"{1e3 * ours.median_s:.2f}",
        f"{100 * ours.spread:.0f} %",
        f"{row['flops_per_s'] / 1e9:.1f}",
        f"{100 * row['share_of_fp32_rate']:.0f} %",
        f"{row['stored_bytes_per_s'] / 1e9:.2f}" if few else "",
        f"{1e3 * row['bound_s']:.2f} {row['binds']}",
        f"{100 * row['share_of_bound']:.0f} %",
        f"{1e3 * theirs['median_s']:.2f}" if theirs else "",
        f"{speedup:.1f} x" if speedup else "",
    ]


def bench_experts(rates: Rates, *, quick: bool) -> list[dict[str, Any]]:
    """`expert_ffn` of one expert by number of rows."""
    kernels, results, cells = TorchKernels(), [], []
    for shape in _QUICK_EXPERTS if quick else _EXPERTS:
        weights = _experts(shape)
        for rows in shape.rows:
            results.append(_expert_row(shape, rows, weights=weights, kernels=kernels, rates=rates))
            cells.append(_expert_cells(results[-1]))
    heads = ("expert_ffn, bf16", "rows", "ms", "spread", "GFLOP/s", "of fp32", "GB/s", "bound ms",
             "of bound", "torch bf16 ms", "speedup")  # fmt: skip
    print("\n" + table(heads, cells))
    return results


# --- attention ------------------------------------------------------------------------------------


def _stores(heads: _Heads, pages: int) -> tuple[PagedRows, PagedRows]:
    shape = (pages, heads.kv, _PAGE_TOKENS, heads.dim)
    return PagedRows(torch.randn(shape).to(_KV_TYPE)), PagedRows(torch.randn(shape).to(_KV_TYPE))


def _work(lengths: tuple[int, int], sequences: int, *, is_prompt: bool) -> AttentionWork:
    """`sequences` with `lengths` = (positions, of these rows of the call), pages in random order,
    as they are after a while."""
    positions, rows = lengths
    per_sequence = round_up(positions, _PAGE_TOKENS) // _PAGE_TOKENS
    order = torch.randperm(sequences * per_sequence).view(sequences, per_sequence).tolist()
    return AttentionWork(
        first_row=tuple(range(0, sequences * rows, rows)),
        num_rows=(rows,) * sequences,
        first_position=(positions - rows,) * sequences,
        pages=tuple(map(tuple, order)),
        is_prompt=(is_prompt,) * sequences,
    )


def _attention(heads: _Heads, work: AttentionWork) -> Timing:
    keys, values = _stores(heads, sum(map(len, work.pages)))
    q_THd = torch.randn(sum(work.num_rows), heads.query, heads.dim)
    options = AttentionOptions(scale=heads.dim**-0.5, value_dim=heads.dim)
    kernels = TorchKernels()
    return measure(lambda: kernels.attention(q_THd, keys, values, work, options))


def bench_decode(rates: Rates, *, quick: bool) -> list[dict[str, Any]]:
    """One new token of each of 32 sequences over their keys and values."""
    results, cells = [], []
    for heads in _HEADS:
        for context in (128,) if quick else (128, 512, 2048):
            timing = _attention(heads, _work((context, 1), _SEQUENCES, is_prompt=False))
            num_bytes = _SEQUENCES * context * heads.bytes_per_token
            rate = num_bytes / timing.median_s
            results.append({
                "heads": heads.query, "kv_heads": heads.kv, "head_dim": heads.dim,
                "sequences": _SEQUENCES, "context": context, "windlass": timing.to_json(),
                "kv_bytes_per_s": rate, "share_of_memory_rate": rate / rates.read_bytes_per_s,
            })  # fmt: skip
            cells.append([
                str(heads), str(context), f"{1e3 * timing.median_s:.2f}",
                f"{100 * timing.spread:.0f} %", f"{rate / 1e9:.2f}",
                f"{100 * rate / rates.read_bytes_per_s:.0f} %",
            ])  # fmt: skip
    heads_row = (f"decode, {_SEQUENCES} sequences", "context", "ms", "spread", "KV GB/s",
                 "of memory")  # fmt: skip
    print("\n" + table(heads_row, cells))
    return results


def bench_prefill(rates: Rates) -> list[dict[str, Any]]:
    """All rows of one prompt. FLOPs of what the causal mask leaves."""
    results, cells = [], []
    for heads in _HEADS:
        timing = _attention(heads, _work((_PROMPT, _PROMPT), 1, is_prompt=True))
        flops = 4 * heads.query * heads.dim * _PROMPT * (_PROMPT + 1) // 2
        rate = flops / timing.median_s
        results.append({
            "heads": heads.query, "kv_heads": heads.kv, "head_dim": heads.dim,
            "prompt": _PROMPT, "windlass": timing.to_json(), "flops_per_s": rate,
            "share_of_fp32_rate": rate / rates.fp32_flops_per_s,
        })  # fmt: skip
        cells.append([
            str(heads), f"{1e3 * timing.median_s:.2f}", f"{100 * timing.spread:.0f} %",
            f"{rate / 1e9:.1f}", f"{100 * rate / rates.fp32_flops_per_s:.0f} %",
        ])  # fmt: skip
    print("\n" + table((f"prefill, {_PROMPT} tokens", "ms", "spread", "GFLOP/s", "of fp32"), cells))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Rates of the CPU kernels on this machine.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--quick", action="store_true", help="a few shapes, some seconds")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    options = parser.parse_args()
    set_threads(options.threads)
    torch.manual_seed(0)
    document: dict[str, Any] = {"bench": "kernels", **describe()}
    others = Others()
    with torch.inference_mode():
        rates = measure_rates(quick=options.quick)
        print(head(document, rates))
        document["rates"] = rates.to_json()
        document["experts"] = bench_experts(rates, quick=options.quick)
        document["decode"] = bench_decode(rates, quick=options.quick)
        document["prefill"] = bench_prefill(rates)
    # again at the end: a difference says that something else ran meanwhile
    after = measure_rates(quick=options.quick)
    document["rates_after"] = after.to_json()
    document["others_cores"] = others.cores()
    print(
        f"\nfp32 product at the end: {after.fp32_flops_per_s / 1e9:.0f} GFLOP/s; "
        f"{document['others_cores']:.2f} cores busy with other processes"
    )
    write(document, options.json)


if __name__ == "__main__":
    main()

"""How fast the kernels are, beside what the machine could do, all in one run.

    python bench/kernels.py [--json FILE] [--quick] [--threads N] [--instruction-set NAME]

Experts are called in groups, in turn from a set larger than the last-level cache, as in a run,
where each is used once per pass. A bound is the larger of two times: stored bytes at the
memory's read rate, FLOPs at the rate of a large fp32 product of the BLAS. Shape legend:
kernels/interface.py.
"""

import argparse
from collections.abc import Sequence
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
from matrices import FORMATS, Matrix, bf16, num_bytes
from torch.nn.functional import linear, silu

from windlass.device.host_memory import HostAllocator
from windlass.kernels.cpu import library
from windlass.kernels.cpu.native import NativeKernels
from windlass.kernels.interface import AttentionOptions, AttentionWork, ExpertGroups
from windlass.kernels.reference import TorchKernels
from windlass.models.spec import SwiGlu
from windlass.tensors import PagedRows, StoredTensors, Tensors
from windlass.units import MIB, round_up

_COLD_BYTES = 256 * MIB  # of experts called in turn
_GROUP = 8  # experts of one call, as a layer has them
_NOTED_ROWS = 4  # of an expert: passes of so few are noted and repeated (runtime/capture.py)
_MEMORY_BOUND_ROWS = 8  # up to here, bytes per second say more than FLOPs
_PAGE_TOKENS = 32
_SEQUENCES = 32
_PROMPT = 512
_KV_TYPE = torch.bfloat16  # keys and values are kept in the checkpoint's type


@dataclass(frozen=True, slots=True)
class _Expert:
    """An expert's shape and the row counts to measure."""

    model: str
    hidden: int
    intermediate: int
    rows: tuple[int, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    def flops(self, rows: int) -> int:
        return 2 * 3 * self.hidden * self.intermediate * rows


_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_SMALL = _Expert("qwen3-moe-1b", 1024, 512, _ROWS)
_EXPERTS = (
    _SMALL,
    _Expert("qwen3-30b-a3b", 2048, 768, _ROWS),
    _Expert("olmoe-1b-7b", 2048, 1024, _ROWS),
    _Expert("mixtral-8x7b", 4096, 14336, (1, 4, 16, 128, 512)),
)
_QUICK_EXPERTS = (_Expert("qwen3-moe-1b", 1024, 512, (1, 16, 128)),)
_FORMAT_ROWS = (1, 4, 16, 64, 256)


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

Kernels = NativeKernels | TorchKernels


def _experts(shape: _Expert, make: Matrix) -> list[StoredTensors]:
    """Random experts, together larger than the caches."""
    made: list[StoredTensors] = []
    while not made or (len(made) + 1) * num_bytes(made[0]) <= max(
        _COLD_BYTES, _GROUP * num_bytes(made[0])
    ):
        expert = StoredTensors()
        expert.update({name: make(*size) for name, size in shape.shapes.items()})
        made.append(expert)
    return made


def _measure_group(
    kernels: Kernels, shape: _Expert, experts: Sequence[StoredTensors], rows: int
) -> float:
    """Seconds of one expert over `rows` rows, median."""
    group = min(_GROUP if rows <= 256 else 1, len(experts))
    x_TD = torch.randn(rows * group, shape.hidden)
    out = HostAllocator().empty(rows * group, shape.hidden)
    groups = ExpertGroups.even(group, rows)
    parts = [
        dict(enumerate(experts[i : i + group])) for i in range(0, len(experts) - group + 1, group)
    ]
    capture = kernels.capture(lambda: "experts") if rows <= _NOTED_ROWS else None

    def experts_of(part: int) -> bool:
        def compute() -> bool:
            kernels.experts(x_TD, parts[part], groups, SwiGlu(), out)
            return True

        return bool(capture.run(part, compute)) if capture else compute()

    for part in [*range(len(parts))] * 2:
        experts_of(part)  # structures of all experts are made once in a run
    turn = cycle(range(len(parts)))
    timing = measure(lambda: experts_of(next(turn)), repeats=15)
    assert experts_of(0), "calls of experts cannot be repeated"
    return timing.median_s / group


def _torch_ffn(x_ND: torch.Tensor, w: Tensors) -> torch.Tensor:
    gate, up, down = (w[name] for name in ("gate", "up", "down"))
    assert isinstance(gate, torch.Tensor) and isinstance(up, torch.Tensor)
    assert isinstance(down, torch.Tensor)
    return linear(silu(linear(x_ND, gate)) * linear(x_ND, up), down)


def _measure_torch(shape: _Expert, experts: Sequence[StoredTensors], rows: int) -> float:
    """The same by torch's own bf16 products."""
    turn, narrow = cycle(experts), torch.randn(rows, shape.hidden).bfloat16()
    return measure(lambda: _torch_ffn(narrow, next(turn)), repeats=7, limit_s=0.5).median_s


def _result(
    name: str, shape: _Expert, size: int, rows: int, seconds: float, rates: Rates
) -> dict[str, Any]:
    bandwidth_s = size / rates.read_bytes_per_s
    compute_s = shape.flops(rows) / rates.fp32_flops_per_s
    return {
        "format": name, "model": shape.model, "hidden": shape.hidden,
        "intermediate": shape.intermediate, "rows": rows, "seconds": seconds,
        "flops_per_s": shape.flops(rows) / seconds,
        "share_of_fp32_rate": compute_s / seconds,
        "stored_bytes_per_s": size / seconds,
        "share_of_read_rate": bandwidth_s / seconds,
        "bottleneck": "memory" if bandwidth_s > compute_s else "compute",
        "share_of_bound": max(bandwidth_s, compute_s) / seconds,
    }  # fmt: skip


def _cells(row: dict[str, Any]) -> list[str]:
    few, theirs = row["rows"] <= _MEMORY_BOUND_ROWS, row.get("torch_bf16_seconds")
    return [
        row["format"], row["model"], str(row["rows"]), f"{1e3 * row['seconds']:.3f}",
        f"{row['flops_per_s'] / 1e9:.0f}", f"{100 * row['share_of_fp32_rate']:.0f} %",
        f"{row['stored_bytes_per_s'] / 1e9:.1f}" if few else "",
        f"{100 * row['share_of_read_rate']:.0f} %" if few else "",
        f"{100 * row['share_of_bound']:.0f} % of {row['bottleneck']}",
        f"{theirs / row['seconds']:.1f} x" if theirs else "",
    ]  # fmt: skip


_HEAD = ("weights", "model", "rows", "ms", "GFLOP/s", "of fp32", "GB/s", "of read rate", "of bound",
         "against torch bf16")  # fmt: skip


def bench_experts(
    rates: Rates, exact: Kernels, rounded: Kernels, *, quick: bool
) -> list[dict[str, Any]]:
    """One expert by number of rows: bf16 weights, rows exact and rounded to bf16."""
    results = []
    for shape in _QUICK_EXPERTS if quick else _EXPERTS:
        experts = _experts(shape, bf16)
        size = num_bytes(experts[0])
        for rows in shape.rows:
            for name, kernels in (("bf16", exact), ("bf16, rows bf16", rounded)):
                seconds = _measure_group(kernels, shape, experts, rows)
                row = _result(name, shape, size, rows, seconds, rates)
                if kernels is rounded:  # the same arithmetic as torch's
                    row["torch_bf16_seconds"] = _measure_torch(shape, experts, rows)
                results.append(row)
    results.sort(key=lambda row: row["format"])
    print("\n" + table(_HEAD, [_cells(row) for row in results]))
    return results


def bench_formats(rates: Rates, exact: Kernels, *, quick: bool) -> list[dict[str, Any]]:
    """One expert in every format, exact rows."""
    results = []
    for name, make in FORMATS.items():
        experts = _experts(_SMALL, make)
        for rows in (1, 64) if quick else _FORMAT_ROWS:
            seconds = _measure_group(exact, _SMALL, experts, rows)
            results.append(_result(name, _SMALL, num_bytes(experts[0]), rows, seconds, rates))
    print("\n" + table(_HEAD, [_cells(row) for row in results]))
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


def _attention(kernels: Kernels, heads: _Heads, work: AttentionWork) -> Timing:
    keys, values = _stores(heads, sum(map(len, work.pages)))
    q_THd = torch.randn(sum(work.num_rows), heads.query, heads.dim)
    options = AttentionOptions(scale=heads.dim**-0.5, value_dim=heads.dim)
    return measure(lambda: kernels.attention(q_THd, keys, values, work, options))


def bench_decode(rates: Rates, kernels: Kernels, *, quick: bool) -> list[dict[str, Any]]:
    """One new token of each of 32 sequences over their keys and values."""
    results, cells = [], []
    for heads in _HEADS:
        for context in (128,) if quick else (128, 512, 2048):
            timing = _attention(kernels, heads, _work((context, 1), _SEQUENCES, is_prompt=False))
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


def bench_prefill(rates: Rates, kernels: Kernels) -> list[dict[str, Any]]:
    """All rows of one prompt. FLOPs of what the causal mask leaves."""
    results, cells = [], []
    for heads in _HEADS:
        timing = _attention(kernels, heads, _work((_PROMPT, _PROMPT), 1, is_prompt=True))
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


def _kernels(threads: int, instruction_set: str | None) -> tuple[Kernels, Kernels]:
    """Exact ones, and those that round rows to bf16."""
    found = library.load()
    if isinstance(found, str):
        print(f"the native library {found}: torch's kernels are measured")
        return TorchKernels(), TorchKernels(bf16_activations=True)
    if instruction_set is not None and found.wl_use(instruction_set.encode()):
        raise SystemExit(
            f"instruction set: got {instruction_set!r}, allowed"
            f" {', '.join(library.instruction_sets(found))} on this machine"
        )
    exact = NativeKernels(found, threads=threads)
    return exact, NativeKernels(found, threads=threads, bf16_activations=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rates of the CPU kernels on this machine.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--quick", action="store_true", help="a few shapes, some seconds")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    parser.add_argument("--instruction-set", metavar="NAME", help="default: the best")
    options = parser.parse_args()
    threads = set_threads(options.threads)
    torch.manual_seed(0)
    document: dict[str, Any] = {"bench": "kernels", **describe()}
    exact, rounded = _kernels(threads, options.instruction_set)
    found = library.load()
    document["instruction_set"] = "torch" if isinstance(found, str) else found.wl_in_use().decode()
    others = Others()
    with torch.inference_mode():
        rates = measure_rates(quick=options.quick)
        print(head(document, rates), f"instruction set {document['instruction_set']}", sep="\n")
        document["rates"] = rates.to_json()
        document["experts"] = bench_experts(rates, exact, rounded, quick=options.quick)
        document["formats"] = bench_formats(rates, exact, quick=options.quick)
        document["decode"] = bench_decode(rates, exact, quick=options.quick)
        document["prefill"] = bench_prefill(rates, exact)
    # again at the end: a difference says that something else ran meanwhile
    after = measure_rates(quick=options.quick)
    document["rates_after"] = after.to_json()
    document["others_cores"] = others.cores()
    print(
        f"\nat the end: fp32 product {after.fp32_flops_per_s / 1e9:.0f} GFLOP/s, read "
        f"{after.read_bytes_per_s / 1e9:.1f} GB/s; {document['others_cores']:.2f} cores busy with "
        "other processes"
    )
    write(document, options.json)


if __name__ == "__main__":
    main()

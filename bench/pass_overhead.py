"""What a pass of one sequence costs beside its waiting for weights, where experts are on disk.

    python bench/pass_overhead.py [--src OLD_SRC] [--rounds N] [--json FILE] [--large] [--dir DIR]

Two engines of the demo model in one process take turns, pass by pass, so that other work on the
machine meets both alike: one keeps all experts, the other 8 of 24 in each layer. A pass counts less
its waiting for weights. `--large` adds a random 1.3 B shape (2.7 GB, written to DIR or a temporary
folder) with a third of its experts in memory. *Python* is the processor time of the computing
thread outside the native library: what a busy machine changes least.
`--src` names the `src` folder of other code with its native library built; both then take turns,
the order turning from round to round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limits import run_bench
from machine import ROOT, Others, describe, table

from windlass.checkpoint.synthetic import preset, write_random_checkpoint

_PRESET = "qwen3-moe-1b"
_KERNELS = ("attention", "route", "shared", "experts", "combine", "head")


class _KernelTime:
    """Processor time that this thread spends in calls of the native library. On a busy machine it
    tells what seconds do not: a span also lasts while another program has the core."""

    def __init__(self) -> None:
        from windlass.kernels.cpu.native_capture import NativeCapture
        from windlass.kernels.cpu.session import Session

        self.seconds = 0.0
        for owner, name in ((NativeCapture, "run"), (Session, "call")):
            setattr(owner, name, self._timed(getattr(owner, name)))
        self._depth = 0

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **more: Any) -> Any:
            if self._depth:
                return call(*args, **more)
            self._depth = 1
            begin = time.thread_time()
            try:
                return call(*args, **more)
            finally:
                self.seconds += time.thread_time() - begin
                self._depth = 0

        return timed


class _Runner:
    """An engine with one sequence; what its passes took."""

    def __init__(self, model: str, cache: str | None, tokens: int, kernels: _KernelTime) -> None:
        from windlass.build.open import open_engine
        from windlass.engine.request import Request
        from windlass.options import EngineOptions
        from windlass.params import SamplingParams

        self._engine = open_engine(EngineOptions(model=model, moe_expert_cache_size=cache, seed=0))
        # drawn: the most likely tokens of a model soon repeat, and so do their experts
        params = SamplingParams(max_tokens=tokens, temperature=1.0, seed=1, ignore_eos=True)
        self._engine.add(Request("one", tuple(range(10, 42)), params, "one"))
        self.text: tuple[int, ...] = ()
        self._kernels = kernels
        # seconds, of these waited; of the processor, outside the native library
        self.passes: list[tuple[float, float, float]] = []

    def warm(self, passes: int) -> None:
        for _ in range(passes):
            self._engine.step()
        self._before = self._engine.stats()
        self._spans = dict(self._engine._tracer.seconds)

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def step(self) -> None:
        waited = self._engine.stats().wait_s
        begin, cpu, kernels = time.perf_counter(), time.thread_time(), self._kernels.seconds
        result = self._engine.step()
        cpu, seconds = time.thread_time() - cpu, time.perf_counter() - begin
        cpu -= self._kernels.seconds - kernels
        self.passes.append((seconds, self._engine.stats().wait_s - waited, cpu))
        for output in result.finished:
            self.text = tuple(output.outputs[0].token_ids)

    def result(self) -> dict[str, Any]:
        """Of a pass: milliseconds, medians and tenths of all passes; and what was read."""
        now, before, count = self._engine.stats(), self._before, len(self.passes)
        spans = self._engine._tracer.seconds
        own = sorted(1e3 * (seconds - waited) for seconds, waited, _ in self.passes)
        mean = 1e3 * sum(seconds for seconds, _, _ in self.passes) / count
        wait = 1e3 * sum(waited for _, waited, _ in self.passes) / count
        kernels = 1e3 * sum(spans[name] - self._spans.get(name, 0.0) for name in _KERNELS) / count
        hits = now.expert_hits - before.expert_hits
        found = {
            "less_wait_ms": statistics.median(own), "less_wait_tenth_ms": own[count // 10],
            "python_ms": statistics.median(1e3 * cpu for _, _, cpu in self.passes),
            "python_tenth_ms": sorted(1e3 * cpu for _, _, cpu in self.passes)[count // 10],
            "mean_ms": mean, "wait_ms": wait, "kernels_ms": kernels,
            "reads": (now.weights.reads - before.weights.reads) / count,
            "hits": hits / max(1, now.expert_requests - before.expert_requests),
            "text": hash(self.text),
        }  # fmt: skip
        self._engine.close()
        return found


def _measure(model: str, caches: list[str | None], tokens: int) -> dict[str, Any]:
    """All engines of `caches`, their passes in turn; the process's own answer."""
    kernels = _KernelTime()
    runners = [_Runner(model, cache, tokens, kernels) for cache in caches]
    for runner in runners:
        runner.warm(min(20, tokens // 3))
    while any(runner.has_work for runner in runners):
        for runner in runners:
            runner.step()
    return {str(cache): runner.result() for cache, runner in zip(caches, runners, strict=True)}


def _run(src: Path, model: str, caches: list[str | None], tokens: int) -> dict[str, Any]:
    others = Others()
    done = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps([model, caches, tokens])],
        env=os.environ | {"PYTHONPATH": str(src), "PYTHONHASHSEED": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{src}: failed: exit {done.returncode}\n{done.stderr}{done.stdout}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"others_cores": round(others.cores(), 2)}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Passes of one sequence, less their waiting.")
    add = parser.add_argument
    add("--src", type=Path, metavar="DIR", help="other code to take turns with: its src folder")
    add("--json", type=Path, metavar="FILE", help="also write the results here")
    add("--dir", type=Path, help="keeps the checkpoint (default: a folder deleted at the end)")
    add("--large", action="store_true", help="also the 1.3 B shape, from disk")
    add("--layers", type=int, default=24, metavar="N", help="of the large shape (default: 24)")
    add("--rounds", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    add("--tokens", type=int, default=300, metavar="N", help="of the answer (default: 300)")
    add("--quick", action="store_true", help="few tokens: says only that the script works")
    add("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.tokens = 1, 9
    return options


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All of it, with files in `folder`."""
    document: dict[str, Any] = {"bench": "pass_overhead", **describe()}
    sources = {"here": ROOT / "src"} | ({"other": options.src.resolve()} if options.src else {})
    jobs: list[tuple[str, str, list[str | None], int]] = [
        ("demo", "demo", ["8", None], options.tokens)
    ]
    if options.large:
        config = preset(_PRESET, num_layers=options.layers)
        model = folder / "model"
        if not (model / "config.json").exists():
            write_random_checkpoint(config, model, seed=0)
        third = str(config["num_experts"] // 3)
        jobs.append((_PRESET, str(model.resolve()), [third], max(9, options.tokens // 10)))
    runs: list[dict[str, Any]] = []
    for name, model_name, caches, tokens in jobs:
        for number in range(options.rounds):
            for code in list(sources)[:: 1 if number % 2 == 0 else -1]:
                found = _run(sources[code], model_name, caches, tokens)
                runs.append({"model": name, "code": code, "round": number, **found})
                print(f"  {name}, {code}: {_line(found)}", flush=True)
        texts = {
            one["text"] for run in runs if run["model"] == name
            for one in run.values() if isinstance(one, dict)
        }  # fmt: skip
        if len(texts) > 1:
            sys.exit(f"{name}: answers differ: a bug, nothing is written")
    rows = [_row(name, code, [r for r in runs if (r["model"], r["code"]) == (name, code)])
            for name, *_ in jobs for code in sources]  # fmt: skip
    heads = ("", "less waiting, ms", "all resident, ms", "ratio", "of tenths", "token, ms",
             "Python, ms")  # fmt: skip
    print("\n" + table(heads, rows))
    return document | {"runs": runs}


def _line(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{cache}: {one['mean_ms']:.2f} ms, {one['less_wait_ms']:.2f} less waiting,"
        f" {one['python_ms']:.2f} of the processor for Python"
        for cache, one in found.items()
        if isinstance(one, dict)
    )


def _row(name: str, code: str, runs: list[dict[str, Any]]) -> list[str]:
    few = next(cache for cache in runs[0] if cache.isdigit())

    def middle(cache: str, field: str) -> float:
        values: list[float] = [run[cache][field] for run in runs]
        return statistics.median(values)

    cells = [f"{name}, {code}", f"{middle(few, 'less_wait_ms'):.2f}", "", "", ""]
    if "None" in runs[0]:
        cells[2] = f"{middle('None', 'less_wait_ms'):.2f}"
        for i, field in enumerate(("less_wait_ms", "less_wait_tenth_ms"), start=3):
            cells[i] = f"{statistics.median(r[few][field] / r['None'][field] for r in runs):.2f}"
    return [*cells, f"{middle(few, 'mean_ms'):.1f}", f"{middle(few, 'python_ms'):.1f}"]


def main() -> None:
    options = _parse()
    if options.measure:
        print(json.dumps(_measure(*json.loads(options.measure))))
        return
    run_bench(options, bench)


if __name__ == "__main__":
    main()

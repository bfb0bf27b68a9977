"""One sequence after the other, with a third of the experts in memory: forecasts and policies, and
other code of the project, in turn and with equal answers.

    python bench/latency.py --model DIR --prompts FILE [--src OLD_SRC] [--forecasts NAME ...] ...

`--model`: a checkpoint with experts of real size, for instance a trained one with rows of zeros
(`bench/forecast_models.py`). `--prompts`: a batch file whose requests run one at a time. Each run
is a process of its own in a memory cgroup of its budget, with the page cache dropped before;
weights are read past the page cache. Runs take turns, the order turning from round to round.

*hits*: experts that were in memory when they were asked for. *waiting*: share of the passes' time
that waited for weights.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limits import run_bench, run_limited
from machine import ROOT, describe, table

from windlass.models.registry import read_spec
from windlass.models.spec import Moe
from windlass.options import read_config
from windlass.units import MIB, format_bytes

_PROCESS_BYTES = 300 * MIB  # Python, torch, activations and the KV cache
_KEPT = ("decode_throughput", "decode_time", "prefill_time", "load_time", "passes", "bytes_read",
         "expert_requests", "expert_hits", "weights_wait_time", "pass_time", "peak_rss_bytes",
         "prefetch_issued_bytes", "prefetch_used_bytes", "prefetch_late_bytes",
         "prefetch_cancelled_bytes")  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Code:
    """What is compared: code and its flags."""

    name: str
    src: Path
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Job:
    model: Path
    prompts: Path
    folder: Path
    slots: int
    budget: int


def _run(code: _Code, job: _Job) -> tuple[dict[str, Any], str]:
    """What a run said of itself, and its answers."""
    output = job.folder / "out.jsonl"
    command = [
        *("env", f"PYTHONPATH={code.src}", f"XDG_CACHE_HOME={job.folder}"),
        *(sys.executable, "-m", "windlass.cli", "run-batch", "--json", "--overwrite"),
        *("-m", str(job.model), "-i", str(job.prompts), "-o", str(output)),
        *("--max-num-seqs", "1", "--moe-expert-cache-size", str(job.slots)),
        *("--host-memory", f"{job.budget // MIB}MiB", "--no-enable-prefix-caching", *code.flags),
    ]
    ran = run_limited(command, job.budget)
    if ran.returncode:
        sys.exit(f"{code.name}: run-batch failed: exit {ran.returncode}\n{ran.stdout}")
    said = json.loads(ran.stdout.splitlines()[-1])
    row = {name: said[name] for name in _KEPT if name in said}
    row |= {
        "others_cores": round(ran.others_cores, 2),
        "cgroup_peak_bytes": ran.cgroup_peak_bytes,
        "cgroup_limit_hits": ran.cgroup_limit_hits,
    }
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return row, json.dumps([one["response"]["body"]["choices"] for one in rows])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One sequence, experts on disk.")
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR")
    add("--prompts", type=Path, required=True, metavar="FILE", help="a batch file")
    add("--num-prompts", type=int, default=8, metavar="N", help="of the file, spread (default: 8)")
    add("--resident", type=float, default=1 / 3, metavar="SHARE", help="default: a third")
    add("--src", type=Path, metavar="DIR", help="other code to take turns with: its src folder")
    add("--settings", nargs="+", default=["learned"], metavar="NAME[/POLICY]",
        help="forecasts, each perhaps with a policy (default: learned)")  # fmt: skip
    add("--rounds", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    add("--flag", action="append", default=[], metavar="FLAG", help="for all runs; repeatable")
    add("--json", type=Path, metavar="FILE", help="also write the results here")
    add("--dir", type=Path, help="for files (default: a folder deleted at the end)")
    return parser.parse_args()


def _codes(options: argparse.Namespace) -> list[_Code]:
    codes = []
    for setting in options.settings:
        forecast, _, policy = setting.partition("/")
        flags = [*options.flag, "--expert-usage", "off", "--expert-forecast", forecast]
        flags += ["--expert-cache-policy", policy] if policy else []
        codes.append(_Code(setting, ROOT / "src", tuple(flags)))
    if options.src:
        codes.append(_Code("other code", options.src.resolve(), tuple(options.flag)))
    return codes


def _job(options: argparse.Namespace, folder: Path) -> _Job:
    spec, _ = read_spec(read_config(options.model))
    moes = [block.ffn for block in spec.blocks if isinstance(block.ffn, Moe)]
    per_layer = round(options.resident * moes[0].num_experts)
    weights = sum(path.stat().st_size for path in options.model.glob("*.safetensors"))
    # of such models nearly all bytes are experts
    budget = _PROCESS_BYTES + int(weights * per_layer / moes[0].num_experts)
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    step = max(1, len(lines) // options.num_prompts)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(lines[::step][: options.num_prompts]) + "\n", encoding="utf-8")
    print(f"{options.model}: {per_layer} of {moes[0].num_experts} experts a layer, in"
          f" {format_bytes(budget)}", flush=True)  # fmt: skip
    return _Job(options.model.resolve(), prompts, folder.resolve(), per_layer, budget)


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All of it, with files in `folder`."""
    codes, job = _codes(options), _job(options, folder)
    runs: list[dict[str, Any]] = []
    answers: dict[str, str] = {}
    for number in range(options.rounds):
        for code in codes[:: 1 if number % 2 == 0 else -1]:
            row, answer = _run(code, job)
            answers.setdefault(answer, code.name)
            runs.append({"code": code.name, "round": number, **row})
            print(f"  {code.name}: {row['decode_throughput']:.2f} tokens/s", flush=True)
    if len(answers) > 1:
        sys.exit(f"other answers: {' and '.join(answers.values())}: nothing is written")
    medians = {
        code.name: _medians([run for run in runs if run["code"] == code.name]) for code in codes
    }
    heads = ("", "decoded tokens/s", "ratio", "hits", "read", "prefetched", "used", "waiting")
    print("\n" + table(heads, _cells(medians)))
    return {
        "bench": "latency", **describe(), "model": str(options.model), "slots": job.slots,
        "budget_bytes": job.budget, "num_prompts": options.num_prompts, "medians": medians,
        "runs": runs,
    }  # fmt: skip


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = (name for name in _KEPT if name in runs[0])
    return {name: statistics.median(run[name] for run in runs) for name in names}


def _cells(medians: dict[str, dict[str, float]]) -> list[list[str]]:
    base = list(medians.values())[-1]["decode_throughput"]
    return [
        [
            name,
            f"{one['decode_throughput']:.2f}",
            f"{one['decode_throughput'] / base:.2f}",
            f"{100 * one['expert_hits'] / one['expert_requests']:.1f} %",
            *(
                format_bytes(int(one.get(what, 0)))
                for what in ("bytes_read", "prefetch_issued_bytes", "prefetch_used_bytes")
            ),
            f"{100 * one['weights_wait_time'] / one['pass_time']:.0f} %",
        ]
        for name, one in medians.items()
    ]


def main() -> None:
    run_bench(_parse(), bench)


if __name__ == "__main__":
    main()

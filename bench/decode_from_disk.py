"""Decode of one sequence with most experts on disk, this code beside other code of the project.

    python bench/decode_from_disk.py [--src OLD_SRC] [--dir DIR] [--rounds N] [--json FILE] ...

Writes a random checkpoint of many small experts (48 layers of 128, 1.2 GB), and runs `windlass
run-batch` on one prompt, with room for a third of the experts beside the process and all else.
`--src` names the `src` folder of other code with its native library built; both then take turns,
the order turning from round to round, and must give the same answer. Weights are read past the page
cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from limits import run_bench
from machine import ROOT, Others, describe, table
from offload import Job

from windlass.checkpoint.synthetic import preset, write_random_checkpoint
from windlass.plan import Plan
from windlass.units import MIB, format_bytes, parse_bytes

_PROCESS_BYTES = 280 * MIB  # Python, torch and activations
_LEAST_BYTES = 384 * MIB
_NATIVE = Path("windlass/kernels/cpu/libwindlass_cpu.so")
_KEPT = ("decode_throughput", "decode_time", "prefill_time", "load_time", "passes", "bytes_read",
         "expert_requests", "expert_hits", "weights_wait_time", "peak_rss_bytes")  # fmt: skip


def _config(options: argparse.Namespace) -> dict[str, Any]:
    return preset("qwen3-moe-1b") | {
        "num_hidden_layers": options.layers, "num_experts": options.experts,
        "num_experts_per_tok": 8, "hidden_size": options.hidden, "vocab_size": 8192,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
        "moe_intermediate_size": options.intermediate,
    }  # fmt: skip


def _prepare(folder: Path, config: dict[str, Any], job: Job) -> int:
    """Writes checkpoint and job, or finds the checkpoint; bytes of its weights."""
    model = folder / "model"
    if not (model / "config.json").exists():
        print(f"{model}: writing the random checkpoint", flush=True)
        write_random_checkpoint(config, model, seed=0)
    found = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if any(found.get(key) != value for key, value in config.items()):
        sys.exit(f"{model}: holds another model; give another --dir")
    job.write(folder / "job.jsonl", config["vocab_size"])
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def _run(src: Path, folder: Path, flags: list[str]) -> tuple[dict[str, Any], str]:
    """What a run said of itself, and its answer."""
    output, others = folder / "out.jsonl", Others()
    done = subprocess.run(
        [*(sys.executable, "-m", "windlass.cli", "run-batch", "--json", "--overwrite"),
         *("-m", str(folder / "model"), "-i", str(folder / "job.jsonl"), "-o", str(output)),
         *flags],
        env=os.environ | {"PYTHONPATH": str(src)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{src}: run-batch failed: exit {done.returncode}\n{done.stderr}{done.stdout}")
    said = json.loads(done.stdout.splitlines()[-1])
    row = {name: said[name] for name in _KEPT if name in said}
    budget = Plan.from_json(said["plan"]).host.budget_bytes  # also of code whose plans were flat
    row |= {"host_memory": budget, "others_cores": round(others.cores(), 2)}
    body = json.loads(output.read_text(encoding="utf-8"))["response"]["body"]
    return row, json.dumps(body["choices"])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode with most experts on disk.")
    add = parser.add_argument
    add("--src", type=Path, metavar="DIR", help="other code to take turns with: its src folder")
    add("--json", type=Path, metavar="FILE", help="also write the results here")
    add("--dir", type=Path, help="keeps the checkpoint (default: a folder deleted at the end)")
    add("--layers", type=int, default=48, metavar="N", help="default: 48")
    add("--experts", type=int, default=128, metavar="N", help="of a layer (default: 128)")
    add("--hidden", type=int, default=256, metavar="N", help="default: 256")
    add("--intermediate", type=int, default=128, metavar="N", help="of an expert (default: 128)")
    add("--prompt-tokens", type=int, default=32, metavar="N", help="default: 32")
    add("--output-tokens", type=int, default=200, metavar="N", help="default: 200")
    add("--host-memory", metavar="SIZE", help="default: room for a third of the experts")
    add("--rounds", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    add("--quick", action="store_true", help="four layers of 32: says only that the script works")
    add("--flag", action="append", default=[], metavar="FLAG", help="for run-batch; repeatable")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.experts, options.rounds, options.output_tokens = 4, 32, 1, 8
    return options


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All of it, with files in `folder`."""
    sources = {"here": ROOT / "src"} | ({"other": options.src.resolve()} if options.src else {})
    lacking = [name for name, src in sources.items() if not (src / _NATIVE).exists()]
    if 0 < len(lacking) < len(sources):
        sys.exit(f"{sources[lacking[0]]}: no native library; build it there (`make native`)")
    document: dict[str, Any] = {"bench": "decode_from_disk", **describe()}
    config = _config(options)
    # drawn: the most likely tokens of a random model soon repeat, and so do their experts
    job = Job(1, options.prompt_tokens, options.output_tokens, temperature=1.0)
    size = _prepare(folder, config, job)
    wanted = options.host_memory
    experts = 2 * 3 * options.layers * options.experts * options.hidden * options.intermediate
    budget = max(_LEAST_BYTES, _PROCESS_BYTES + size - experts * 2 // 3)
    budget = parse_bytes(wanted) if wanted else budget
    flags = ["--host-memory", f"{budget // MIB}MiB", *options.flag]
    print(f"{options.layers} layers of {options.experts} experts, {format_bytes(size)},"
          f" in {format_bytes(budget)}", flush=True)  # fmt: skip
    runs: list[dict[str, Any]] = []
    answers = set()
    for number in range(options.rounds):
        for name in list(sources)[:: 1 if number % 2 == 0 else -1]:
            row, answer = _run(sources[name], folder.resolve(), flags)
            answers.add(answer)
            runs.append({"code": name, "round": number, **row})
            print(f"  {name}: {row['decode_throughput']:.2f} tokens/s", flush=True)
    if len(answers) > 1:
        sys.exit("the two give other answers: a bug, nothing is written")
    medians = {name: _medians([run for run in runs if run["code"] == name]) for name in sources}
    print("\n" + table(("", "decoded tokens/s", "ms a token", "experts found", "read"),
                       [_cells(name, one) for name, one in medians.items()]))  # fmt: skip
    if "other" in medians:
        document["here_over_other"] = (
            medians["here"]["decode_throughput"] / medians["other"]["decode_throughput"]
        )
        print(f"here over other: {document['here_over_other']:.2f}")
    return document | {
        "config": config, "checkpoint_bytes": size, "host_memory": budget,
        "prompt_tokens": options.prompt_tokens, "output_tokens": options.output_tokens,
        "medians": medians, "runs": runs,
    }  # fmt: skip


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    names = (name for name in _KEPT if name in runs[0])
    return {name: statistics.median(run[name] for run in runs) for name in names}


def _cells(name: str, one: dict[str, float]) -> list[str]:
    rate = one["decode_throughput"]
    hits = 100 * one["expert_hits"] / one["expert_requests"]
    return [name, f"{rate:.2f}", f"{1e3 / rate:.1f}", f"{hits:.0f} %",
            format_bytes(int(one["bytes_read"]))]  # fmt: skip


def main() -> None:
    run_bench(_parse(), bench)


if __name__ == "__main__":
    main()

"""A few sequences with most experts on disk: all in every pass, or one after the other in bursts.

    python bench/bursts.py --model DIR [--texts FILE ...] [--sequences N ...] [--bursts N ...] ...

`windlass run-batch` on the beginnings of as many texts as there are sequences, with room for a
share of the experts. The model should be a trained one: that a sequence routes alike from token to
token is what bursts live on. All settings of a number of sequences take turns, the order turning
from round to round, and must give the same answers. Weights are read past the page cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from limits import run_bench
from machine import ROOT, Others, describe, table

from windlass.options import read_config
from windlass.units import format_bytes

_TEXTS = sorted((ROOT / "bench" / "texts").iterdir())
_CHARACTERS = 200  # of a text
_KEPT = ("decode_throughput", "decode_time", "passes", "burst_passes", "bytes_read",
         "expert_requests", "expert_hits", "weights_wait_time")  # fmt: skip


def _write_job(path: Path, texts: list[Path], num: int, output_tokens: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i in range(num):
            text = texts[i % len(texts)].read_text(encoding="utf-8")
            first = i // len(texts) * _CHARACTERS
            body = {"prompt": text[first : first + _CHARACTERS], "max_tokens": output_tokens,
                    "temperature": 0.7, "top_p": 0.9, "seed": i, "ignore_eos": True}  # fmt: skip
            request = {"custom_id": str(i), "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps(request | {"body": body}) + "\n")


def _run(options: argparse.Namespace, folder: Path, num: int, burst: int | None) -> dict[str, Any]:
    """What a run said of itself, with its answers."""
    output, others = folder / "out.jsonl", Others()
    done = subprocess.run(
        [*(sys.executable, "-m", "windlass.cli", "run-batch", "--json", "--overwrite"),
         *("-m", str(options.model), "-i", str(folder / "job.jsonl"), "-o", str(output)),
         *("--max-num-seqs", str(num), "--moe-expert-cache-size", str(options.experts)),
         *(() if burst is None else ("--burst-tokens", str(burst))),
         *("--host-memory", options.host_memory, "--load-mode", "dio",
           "--expert-usage", "off", *options.flag)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"run-batch failed: exit {done.returncode}\n{done.stderr}{done.stdout}")
    said = json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return {
        "sequences": num, "burst_tokens": "planned" if burst is None else burst,
        "planned_burst_tokens": said["plan"]["burst_tokens"],
        **{name: said[name] for name in _KEPT}, "others_cores": round(others.cores(), 2),
        "answers": {row["custom_id"]: row["response"]["body"]["choices"] for row in rows},
    }  # fmt: skip


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All of it, with files in `folder`."""
    config = read_config(options.model)
    options.experts = options.experts or config["num_experts"] // 3
    runs: list[dict[str, Any]] = []
    for num in options.sequences:
        _write_job(folder / "job.jsonl", options.texts, num, options.output_tokens)
        answers: list[Any] = []
        settings: list[int | None] = [0, *options.bursts, None]
        for number in range(options.rounds):
            for burst in settings[:: 1 if number % 2 == 0 else -1]:
                row = _run(options, folder, num, burst)
                answers.append(row.pop("answers"))
                if answers[-1] != answers[0]:
                    sys.exit("two settings give other answers: a bug, nothing is written")
                runs.append({"round": number, **row})
                print(f"  {num} sequences, bursts {row['burst_tokens']}:"
                      f" {row['decode_throughput']:.2f} tokens/s", flush=True)  # fmt: skip
    medians = [
        _median([run for run in runs if (run["sequences"], run["burst_tokens"]) == key])
        for key in dict.fromkeys((run["sequences"], run["burst_tokens"]) for run in runs)
    ]
    lockstep = {one["sequences"]: one["decode_throughput"] for one in medians[:: len(settings)]}
    for one in medians:
        one["over_lockstep"] = one["decode_throughput"] / lockstep[one["sequences"]]
    head = ("sequences", "burst", "decoded tokens/s", "over lockstep", "experts found", "read")
    print("\n" + table(head, [_cells(one) for one in medians]))
    return {
        "bench": "bursts", **describe(), "model": {"name": options.model.name, **config},
        "experts_per_layer": options.experts, "output_tokens": options.output_tokens,
        "host_memory": options.host_memory, "medians": medians, "runs": runs,
    }  # fmt: skip


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = (*_KEPT, "others_cores")
    return {
        "sequences": runs[0]["sequences"], "burst_tokens": runs[0]["burst_tokens"],
        "planned_burst_tokens": runs[0]["planned_burst_tokens"],
        **{name: statistics.median(run[name] for run in runs) for name in names},
    }  # fmt: skip


def _cells(one: dict[str, Any]) -> list[str]:
    burst = one["burst_tokens"]
    return [
        str(one["sequences"]),
        f"planned: {one['planned_burst_tokens']}" if burst == "planned" else str(burst),
        f"{one['decode_throughput']:.2f}", f"{one['over_lockstep']:.2f}",
        f"{100 * one['expert_hits'] / one['expert_requests']:.0f} %",
        format_bytes(int(one["bytes_read"])),
    ]  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Few sequences, most experts on disk.")
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="a trained checkpoint")
    add("--texts", type=Path, nargs="+", default=_TEXTS, metavar="FILE", help="of the prompts")
    add("--sequences", type=int, nargs="+", default=[2, 4, 8], metavar="N", help="default: 2 4 8")
    add("--bursts", type=int, nargs="+", default=[16, 32], metavar="N", help="default: 16 32")
    add("--experts", type=int, metavar="N", help="resident, of a layer (default: a third)")
    add("--host-memory", default="1GiB", metavar="SIZE", help="default: 1GiB")
    add("--output-tokens", type=int, default=192, metavar="N", help="default: 192")
    add("--rounds", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    add("--json", type=Path, metavar="FILE", help="also write the results here")
    add("--dir", type=Path, help="keeps job and answers (default: a folder deleted at the end)")
    add("--quick", action="store_true", help="says only that the script works")
    add("--flag", action="append", default=[], metavar="FLAG", help="for run-batch; repeatable")
    options = parser.parse_args()
    if options.quick:
        options.sequences, options.bursts, options.rounds, options.output_tokens = [2], [4], 1, 12
    return options


def main() -> None:
    run_bench(_parse(), bench)


if __name__ == "__main__":
    main()

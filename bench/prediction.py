"""Predicted against measured: jobs through `windlass run-batch`, each in a process of its own.

    python bench/prediction.py --models DIR... [--json FILE] [--budgets SHARE...] [--quick]

`windlass doctor` measures the machine first, for each checkpoint. A budget is a share of the
weights' bytes, on top of what a process itself takes; 0 leaves it to the program. Lengths: prompt
tokens x output tokens x requests. The error is predicted / measured - 1, of the passes alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from limits import touch_memory
from machine import describe, head, measure_rates, table, write
from offload import Job

from windlass.options import read_config
from windlass.units import MIB

_LENGTHS = ((128, 16, 64), (32, 48, 48), (512, 4, 16), (128, 96, 1))
_PROCESS_BYTES = 600 * MIB  # Python, torch and the least activations
_HEAD = ("model", "budget MiB", "lengths", "predicted s", "took s", "error", "of the bound")


def _windlass(*arguments: object, timeout: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "windlass.cli", *map(str, arguments), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)}: {ran.returncode}\n{ran.stderr[-2000:]}")
    document: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return document


def _weights(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def _run(model: Path, budget: int, lengths: tuple[int, int, int], timeout: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        prompt, output, count = lengths
        vocab_size = read_config(model)["vocab_size"]
        Job(count, prompt, output).write(job, vocab_size)
        touch_memory()
        limit = ("--host-memory", f"{budget // MIB}MiB") if budget else ()
        document = _windlass(
            "run-batch", "-i", job, "-o", out, "-m", model, *limit,
            "--max-model-len", lengths[0] + lengths[1], timeout=timeout,
        )  # fmt: skip
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against measured.")
    add = parser.add_argument
    add("--models", nargs="+", type=Path, required=True, metavar="DIR")
    add("--budgets", nargs="+", type=float, default=[0.0, 0.5, 0.34], metavar="SHARE")
    add("--json", type=Path, metavar="FILE")
    add("--timeout", type=float, default=300.0, metavar="S")
    add("--quick", action="store_true", help="one budget, one length")
    options = parser.parse_args()
    rates = measure_rates(quick=True)
    description = {**describe(), "rates": rates.to_json()}
    print(head(description, rates))
    lengths = _LENGTHS[:1] if options.quick else _LENGTHS
    budgets = options.budgets[:1] if options.quick else options.budgets
    results: list[dict[str, Any]] = []
    for model in options.models:
        _windlass("doctor", "-m", model, timeout=options.timeout)
        for share in budgets:
            budget = int(share * _weights(model)) + _PROCESS_BYTES if share else 0
            for one in lengths:
                document = _run(model, budget, one, options.timeout)
                results.append(_row(document, model=model.name, budget=budget, lengths=one))
                print(_cells(results[-1]), flush=True)
    print(table(_HEAD, [_cells(one) for one in results]))
    write({"bench": "prediction", **description, "runs": results}, options.json)


def _row(document: dict[str, Any], **of_run: Any) -> dict[str, Any]:
    """What a summary of `run-batch` says of the prediction; phases by name and in all."""
    check = document["prediction"]
    phases = {
        name: {key: phase[key] for key in ("predicted_s", "measured_s", "error")}
        for name, phase in check["phases"].items()
    }
    return of_run | {"share_of_bound": check["share_of_bound"], "phases": phases}


def _cells(run: dict[str, Any]) -> list[str]:
    total = run["phases"]["total"]
    error = "-" if total["error"] is None else f"{100 * total['error']:+.0f} %"  # rates assumed
    lengths = " x ".join(map(str, run["lengths"]))
    return [
        run["model"], str(run["budget"] // MIB), lengths, f"{total['predicted_s']:.1f}",
        f"{total['measured_s']:.1f}", error,
        f"{100 * run['share_of_bound']:.0f} %",
    ]  # fmt: skip


if __name__ == "__main__":
    main()

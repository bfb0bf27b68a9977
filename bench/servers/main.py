"""`windlass serve` and llama-server, one after the other on the same machine: the same random
weights, all in memory, in formats of the same size; throughput and time to the first token with 1,
8 and 32 clients that each wait for their answers.

    python -m bench.servers --llama-server FILE [--clients 1 8 32] [--json FILE]

Loads come from `windlass bench serve`: the same random words, answers of a fixed length. The model
has the shape of a preset and the vocabulary of the demo model, so that both have a tokenizer.
Rounds take turns, the order turning from one to the next; told is the median. Nothing else may run
beside.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import ROOT, describe, table, to_text
from peers import models

from windlass.checkpoint.synthetic import preset
from windlass.options import resolve_model

_START_S, _STOP_S = 600.0, 60.0
_METRICS = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms")
_PYTHON = [sys.executable, "-m", "windlass.cli"]


@dataclass(frozen=True, slots=True)
class _Job:
    """Lengths in tokens; `rounds` of requests a client."""

    input_len: int
    output_len: int
    per_client: int


def _commands(args: argparse.Namespace, model: models.Model) -> dict[str, list[str]]:
    """How each server starts, but for its port."""
    most, tokens = max(args.clients), args.input_len + args.output_len + 64
    return {
        "windlass": [
            *_PYTHON, "serve", str(model.file("windlass", args.format)),
            "--max-num-seqs", str(most), "--max-model-len", str(tokens),
            "--threads", str(args.threads), "--expert-usage", "off", "--served-model-name", "model",
        ],
        "llama-server": [
            str(args.llama_server), "-m", str(model.file("llama.cpp", models.TWINS[args.format])),
            "-np", str(most), "-c", str(most * tokens), "-t", str(args.threads), "--no-webui",
        ],
    }  # fmt: skip


@contextmanager
def _running(command: Sequence[str]) -> Iterator[int]:
    """A server that has begun, and its port. `windlass bench serve` waits until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=said, stderr=said)
        try:
            yield port
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _load(port: int, clients: int, job: _Job, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        count = clients * job.per_client
        command = [
            *_PYTHON, "bench", "serve", "--port", str(port), "--num-prompts", str(count),
            "--random-input-len", str(job.input_len), "--random-output-len", str(job.output_len),
            "--ignore-eos", "--temperature", "0", "--max-concurrency", str(clients),
            "--num-warmups", "1", "--seed", str(seed), "--metric-percentiles", "50,99",
            "--ready-check-timeout-sec", str(_START_S), "--save-result", "--result-dir", folder,
            "--result-filename", "result.json",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    if found["total_output_tokens"] != count * job.output_len:
        sys.exit(f"answers have {found['total_output_tokens']} tokens, not {count} times"
                 f" {job.output_len}")  # fmt: skip
    return found


def _measure(
    commands: dict[str, list[str]], clients: Sequence[int], job: _Job, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """By server and clients: the median of each number."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for number in range(rounds):
        for name in list(commands)[:: -1 if number % 2 else 1]:
            with _running(commands[name]) as port:
                for count in clients:
                    result = _load(port, count, job, seed=number)
                    found.setdefault((name, count), []).append(result)
                    print(f"round {number + 1}: {name}, {count} clients:"
                          f" {result['output_throughput']:.1f} tok/s", flush=True)  # fmt: skip
    medians: dict[str, dict[str, dict[str, float]]] = {name: {} for name in commands}
    for (name, count), results in found.items():
        medians[name][str(count)] = {
            metric: statistics.median(result[metric] for result in results) for metric in _METRICS
        }
    return medians


def _prepare(args: argparse.Namespace) -> models.Model:
    """Writes the weights in both formats, with the demo's tokenizer, unless they are there."""
    demo = Path(resolve_model("demo"))
    vocabulary = json.loads((demo / "config.json").read_text())["vocab_size"]
    config = preset(args.model, num_layers=args.layers) | {"vocab_size": vocabulary}
    layers = config["num_hidden_layers"]
    model = models.Model(args.model, config, args.dir / f"{args.model}-{layers}-layers")
    models.prepare_checkpoint(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, model.checkpoint / name)
    for engine, form in (("windlass", args.format), ("llama.cpp", models.TWINS[args.format])):
        if engine == "llama.cpp" and args.llama_server is None:
            continue
        why = models.prepare(model, engine, form)
        if why is not None:
            sys.exit(why)
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--llama-server", type=Path, help="without it Windlass runs alone")
    parser.add_argument("--model", default="qwen3-moe-1b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--format", choices=list(models.TWINS), default="int8")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--per-client", type=int, default=4, help="requests")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dir", type=Path, default=ROOT / "out" / "servers")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    begin = time.monotonic()
    model = _prepare(args)
    commands = _commands(args, model)
    if args.llama_server is None:
        del commands["llama-server"]
    job = _Job(args.input_len, args.output_len, args.per_client)
    medians = _measure(commands, args.clients, job, args.rounds)
    rows = [
        [name, str(count), *(f"{values[metric]:.1f}" for metric in _METRICS)]
        for name, by_clients in medians.items()
        for count, values in by_clients.items()
    ]
    print(table(["server", "clients", *_METRICS], rows))
    if args.json is not None:
        settings = {name: str(value) for name, value in vars(args).items()}
        document = {**describe(), "seconds": time.monotonic() - begin, "settings": settings,
                    "config": model.config, "results": medians}  # fmt: skip
        args.json.write_text(to_text(document), encoding="utf-8")
    return 0

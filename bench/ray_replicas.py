"""Throughput of two replicas, each on a node that has one core, beside that of one: a job of the
demo model in turns, on a Ray cluster of this machine.

    make .venv-cluster/.installed
    PYTHONPATH=tests/support .venv-cluster/bin/python bench/ray_replicas.py --json FILE

The head node computes nothing; it and the driver run where there is time: on a machine of two cores
short answers measure the driver too. Of each round the ratio
is taken, of the rounds the median. Loading does not count.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe, to_text

from ray_nodes import Driver, RayNodes, write_rows

_MEMORY_MIB = 1024  # of each replica


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rounds: list[dict[int, float]] = []
    with tempfile.TemporaryDirectory(prefix="wr") as name:
        folder = Path(name)
        write_rows(folder, [_row(i, given.tokens) for i in range(given.rows)])
        (folder / "ray").mkdir()
        with RayNodes(folder / "ray") as nodes:
            nodes.start("head", cpus=0)
            for core in (0, 1):
                nodes.start(f"core{core}", before=["taskset", "-c", str(core)])
            _tokens_per_s(folder, nodes.address, 2)  # files are cached, workers have started once
            for _ in range(given.rounds):
                rounds.append({n: _tokens_per_s(folder, nodes.address, n) for n in (1, 2)})
                print(f"one {rounds[-1][1]:.1f} tokens/s, two {rounds[-1][2]:.1f}", flush=True)
    ratio = statistics.median(own[2] / own[1] for own in rounds)
    print(f"two replicas: {ratio:.2f} x one (median of {len(rounds)} rounds)")
    if given.json:
        document = {**describe(), "command": sys.argv, "rounds": rounds, "ratio": ratio}
        given.json.write_text(to_text(document))
    return 0


def _row(index: int, tokens: int) -> dict[str, Any]:
    body = {"prompt": f"Number {index}:", "max_tokens": tokens, "ignore_eos": True}
    return {
        "custom_id": f"r{index}", "method": "POST", "url": "/v1/completions", "body": body
    }  # fmt: skip


def _tokens_per_s(folder: Path, address: str, replicas: int) -> float:
    driver = Driver(
        folder, "--overwrite", "--json", "--threads", "1", "--max-num-seqs", "32",
        "--max-model-len", "256", "--host-memory", f"{_MEMORY_MIB * replicas}MiB",
        "--replicas", str(replicas), "--ray-address", address,
    )  # fmt: skip
    code, out = driver.wait()
    if code:
        raise SystemExit(driver.said())
    told = json.loads(out.splitlines()[-1])
    return float(told["total_output_tokens"] / told["elapsed_time"])


if __name__ == "__main__":
    sys.exit(main())

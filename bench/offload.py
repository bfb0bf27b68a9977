"""A batch job on a model larger than its memory budget, beside what disk and processor allow.

    python bench/offload.py [--json FILE] [--dir DIR] [--host-memory SIZE ...] [--quick] ...

Writes a random checkpoint and a job, measures the disk's rate with the reader of the engine and
nothing else to do, then runs `windlass run-batch` once per budget, inside a memory cgroup of
exactly that size where possible. The bound of a run is the larger of two times: the bytes it read
at the disk's rate, its FLOPs at the rate of a large fp32 product; all measured in this run.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limits import Ran, run_bench, run_limited
from machine import Rates, describe, head, measure_rates, set_threads, table
from spans import rows_histogram, totals

from windlass.checkpoint.part_reads import Read
from windlass.checkpoint.reader import Checkpoint
from windlass.checkpoint.synthetic import preset, write_random_checkpoint
from windlass.device.cpu import CpuDevice
from windlass.ids import DISK_TO_HOST
from windlass.models.registry import read_spec
from windlass.models.spec import ModelSpec
from windlass.perf.flops import block_flops_per_token, head_flops_per_token
from windlass.units import MIB, format_bytes, format_seconds, parse_bytes, round_up
from windlass.weights.io_queue import Priority
from windlass.weights.transfer import Carrier, TransferQueue, file_copies

_READ_THREADS = 4  # as planned by planner/budget.py; checked against the plan of each run
_STAGING_BYTES = 64 * MIB
_SEED = 0


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts of random token ids, of which the first are the same in all; answers of a fixed
    length, drawn from a seed where `temperature` is above 0."""

    prompts: int
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0
    temperature: float = 0.0

    def write(self, path: Path, vocab_size: int) -> None:
        draw = random.Random(_SEED)
        shared = [draw.randrange(vocab_size) for _ in range(self.shared_tokens)]
        own_tokens = self.prompt_tokens - self.shared_tokens
        with path.open("w", encoding="utf-8") as file:
            for i in range(self.prompts):
                ids = shared + [draw.randrange(vocab_size) for _ in range(own_tokens)]
                body = {"prompt": ids, "max_tokens": self.output_tokens,
                        "temperature": self.temperature, "ignore_eos": True}  # fmt: skip
                if self.temperature:
                    body["seed"] = _SEED + i
                request = {"custom_id": f"row-{i}", "method": "POST", "url": "/v1/completions"}
                file.write(json.dumps(request | {"body": body}) + "\n")

    def flops(self, spec: ModelSpec) -> int:
        """Of all rows; the last token of an answer is only sampled."""
        positions = range(self.prompt_tokens + self.output_tokens - 1)
        rows = sum(
            block_flops_per_token(spec, layer, context=position + 1)
            for position in positions
            for layer in range(len(spec.blocks))
        )
        return self.prompts * (rows + self.output_tokens * head_flops_per_token(spec))


@dataclass(frozen=True, slots=True)
class _Setting:
    """What all runs of one call share."""

    folder: Path
    job: Job
    threads: int
    flags: tuple[str, ...]  # handed on to run-batch
    trace: Path | None

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def job_file(self) -> Path:
        return self.folder / "job.jsonl"

    def config(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.model / "config.json").read_text())
        return document


def prepare(setting: _Setting, config: dict[str, Any]) -> int:
    """Writes checkpoint and job, or finds the checkpoint; bytes of its weights."""
    written = setting.model / "config.json"
    if not written.exists():
        write_random_checkpoint(config, setting.model, seed=_SEED)
    elif any(setting.config().get(key) != value for key, value in config.items()):
        sys.exit(f"{setting.model}: holds another model; give another --dir")
    setting.job.write(setting.job_file, config["vocab_size"])
    return sum(path.stat().st_size for path in setting.model.glob("*.safetensors"))


def measure_disk(folder: Path) -> float:
    """Seconds of reading the whole checkpoint, many blocks in flight, nothing else running."""
    source, device = Checkpoint(folder), CpuDevice(_READ_THREADS)
    queue = TransferQueue({DISK_TO_HOST: Carrier(device)})
    staging = device.allocate(_STAGING_BYTES)
    files = sorted({info.file for info in source.tensors.values()})
    left = 0

    def ended() -> None:
        nonlocal left
        left -= 1

    begin = time.perf_counter()
    with queue.changed:
        for file in files:
            size = round_up((folder / file).stat().st_size, 4096)
            for offset in range(0, size, _STAGING_BYTES):
                read = Read(file, offset, min(_STAGING_BYTES, size - offset), 0)
                left += 1
                copies = file_copies(source, [read], staging, file)
                queue.submit(copies, priority=Priority.DEMAND, on_done=ended)
        queue.wait(lambda: left == 0)
    seconds = time.perf_counter() - begin
    queue.close()
    device.close()
    source.close()
    return seconds


def run_job(setting: _Setting, budget: str) -> tuple[Ran, dict[str, Any], list[Any]]:
    """One run: what the system says of it, what it says itself, and its answers."""
    output = setting.folder / "out.jsonl"
    command = [
        *(sys.executable, "-m", "windlass.cli", "run-batch", "--json", "--overwrite"),
        *("--model", str(setting.model), "-i", str(setting.job_file), "-o", str(output)),
        *("--host-memory", budget, "--threads", str(setting.threads), *setting.flags),
        *(("--trace", str(setting.trace)) if setting.trace else ()),
    ]
    ran = run_limited(command, parse_bytes(budget))
    if ran.returncode:
        killed = ", killed: over the memory limit" if ran.returncode == -9 else ""
        sys.exit(f"run-batch with {budget} failed: exit {ran.returncode}{killed}\n{ran.stdout}")
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["request_counts"]["completed"] == setting.job.prompts, said
    assert said["plan"]["read_threads"] == _READ_THREADS, "the disk was measured otherwise"
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return ran, said, [row["response"]["body"]["choices"] for row in rows]


def judge(budget: str, ran: Ran, said: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """The run against `limits`: disk_bytes_per_s, fp32_flops_per_s, flops, model_bytes."""
    wall, computing = said["elapsed_time"], said["pass_time"] - said["weights_wait_time"]
    disk_s = said["bytes_read"] / limits["disk_bytes_per_s"]
    compute_s = limits["flops"] / limits["fp32_flops_per_s"]
    plan = said["plan"]
    rows = said["total_input_tokens"] + said["total_output_tokens"]
    return {
        "host_memory": budget,
        "budget_bytes": plan["tiers"]["host"]["budget_bytes"],
        "model_over_budget": limits["model_bytes"] / plan["tiers"]["host"]["budget_bytes"],
        "elapsed_s": wall,
        "load_s": said["load_time"],
        "tokens_per_s": rows / wall,
        "prompt_tokens_per_s": said["total_input_tokens"] / wall,
        "output_tokens_per_s": said["output_throughput"],
        "passes": said["passes"],
        "bytes_read": said["bytes_read"],
        "bytes_per_pass": said["bytes_read"] / said["passes"],
        "model_share_per_pass": said["bytes_read"] / said["passes"] / limits["model_bytes"],
        "disk_utilisation": disk_s / wall,
        "compute_share": computing / wall,
        "compute_flops_per_s": limits["flops"] / computing,
        "cores_busy": ran.cpu_s / (wall + said["load_time"]),
        "others_cores": ran.others_cores,
        "expert_hit_share": said["expert_hits"] / said["expert_requests"],
        "peak_rss_bytes": said["peak_rss_bytes"],
        "peak_rss_share": said["peak_rss_bytes"] / plan["tiers"]["host"]["budget_bytes"],
        "cgroup_version": ran.cgroup_version,
        "cgroup_peak_bytes": ran.cgroup_peak_bytes,
        "cgroup_limit_hits": ran.cgroup_limit_hits,
        "no_cgroup": ran.no_cgroup,
        "disk_bound_s": disk_s,
        "compute_bound_s": compute_s,
        "bound_s": max(disk_s, compute_s),
        "bottleneck": "disk" if disk_s > compute_s else "compute",
        "share_of_bound": max(disk_s, compute_s) / wall,
        "plan": plan,
    }


def show(runs: Sequence[dict[str, Any]]) -> str:
    """One column per run."""

    def line(name: str, form: str, key: str, scale: float = 1.0) -> list[str]:
        return [name, *("" if r[key] is None else form.format(r[key] * scale) for r in runs)]

    def sizes(name: str, key: str) -> list[str]:
        return [name, *("-" if r[key] is None else format_bytes(r[key]) for r in runs)]

    rows = [
        line("model / budget", "{:.1f}", "model_over_budget"),
        line("time, s", "{:.1f}", "elapsed_s"),
        line("tokens/s", "{:.1f}", "tokens_per_s"),
        line("  prompt", "{:.1f}", "prompt_tokens_per_s"),
        line("  output", "{:.2f}", "output_tokens_per_s"),
        ["sequences per pass", *(str(r["plan"]["max_num_seqs"]) for r in runs)],
        ["rows per pass", *(str(r["plan"]["max_num_batched_tokens"]) for r in runs)],
        line("passes", "{:.0f}", "passes"),
        sizes("read per pass", "bytes_per_pass"),
        line("  of the model", "{:.0f} %", "model_share_per_pass", 100),
        line("experts found in memory", "{:.1f} %", "expert_hit_share", 100),
        line("disk utilisation", "{:.0f} %", "disk_utilisation", 100),
        line("compute share", "{:.0f} %", "compute_share", 100),
        line("  its GFLOP/s", "{:.1f}", "compute_flops_per_s", 1e-9),
        line("cores busy", "{:.2f}", "cores_busy"),
        line("  by other processes", "{:.2f}", "others_cores"),
        sizes("peak RSS", "peak_rss_bytes"),
        line("  of the budget", "{:.1f} %", "peak_rss_share", 100),
        sizes("cgroup peak", "cgroup_peak_bytes"),
        line("bound: disk, s", "{:.1f}", "disk_bound_s"),
        line("bound: compute, s", "{:.1f}", "compute_bound_s"),
        ["what bottleneck", *(r["bottleneck"] for r in runs)],
        line("share of the bound", "{:.0f} %", "share_of_bound", 100),
    ]
    return table(["--host-memory", *(r["host_memory"] for r in runs)], rows)


def show_spans(trace: Path) -> list[dict[str, Any]]:
    """Prints and returns where the time of the last run went."""
    found = totals(trace)
    cells = [
        [f"{t.lane}: {t.name}", str(t.count), f"{t.seconds:.2f}",
         f"{1e3 * t.seconds / t.count:.2f}", str(t.rows or ""),
         format_bytes(t.num_bytes) if t.num_bytes else ""]
        for t in found
    ]  # fmt: skip
    print("\n" + table(("span", "count", "s", "ms each", "rows", "bytes"), cells))
    classes = rows_histogram(trace, "expert")
    cells = [[f"up to {top}", str(n), f"{s:.2f}"] for top, (n, s) in classes.items()]
    print("\n" + table(("rows of an expert", "count", "s"), cells))
    return [total.to_json() for total in found]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A batch job with too little memory.")
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="also write the results here")
    add("--dir", type=Path, help="keeps the checkpoint (default: a folder deleted at the end)")
    add("--host-memory", nargs="+", metavar="SIZE", help="budgets (default: 1GiB 2GiB)")
    add("--preset", default="olmoe-1b-7b", help="shape of the model (default: olmoe-1b-7b)")
    add("--num-layers", type=int, metavar="N", help="of the model (default: 5, some 4 GiB)")
    add("--prompts", type=int, metavar="N", help="default: 64")
    add("--prompt-tokens", type=int, metavar="N", help="default: 128")
    add("--output-tokens", type=int, metavar="N", help="default: 16")
    add("--repeats", type=int, default=1, metavar="N", help="runs per budget (default: 1)")
    add("--threads", type=int, metavar="N", help="of computation (default: all cores)")
    add("--trace", type=Path, metavar="FILE", help="trace the runs, sum up the last one's spans")
    add("--quick", action="store_true", help="one layer, few tokens: some seconds")
    add("--flag", action="append", default=[], metavar="FLAG", help="for run-batch; repeatable")
    options = parser.parse_args()
    quick = options.quick
    options.host_memory = options.host_memory or (["768MiB"] if quick else ["1GiB", "2GiB"])
    options.num_layers = options.num_layers or (1 if quick else 5)
    options.prompts = options.prompts or (4 if quick else 64)
    options.prompt_tokens = options.prompt_tokens or (16 if quick else 128)
    options.output_tokens = options.output_tokens or (3 if quick else 16)
    return options


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All of it, with files in `folder`."""
    threads = set_threads(options.threads)
    document: dict[str, Any] = {"bench": "offload", **describe()}
    config = preset(options.preset, num_layers=options.num_layers)
    job = Job(options.prompts, options.prompt_tokens, options.output_tokens)
    setting = _Setting(folder.resolve(), job, threads, tuple(options.flag), options.trace)
    model_bytes = prepare(setting, config)
    rates = measure_rates(quick=options.quick)
    print(head(document, rates))
    disk_s = [measure_disk(setting.model) for _ in range(2)]
    runs = [
        (budget, *run_job(setting, budget))
        for budget in options.host_memory
        for _ in range(options.repeats)
    ]
    disk_s += [measure_disk(setting.model) for _ in range(2)]
    if any(answers != runs[0][3] for *_, answers in runs):
        sys.exit("the budgets disagree in their answers: a bug, results are not written")
    limits = _limits(rates, model_bytes, disk_s, job.flops(read_spec(config)[0]))
    results = [judge(budget, ran, said, limits) for budget, ran, said, _ in runs]
    print(
        f"{options.preset}, {options.num_layers} layers, {format_bytes(model_bytes)}; "
        f"{job.prompts} prompts of {job.prompt_tokens} tokens, {job.output_tokens} out; disk "
        f"{limits['disk_bytes_per_s'] / 1e9:.2f} GB/s, the whole model in "
        f"{', '.join(map(format_seconds, disk_s))}"
    )
    if results[0]["no_cgroup"]:
        print(f"no memory cgroup, budgets were not enforced: {results[0]['no_cgroup']}")
    print("\n" + show(results))
    document |= {
        "rates": rates.to_json(), "disk_s": disk_s, "limits": limits,
        "model": {"preset": options.preset, "num_layers": options.num_layers},
        "job": {"prompts": job.prompts, "prompt_tokens": job.prompt_tokens,
                "output_tokens": job.output_tokens},
        "runs_with_equal_answers": len(runs), "runs": results,
    }  # fmt: skip
    if options.trace:
        document["spans"] = show_spans(options.trace)
    return document


def _limits(rates: Rates, model_bytes: int, disk_s: list[float], flops: int) -> dict[str, float]:
    return {
        "disk_bytes_per_s": model_bytes / statistics.median(disk_s),
        "fp32_flops_per_s": rates.fp32_flops_per_s,
        "flops": flops,
        "model_bytes": model_bytes,
    }


def main() -> None:
    run_bench(_parse(), bench)


if __name__ == "__main__":
    main()

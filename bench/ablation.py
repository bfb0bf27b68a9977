"""What each idea brings: one at a time is switched off, on the same model, job and budget.

    python bench/ablation.py [--json FILE] [--dir DIR] [--host-memory SIZE] [--grid] [--quick] ...

Each run is `windlass run-batch` in a memory cgroup of exactly the budget where one can be made,
with caches dropped before. Variants replay the plan of the first run with one value changed; those
of the model-based schedule are planned anew for it, with the same budget. Rounds alternate between
all variants; times are medians. Answers of all variants of a job must be equal. `--grid` compares
the planner's choice with settings by hand.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limits import run_bench, run_limited
from machine import describe, set_threads, table
from offload import Job

from windlass.checkpoint.synthetic import preset, write_random_checkpoint
from windlass.plan import Plan
from windlass.units import format_bytes, parse_bytes

_OF_A_PLAN = ("max_num_seqs", "max_num_batched_tokens", "schedule")
_BEST_OF_GRID = 3  # measured again, in turn with the planner's choice


@dataclass(frozen=True, slots=True)
class Variant:
    """One setting. `changes`: of the plan of the job's first run; None: planned anew by `flags`."""

    name: str
    changes: Mapping[str, Any] | None = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    job: str = "plain"


def variants(micro_batches: Sequence[int]) -> list[Variant]:
    """All ideas, each one missing, and none."""
    model_based = [
        Variant(
            f"model-based, micro-batches of {rows} rows",
            None,
            ("--schedule", "model-based", "--micro-batch-size", str(rows)),
        )
        for rows in micro_batches
    ]
    without_all = {"overlap": False, "mixed_prefill_tokens": 0, "prefix_caching": False,
                   "schedule": "model-based", "micro_batch_tokens": micro_batches[-1]}  # fmt: skip
    return [
        Variant("all"),
        *model_based,
        Variant("no overlap", {"overlap": False}),
        Variant("no direct I/O", flags=("--load-mode", "buffered")),
        Variant("separate prefill and decode passes", {"mixed_prefill_tokens": 0}),
        Variant("none of these", without_all, ("--load-mode", "buffered")),
        Variant("all, shared prefixes", job="shared"),
        Variant("no prefix sharing", {"prefix_caching": False}, job="shared"),
    ]


def grid(num_prompts: int) -> list[Variant]:
    """Settings as somebody would try them by hand: sequences, rows per pass, share of experts."""
    seqs = sorted({min(count, num_prompts) for count in (16, 32, 64, 128, 256)})
    return [
        Variant(f"by hand: {n} sequences, {rows} rows, {cache} experts", None, flags)
        for n, rows, cache in itertools.product(
            seqs, (512, 1024, 2048, 4096, 8192), ("auto", "64MiB")
        )
        if rows >= n + 64
        for flags in [("--max-num-seqs", str(n), "--max-num-batched-tokens", str(rows),
                       "--moe-expert-cache-size", cache)]
    ]  # fmt: skip


@dataclass(slots=True)
class Measured:
    """What came of the runs of a variant."""

    variant: Variant
    said: list[dict[str, Any]] = field(default_factory=list)  # summaries of run-batch
    cgroup_peaks: list[int | None] = field(default_factory=list)
    others_cores: list[float] = field(default_factory=list)  # busy with other processes meanwhile
    refused: str | None = None

    @property
    def seconds(self) -> float:
        """Of the job with loading, the median."""
        return statistics.median(one["elapsed_time"] + one["load_time"] for one in self.said)

    def to_json(self, reference_s: float | None) -> dict[str, Any]:
        """`slowdown`: times the reference's seconds."""
        own = {"name": self.variant.name, "job": self.variant.job, "flags": self.variant.flags,
               "changes": self.variant.changes, "refused": self.refused}  # fmt: skip
        if not self.said:
            return own
        median = {
            key: statistics.median(one[key] for one in self.said)
            for key in ("elapsed_time", "load_time", "prefill_time", "decode_time", "passes",
                        "bytes_read", "peak_rss_bytes", "total_token_throughput")
        }  # fmt: skip
        total = [one["phases"]["total"] for one in self.said]
        shares = {
            key: statistics.median(one[key] / one["seconds"] for one in total)
            for key in ("disk_s", "host_s", "wait_s", "other_s")
        }
        return {
            **own, "seconds": self.seconds, "runs": len(self.said), "median": median,
            "all_seconds": [one["elapsed_time"] + one["load_time"] for one in self.said],
            "slowdown": None if reference_s is None else self.seconds / reference_s,
            "share_of_pass_time": shares, "cgroup_peak_bytes": self.cgroup_peaks,
            "others_cores": self.others_cores,
            "plan": _of_plan(self.said[-1]["plan"]),
        }  # fmt: skip


def _of_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What tells plans of one job apart."""
    own = {key: plan[key] for key in _OF_A_PLAN}
    return own | {"expert_slots": plan["tiers"]["host"]["parts"]["expert"]["slots"]}


class Bench:
    """Model, jobs and the plans of their first runs, in one folder."""

    def __init__(
        self, folder: Path, jobs: Mapping[str, Job], *, budget: str, threads: int,
        flags: Sequence[str],
    ) -> None:  # fmt: skip
        self._folder = folder.resolve()
        self._jobs = jobs
        self._budget = budget
        self._threads = threads
        self._flags = flags
        self._plans: dict[str, dict[str, Any]] = {}
        self._answers: dict[str, list[Any]] = {}
        self.no_cgroup: str | None = None

    def prepare(self, config: dict[str, Any]) -> int:
        """Writes checkpoint and jobs, or finds the checkpoint; bytes of its weights."""
        model = self._folder / "model"
        if not (model / "config.json").exists():
            write_random_checkpoint(config, model, seed=0)
        found = json.loads((model / "config.json").read_text())
        if any(found.get(key) != value for key, value in config.items()):
            sys.exit(f"{model}: holds another model; give another --dir")
        for name, job in self._jobs.items():
            job.write(self._folder / f"{name}.jsonl", config["vocab_size"])
        return sum(path.stat().st_size for path in model.glob("*.safetensors"))

    def examine(self) -> None:
        """Measures the machine for the planner, with this model and these threads, or finds it
        measured."""
        command = (sys.executable, "-m", "windlass.cli", "doctor")
        threads = ("--threads", str(self._threads))
        subprocess.run(
            [*command, "--model", str(self._folder / "model"), *threads], check=True, stdout=2
        )

    def run(self, measured: Measured) -> None:
        """One run, added to `measured`. Ends the program where it fails or answers otherwise."""
        variant, output = measured.variant, self._folder / "out.jsonl"
        job = self._folder / f"{variant.job}.jsonl"
        command = [
            *(sys.executable, "-m", "windlass.cli", "run-batch", "--json", "--overwrite"),
            *("--model", str(self._folder / "model"), "-i", str(job), "-o", str(output)),
            *("--host-memory", self._budget, "--threads", str(self._threads), *self._flags),
            *variant.flags, *self._plan_flags(variant),
        ]  # fmt: skip
        ran = run_limited(command, parse_bytes(self._budget))
        said = json.loads(ran.stdout.splitlines()[-1]) if ran.stdout else {}
        error = said.get("error", "")
        if ran.returncode and error.startswith("host memory: got"):
            measured.refused = error
            return
        if ran.returncode:
            sys.exit(f"{variant.name}: run-batch failed: exit {ran.returncode}\n{ran.stdout}")
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        answers = [row["response"]["body"]["choices"] for row in rows]
        if answers != self._answers.setdefault(variant.job, answers):
            sys.exit(f"{variant.name}: other answers than before: a bug, nothing is written")
        self._plans.setdefault(variant.job, said["plan"])
        self.no_cgroup = ran.no_cgroup
        measured.said.append(said)
        measured.cgroup_peaks.append(ran.cgroup_peak_bytes)
        measured.others_cores.append(round(ran.others_cores, 2))

    def _plan_flags(self, variant: Variant) -> list[str]:
        plan = self._plans.get(variant.job)
        if plan is None or variant.changes is None:
            assert not variant.changes, "the first run of a job makes the plan"
            return []
        path = self._folder / "plan.json"
        path.write_text(json.dumps(changed(plan, variant.changes)))
        return ["--plan", str(path)]


def changed(plan: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The plan with other values; all of them must be known."""
    assert set(changes) <= set(plan), set(changes) - set(plan)
    return Plan.from_json({**plan, **changes}).to_json()


def turns(count: int, rounds: int) -> Iterator[int]:
    """Every variant once per round, each round beginning with another, the first with 0."""
    for number in range(rounds):
        yield from ((number + place) % count for place in range(count))


def measure_grid(bench: Bench, full: Measured, *, num_prompts: int, rounds: int) -> list[Measured]:
    """All settings once, then the best of them and the planner's choice in turn."""
    found = [Measured(variant) for variant in grid(num_prompts)]
    for measured in found:
        bench.run(measured)
        print(f"  {measured.variant.name}: {measured.refused or f'{measured.seconds:.1f} s'}")
    ran = sorted((one for one in found if one.said), key=lambda one: one.seconds)
    best = [full, *ran[:_BEST_OF_GRID]]
    for place in turns(len(best), rounds):
        bench.run(best[place])
    return found


def show(results: Sequence[Mapping[str, Any]]) -> str:
    def cells(one: Mapping[str, Any]) -> list[str]:
        if one["refused"]:
            return [one["name"], "does not fit", *[""] * 8]
        median, share = one["median"], one["share_of_pass_time"]
        return [
            one["name"], f"{one['seconds']:.1f}", f"{one['slowdown']:.2f}",
            f"{median['prefill_time']:.1f}", f"{median['decode_time']:.1f}",
            f"{median['passes']:.0f}", format_bytes(median["bytes_read"]),
            f"{100 * share['disk_s']:.0f}", f"{100 * share['host_s']:.0f}",
            f"{100 * share['wait_s']:.0f}",
        ]  # fmt: skip

    heads = ("", "s", "times all", "prefill s", "decode s", "passes", "read", "disk %",
             "compute %", "waiting %")  # fmt: skip
    return table(heads, [cells(one) for one in results])


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All of it, with files in `folder`."""
    document: dict[str, Any] = {"bench": "ablation", **describe()}
    plain = Job(options.prompts, options.prompt_tokens, options.output_tokens)
    shared = Job(options.prompts, options.prompt_tokens, options.output_tokens,
                 options.prompt_tokens * 3 // 4)  # fmt: skip
    setting = Bench(
        folder, {"plain": plain, "shared": shared}, budget=options.host_memory,
        threads=set_threads(options.threads), flags=options.flag,
    )  # fmt: skip
    model_bytes = setting.prepare(preset(options.preset, num_layers=options.num_layers))
    if not options.quick:
        setting.examine()
    print(f"{options.preset}, {options.num_layers} layers, {format_bytes(model_bytes)}, "
          f"{options.host_memory}; {plain}")  # fmt: skip
    found = [Measured(variant) for variant in variants(options.micro_batches)]
    for place in turns(len(found), options.rounds):
        setting.run(found[place])
        last = found[place].said[-1]["elapsed_time"] if found[place].said else 0.0
        print(f"  {found[place].variant.name}: {last:.1f} s", flush=True)
    by_hand: list[Measured] = []
    if options.grid:
        by_hand = measure_grid(
            setting, found[0], num_prompts=options.prompts, rounds=options.rounds
        )
    first = {one.variant.job: one.seconds for one in found if one.variant.name.startswith("all")}
    results = [one.to_json(first[one.variant.job]) for one in found]
    hand = [one.to_json(first["plain"]) for one in by_hand]
    print("\n" + show(results) + ("\n\n" + show(hand) if hand else ""))
    document |= {
        "model": {"preset": options.preset, "num_layers": options.num_layers,
                  "bytes": model_bytes},
        "job": {"prompts": options.prompts, "prompt_tokens": options.prompt_tokens,
                "output_tokens": options.output_tokens, "shared_tokens": shared.shared_tokens},
        "host_memory": options.host_memory, "rounds": options.rounds,
        "no_cgroup": setting.no_cgroup, "variants": results, "grid": hand,
    }  # fmt: skip
    if hand:
        document["planner_over_best_by_hand"] = first["plain"] / min(
            one["seconds"] for one in hand if not one["refused"]
        )
    return document


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What each idea brings.")
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="also write the results here")
    add("--dir", type=Path, help="keeps the checkpoint (default: a folder deleted at the end)")
    add("--host-memory", default="1GiB", metavar="SIZE", help="the budget (default: 1GiB)")
    add("--preset", default="olmoe-1b-7b", help="shape of the model (default: olmoe-1b-7b)")
    add("--num-layers", type=int, default=5, metavar="N", help="of the model (default: 5)")
    add("--prompts", type=int, default=128, metavar="N", help="default: 128")
    add("--prompt-tokens", type=int, default=128, metavar="N", help="default: 128")
    add("--output-tokens", type=int, default=16, metavar="N", help="default: 16")
    add("--micro-batches", type=int, nargs="+", default=[64, 256, 1024], metavar="ROWS",
        help="of the model-based schedule (default: 64 256 1024)")  # fmt: skip
    add("--rounds", type=int, default=3, metavar="N", help="runs of each variant (default: 3)")
    add("--threads", type=int, metavar="N", help="of computation (default: all cores)")
    add("--grid", action="store_true", help="also the planner's choice against settings by hand")
    add("--quick", action="store_true", help="one layer, few tokens, one round")
    add("--flag", action="append", default=[], metavar="FLAG", help="for run-batch; repeatable")
    options = parser.parse_args()
    if options.quick:
        options.num_layers, options.prompts, options.rounds = 1, 8, 1
        options.prompt_tokens, options.output_tokens, options.micro_batches = 100, 3, [64]
    return options


def main() -> None:
    run_bench(_parse(), bench)


if __name__ == "__main__":
    main()

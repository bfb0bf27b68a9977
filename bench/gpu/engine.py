"""Whole engines on a GPU, models of real shapes with random weights, larger than what they may take
of it: exactness, budgets, prediction, ablations.

    python bench/gpu/engine.py --size NAME --out FOLDER [--minutes 9] [--layers N] [--machine FILE]

From the source folder, nothing installed but torch for a GPU, its Triton and `tokenizers`. One line
per result, and FOLDER/NAME.json, whole after each. Verdicts: ok and FAIL of what must hold, met and
LOW of what is aimed at, -- of measurements, skipped with the reason. 1 at the end where one failed.
The GPU and its links are measured first; rates of the host are assumed, unless `--machine` names
what `windlass doctor --json` wrote (they decide how much attention the host gets).
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gpu.engine_runs import Place, Ran, Runs, Tokens
from gpu.few_rows import FewRows
from gpu.report import Report
from gpu.sizes import SIZES
from windlass.build.host_budget import default_budget
from windlass.device.cuda import cuda_index, why_none
from windlass.device.cuda_rates import find_cuda
from windlass.device.process_memory import available_bytes
from windlass.device.processors import default_threads
from windlass.doctor.device_rates import measure_device
from windlass.hardware.assumed import assumed_profile
from windlass.hardware.preset import load_machine
from windlass.hardware.profile import HardwareProfile
from windlass.kernels.cpu.library import load
from windlass.kernels.select_device import choose_device_kernels
from windlass.plan import Plan
from windlass.units import parse_bytes
from windlass.version import VERSION

_OF_BOUND = 0.85
_MODULE_OVER_MODEL = 8.0


class EngineBench:
    """The checks of one size; each opens its own engines."""

    def __init__(self, runs: Runs, report: Report) -> None:
        self._runs, self._report = runs, report
        self._plan: Plan | None = None  # the planner's
        self._answers: dict[float, tuple[str, Tokens]] = {}  # of a run, by share of host attention
        self._rates: dict[str, float] = {}  # tokens decoded by second

    def checks(self) -> list[tuple[str, Callable[[], None]]]:
        """In the order of their worth."""
        few = FewRows(self._runs, self._report)
        less = self._runs.size.device_memory * 4 // 5
        variants: list[tuple[str, dict[str, Any]]] = [
            ("one group", {}),
            ("two groups", {"groups": 2}),
            ("host attention 0.5", {"host_attention": 0.5}),
            ("host attention 0.5, two groups", {"host_attention": 0.5, "groups": 2}),
            ("keys and values in RAM", {"kv_offloading_share": 1.0}),
            ("no prefetch beside computation", {"overlap": False}),
            ("four fifths of the device memory", {"device_memory": less}),
        ]
        made = {name: partial(self.variant, name, **changes) for name, changes in variants}
        return [
            ("as planned", self.planned),
            ("one group", made.pop("one group")),
            ("model-based", self.model_based),
            ("one row", few.one_row),
            ("one sequence", few.one_sequence),
            ("a worker that fails", few.failing_worker),
            *made.items(),
        ]

    def planned(self) -> None:
        """The planner's choice: beside its prediction, its bound and its budget."""
        with self._runs.planned() as engine:
            self._plan = engine.plan
            for line in (*engine.plan.lines(), *engine.notes):
                print("  ", line, flush=True)
            self._report.about["plan"] = engine.plan.to_json()
            ran = self._runs.run(engine, self._runs.requests(), self._runs.workload())
        self._compare("as planned", ran)
        found = ran.predicted
        assert found is not None, "nothing was predicted"
        total = found["phases"]["total"]
        self._report.add(
            "prediction", passed=None, predicted_s=total["predicted_s"], took_s=total["measured_s"],
            error=total["error"], rates_assumed=found["rates_assumed"], phases=found["phases"],
        )  # fmt: skip
        self._report.aim("share of the bound", got=found["share_of_bound"], wanted=_OF_BOUND,
                         shares=total["shares_of_bound"])  # fmt: skip

    def variant(
        self, name: str, *, count: int | None = None, overlap: bool = True, **changes: Any
    ) -> None:
        """The job, or its first `count` requests, by a plan with one thing changed."""
        assert self._plan is not None, "the planner's plan comes first"
        if changes.get("groups", 1) > 1:  # two micro-batches of decoded rows at least
            rows = max(64, self._plan.max_num_seqs // changes["groups"])
            changes["micro_batch_tokens"] = rows
        plan = replace(self._runs.plan(self._plan, **changes), overlap=overlap)
        memory = {k: v for k, v in changes.items() if k == "device_memory"}
        with self._runs.replayed(plan, **memory) as engine:
            ran = self._runs.run(engine, self._runs.requests(count))
        self._compare(name, ran)

    def model_based(self) -> None:
        """Each micro-batch through all layers by itself, as offloading does without MoE-Gen's
        schedule. Its rate does not depend on how many micro-batches there are."""
        rows = self._runs.size.micro_batch
        self.variant("model-based", count=rows, schedule="model-based", micro_batch_tokens=rows)
        name = "one group" if "one group" in self._rates else "as planned"
        times = self._rates[name] / self._rates["model-based"]
        self._report.aim("module-based over model-based, decoding", got=times,
                         wanted=_MODULE_OVER_MODEL, micro_batch=rows,
                         sequences=self._runs.size.sequences, module_based=name)  # fmt: skip

    def _compare(self, name: str, ran: Ran) -> None:
        """With the answers of other runs that have as much of their attention on the host."""
        share = ran.plan.host_attention
        first, known = self._answers.setdefault(share, (name, ran.tokens))
        self._rates[name] = ran.decode_rate
        self._report.add(
            f"{name}: tokens", requests=len(ran.tokens), host_attention=share,
            passed=all(known.get(one) == tokens for one, tokens in ran.tokens.items()),
            compared_with="none before it" if first == name else first,
        )  # fmt: skip
        self._report.add(f"{name}: memory within its budget", passed=ran.keeps_budget,
                         **ran.numbers)  # fmt: skip


def _profile(args: argparse.Namespace) -> tuple[HardwareProfile, Mapping[str, str]]:
    """Of this machine, and what each part of it comes from."""
    if args.machine is not None:
        return load_machine(args.machine), {"rates": args.machine}
    gpu = find_cuda(args.device)
    assert gpu is not None, "found at the start"
    bf16 = args.dtype == "bfloat16"
    kernels = choose_device_kernels(
        "auto", gpu.device, capability=gpu.capability, bf16_activations=bf16
    )
    with torch.inference_mode():
        found = measure_device(gpu, kernels=kernels)
    torch.cuda.empty_cache()  # what is kept there counts as taken
    host = assumed_profile(threads=default_threads(), memory_bytes=available_bytes())
    profile = replace(
        host, name=gpu.name, source="measured", device=found.processor, down=found.down,
        up=found.up, spread=found.spread,
    )  # fmt: skip
    return profile, {"rates": "the GPU and its links measured, the host and the disk assumed"}


def _host_kernels() -> str:
    """What attends on the host: "native", or why torch's slower ones do."""
    found = load()
    return found if isinstance(found, str) else "native"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whole engines on a GPU.")
    add = parser.add_argument
    add("--size", required=True, choices=SIZES)
    add("--out", type=Path, required=True, help="folder of NAME.json and of settings")
    add("--minutes", type=float, default=9.0, help="no check begins that would end later")
    add("--layers", type=int, help="fewer, in as much less of the GPU")
    add("--host-memory", metavar="SIZE", help="default: what is there, less a share")
    add("--device", default="cuda")
    add("--dtype", default="bfloat16", choices=("bfloat16", "auto"), help="of rows in products")
    add("--machine", metavar="NAME|FILE", help="its rates, not measured")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"bench/gpu/engine.py: skipped: {why_none()}")
        return 0
    size = SIZES[args.size] if args.layers is None else SIZES[args.size].with_layers(args.layers)
    args.out.mkdir(parents=True, exist_ok=True)
    memory = default_budget() if args.host_memory is None else parse_bytes(args.host_memory)
    about: dict[str, Any] = {
        "bench": "gpu/engine", "size": size.name, "layers": size.layers, "version": VERSION,
        "machine": torch.cuda.get_device_name(cuda_index(args.device)), "torch": torch.__version__,
        "triton": find_spec("triton") is not None, "host_kernels": _host_kernels(),
        "device_memory": size.device_memory, "host_memory": memory, "dtype": args.dtype,
        "sequences": size.sequences,
        "prompt_tokens": size.prompt_tokens, "output_tokens": size.output_tokens,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    report = Report(args.out / f"{size.name}.json", about, minutes=args.minutes)
    begin = time.monotonic()
    profile, sources = _profile(args)
    about.update(sources)
    report.add("rates", passed=None, measured_s=time.monotonic() - begin, **sources,
               profile=profile.to_json())  # fmt: skip
    place = Place(folder=args.out, device=args.device, dtype=args.dtype, host_memory=memory,
                  profile=profile)  # fmt: skip
    return report.run(EngineBench(Runs(size, place), report).checks())


if __name__ == "__main__":
    sys.exit(main())

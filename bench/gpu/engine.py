"""Whole engines on a GPU, models of real shapes with random weights, larger than what they may take
of it: exactness, budgets, prediction, ablations.

    python bench/gpu/engine.py --size NAME --out FOLDER [--minutes 9] [--layers N] [--machine FILE]

From the source folder, nothing installed but torch for a GPU, its Triton and `tokenizers`. One line
per result, and FOLDER/NAME.json, whole after each. Verdicts: ok and FAIL of what must hold, met and
LOW of what is aimed at, -- of measurements, skipped with the reason. 1 at the end where one failed.
The profile is measured here: the GPU and its links; of the host nothing but its number of threads is
known, unless `--machine` names what `windlass doctor --json` wrote (its host rates decide how much
attention the host gets).
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

from gpu.engine_runs import Place, Ran, Runs, Tokens, run_all
from gpu.report import Report
from gpu.sizes import SIZES
from windlass.build.open import default_budget
from windlass.device.cuda import cuda_index, why_none
from windlass.device.cuda_rates import find_cuda
from windlass.device.host_memory import available_bytes
from windlass.device.lane import Lane
from windlass.device.processors import default_threads
from windlass.doctor.device_rates import measure_device
from windlass.engine.engine import Engine
from windlass.hardware.assumed import assumed_profile
from windlass.hardware.preset import load_machine
from windlass.hardware.profile import HardwareProfile
from windlass.ids import Part
from windlass.kernels.select_device import choose_device_kernels
from windlass.models.spec import Moe
from windlass.plan import Plan
from windlass.replay.routing_trace import read_trace
from windlass.replay.run import ratio_machine
from windlass.replay.study import NamedMachine, StudyWishes, study
from windlass.replay.trace_file import Trace
from windlass.units import parse_bytes
from windlass.version import VERSION

_OF_BOUND = 0.85
_MODULE_OVER_MODEL = 8.0
_OF_ORACLE = 1 / 1.3
_ERROR_S = 1.0


class EngineBench:
    """The checks of one size; each opens its own engines."""

    def __init__(self, runs: Runs, report: Report) -> None:
        self._runs, self._report = runs, report
        self._plan: Plan | None = None  # the planner's
        self._answers: dict[float, tuple[str, Tokens]] = {}  # of a run, by share of host attention
        self._rates: dict[str, float] = {}  # tokens decoded by second
        self._layer_s = 0.0  # one row, all weights on the device

    def checks(self) -> list[tuple[str, Callable[[], None]]]:
        """In the order of their worth."""
        less = self._runs.size.device_memory * 4 // 5
        variants: list[tuple[str, dict[str, Any]]] = [
            ("one group", {}),
            ("two groups", {"groups": 2}),
            ("host attention 0.5", {"host_attention": 0.5}),
            ("host attention 0.5, two groups", {"host_attention": 0.5, "groups": 2}),
            ("no prefetch beside computation", {"overlap": False}),
            ("four fifths of the device memory", {"device_memory": less}),
        ]
        made = {name: partial(self.variant, name, **changes) for name, changes in variants}
        return [
            ("as planned", self.planned),
            ("one group", made.pop("one group")),
            ("model-based", self.model_based),
            ("one row", self.one_row),
            ("one sequence", self.one_sequence),
            ("a worker that fails", self.failing_worker),
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

    # --- one row ----------------------------------------------------------------------------------

    def one_row(self) -> None:
        """What a layer takes for one row with all weights on the device, and what of that is not
        reading its weights: launches and Python. By the difference of two numbers of layers."""
        few, more = self._runs.size.few_layers
        (short_s, _), (long_s, engine_plan) = (self._row_s(layers) for layers in (few, more))
        self._layer_s = (long_s - short_s) / (more - few)
        host, device = engine_plan.host, self._runs.place.profile.device
        assert device is not None, "a profile without a device"
        moved = (host.of(Part.BLOCK).slot_bytes or 0) + self._top_k * self._expert_bytes
        least = moved / device.memory_rate
        self._report.add(
            "launches at one row", passed=None, layer_us=1e6 * self._layer_s,
            reading_us=1e6 * least, other_us=1e6 * (self._layer_s - least),
            beside_layers_us=1e6 * (short_s - few * self._layer_s),
        )  # fmt: skip

    def _row_s(self, layers: int) -> tuple[float, Plan]:
        """The quickest of some passes of one row through so many layers."""
        runs, folder = self._runs, self._runs.size.folder(self._runs.place.folder, layers)
        whole = runs.options(model=str(folder), device_memory=None, max_num_seqs=1,
                             max_model_len=self._one_len, moe_expert_cache_size=None)  # fmt: skip
        with runs.open(whole) as engine:
            above = engine.plan.above
            assert above is not None and above.of(Part.EXPERT).slots == above.of(
                Part.EXPERT
            ).num_parts, f"{layers} layers do not fit the device"
            run_all(engine, runs.requests(1))
            for one in runs.requests(1, output_tokens=runs.size.one_tokens):
                engine.add(one)
            took = []
            while engine.has_work:
                begin = time.perf_counter()
                engine.step()
                took.append(time.perf_counter() - begin)
            return min(took), engine.plan

    def one_sequence(self) -> None:
        """One sequence in the size's share of the device, beside an oracle that knows all routing
        and has the same link. Weights are random, and so is the routing."""
        runs = self._runs
        path = runs.place.folder / f"{runs.size.name}.trace"
        path.unlink(missing_ok=True)
        alone = runs.options(max_num_seqs=1, max_model_len=self._one_len, routing_trace=path)
        with runs.open(alone) as engine:
            requests = runs.requests(1, output_tokens=runs.size.one_tokens)
            ran = runs.run(engine, requests)
            above = engine.plan.above
        assert above is not None, "a plan without the device"
        decode = ran.phases["decode"]
        token_s = decode.seconds / decode.passes
        experts = above.of(Part.EXPERT)
        share = experts.slots / (experts.num_parts or 1)
        numbers = {**ran.numbers, "token_ms": 1e3 * token_s, "resident": share}
        self._report.add("one sequence: memory within its budget", passed=ran.keeps_budget,
                         **numbers)  # fmt: skip
        if not self._layer_s:
            self._report.skip("one sequence: oracle", "what a layer takes was not measured")
            return
        rho = self._top_k * self._expert_bytes / ran.link_rate / self._layer_s
        trace = read_trace(Trace(path))
        machine = NamedMachine("this", rho, partial(ratio_machine, trace, rho=rho))
        found = study(trace, StudyWishes(
            forecasts=(), policies=(), resident=(share,), machines=(machine,), sees=(None,),
            with_recall=False,
        ))  # fmt: skip
        oracle_s = found.runs[0].metrics.token_s * self._layer_s
        self._report.aim("one sequence: oracle over it", got=oracle_s / token_s, wanted=_OF_ORACLE,
                         oracle_ms=1e3 * oracle_s, rho=rho)  # fmt: skip

    # --- errors -----------------------------------------------------------------------------------

    def failing_worker(self) -> None:
        """A copy that raises is an error of the pass that waits for it, and the engine closes."""
        runs, raised = self._runs, []
        folder = runs.size.folder(runs.place.folder, runs.size.few_layers[1])
        few = runs.options(model=str(folder), device_memory=None, max_num_seqs=1,
                           max_model_len=self._one_len,
                           moe_expert_cache_size=str(self._top_k))  # fmt: skip
        real = Lane._steps

        def steps(self: Lane, *args: Any) -> Any:
            raised.append(time.perf_counter())
            raise RuntimeError("the copy engine is gone")

        with runs.open(few) as engine:
            run_all(engine, runs.requests(1))
            Lane._steps = steps  # type: ignore[method-assign]
            try:
                error = _error_of(engine, runs)
                after_s = time.perf_counter() - raised[0] if raised else float("nan")
            finally:
                Lane._steps = real  # type: ignore[method-assign]
        passed = error == "the copy engine is gone" and after_s < _ERROR_S
        self._report.add("a worker that fails", passed=passed, error=error, after_s=after_s)

    # --- of the model -----------------------------------------------------------------------------

    @property
    def _top_k(self) -> int:
        return self._moe.top_k

    @property
    def _moe(self) -> Moe:
        problem = self._runs.problem
        assert problem is not None, "the planner's plan comes first"
        return next(b.ffn for b in problem.spec.blocks if isinstance(b.ffn, Moe))

    @property
    def _expert_bytes(self) -> int:
        problem = self._runs.problem
        assert problem is not None, "the planner's plan comes first"
        return problem.sizes.slot_bytes[Part.EXPERT]

    @property
    def _one_len(self) -> int:
        """Tokens of the longest request."""
        size = self._runs.size
        return size.prompt_tokens + max(size.one_tokens, size.output_tokens)


def _error_of(engine: Engine, runs: Runs) -> str:
    """What running a request raises."""
    try:
        run_all(engine, runs.requests(1))
    except RuntimeError as error:
        return str(error)
    return "none"


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
        "triton": find_spec("triton") is not None, "device_memory": size.device_memory,
        "host_memory": memory, "dtype": args.dtype, "sequences": size.sequences,
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

"""`windlass plan`: what a run would do and how long it would take, before anything is loaded."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.cli.engine_flags import CONFIG_FLAG, ENGINE_FLAGS, engine_options, say_line
from windlass.cli.flags import Command, Flag, integer
from windlass.doctor.kept import cache_folder
from windlass.errors import UsageError
from windlass.hub.locate import locate
from windlass.options import AUTO, CPU, EngineOptions, default_params, resolve_model
from windlass.units import MIB

if TYPE_CHECKING:
    from windlass.checkpoint.folder import CheckpointFolder
    from windlass.hardware.profile import HardwareProfile, Processor
    from windlass.perf.sizes import Sizes
    from windlass.planner.one_sequence import OneSequence
    from windlass.replay.routing_trace import RoutingTrace
    from windlass.workload import Workload

_JOB, _MACHINE = "workload", "machine"
# Flags of an engine that say nothing about a plan that is yet to be made
_WITHOUT = (
    "plan", "trace", "routing-trace", "routing-trace-inputs", "expert-cache-policy",
    "expert-map-store", "load-format", "generation-config",
)  # fmt: skip
_PROMPT, _OUTPUT, _REQUESTS = 512, 128, 256
# Of a GPU: its share of memory by default, and what CUDA takes of it and of the host [assumed]
_DEVICE_SHARE, _CONTEXT_BYTES, _LIBRARY_BYTES = 0.9, 512 * MIB, 1024 * MIB
_SHARE = 0.8  # of the memory of a machine that is not this one (MoE-Lightning, artifact)
FLAGS = (
    Flag(name="workload", aliases=("-i",), read=Path, metavar="FILE", group=_JOB,
         help="a file of OpenAI batch requests: their own lengths are planned for"),
    Flag(name="prompt-len", read=integer(1), metavar="N", group=_JOB,
         help=f"tokens of every prompt instead (default {_PROMPT})"),
    Flag(name="output-len", read=integer(1), metavar="N", group=_JOB,
         help=f"tokens of every answer (default {_OUTPUT})"),
    Flag(name="num-requests", read=integer(1), metavar="N", group=_JOB,
         help=f"requests (default {_REQUESTS})"),
    Flag(name="machine", aliases=("--hardware",), metavar="NAME|FILE", group=_MACHINE,
         help="plan for a machine one does not have: a preset (a wrong name lists them), a .toml "
         "file like theirs, or what `windlass doctor --json` printed elsewhere (default: this "
         "machine, measured once)"),
    Flag(name="replay", read=Path, metavar="FILE", group=_JOB,
         help="what --routing-trace of an earlier run of this model wrote: how much memory for how "
         "many tokens/s, one answer at a time"),
    Flag(name="json", read=None, default=False, group="records",
         help="print one line of JSON instead"),
    *(flag for flag in ENGINE_FLAGS if flag.name not in _WITHOUT),
    CONFIG_FLAG,
)  # fmt: skip


def run(values: Mapping[str, Any], arguments: Sequence[str]) -> int:
    _check(values)
    from windlass.build.checkpoint_sizes import sizes_of, wanted_of
    from windlass.checkpoint.folder import read_model
    from windlass.perf.sizes import Problem
    from windlass.planner.constraints import check_constraints
    from windlass.planner.explain import explain
    from windlass.planner.one_sequence import one_sequence

    with ExitStack() as opened:
        trace = None if values["replay"] is None else _trace(values["replay"])
        options, measured = options_to_plan(values, opened)
        model = read_model(options, opened)
        wanted = wanted_of(options, model)
        check_constraints(wanted, model.spec)  # before the machine is measured
        profile, backend = machine_to_plan(values, options, model, measured)
        sizes = sizes_of(model, options, backend)
        workload = _workload(values, options, model)
        budget = _budget(values, profile)
        sizes = _with_device(sizes, model, profile, options)
        found = explain(Problem(model.spec, sizes, profile), workload, budget, wanted)
        single = None
        if trace is not None:
            problem = Problem(model.spec, sizes, profile)
            single = one_sequence(
                trace,
                problem,
                lambda text: say_line(f"plan: {text}"),
                read_threads=found.best.plan.read_threads,
                forecast=options.expert_forecast,
            )
        if values["json"]:
            print(json.dumps(found.to_json() | _named(single)))
        else:
            print("\n".join([*found.lines(), *([] if single is None else ["", *single.lines()])]))
    return 0


def _trace(path: Path) -> "RoutingTrace":
    from windlass.replay.routing_trace import read_trace
    from windlass.replay.trace_file import Trace

    return read_trace(Trace(path), with_states=True)


def _named(single: "OneSequence | None") -> dict[str, Any]:
    return {} if single is None else {"one_sequence": single.to_json()}


def _check(values: Mapping[str, Any]) -> None:
    """What can be refused before anything heavy is imported."""
    lengths = [name for name in ("prompt_len", "output_len", "num_requests") if values[name]]
    if values["workload"] is not None and lengths:
        name = lengths[0].replace("_", "-")
        raise UsageError(f"--{name}: not beside --workload, whose own lengths are planned for")
    if values["machine"] is None:
        from windlass.build.host_budget import check_budget

        check_budget(values["host_memory"])


def options_to_plan(
    values: Mapping[str, Any], opened: ExitStack
) -> tuple[EngineOptions, Path | None]:
    """The engine to plan for, and its checkpoint where weights are here. Of a configuration without
    weights, an engine of random ones; of weights on the hub, one whose files have headers alone."""
    defaults = {flag.key: flag.default for flag in ENGINE_FLAGS if flag.name in _WITHOUT}
    named = engine_options({**values, **defaults})
    located = locate(named, with_tokenizer=values["workload"] is not None)
    options = located.options
    if located.snapshot is not None:
        headers = opened.enter_context(tempfile.TemporaryDirectory(prefix="windlass-plan-"))
        options = located.with_headers(Path(headers), say_line)
        if options.model == headers:
            # holes say nothing of a disk, and may lie where direct reads are refused
            return replace(options, load_mode="buffered"), None
    folder = resolve_model(options.model)
    if any(folder.glob("*.safetensors")):
        return options, folder
    return replace(options, load_format="dummy"), None


def machine_to_plan(
    values: Mapping[str, Any],
    options: EngineOptions,
    model: "CheckpointFolder",
    measured: Path | None,
) -> tuple["HardwareProfile", Any]:
    """The machine to plan for, and the kernels that it runs."""
    from windlass.build.checkpoint_sizes import useful_threads
    from windlass.kernels.cpu import library
    from windlass.perf.sizes import Backend

    if values["machine"] is not None:
        from windlass.hardware.preset import in_fp32, load_machine

        profile = _on_device(load_machine(values["machine"]), options)
        if not profile.captured and options.dtype != "bfloat16":
            profile = in_fp32(profile)
        return profile, Backend("cpu", options.threads or profile.threads)
    from windlass.device.cuda import cuda_index
    from windlass.doctor.examine import Subject, examine

    if cuda_index(options.device) is None and options.device_memory is not None:
        raise UsageError("--device-memory: this machine has no GPU, allowed with one")
    subject = Subject(
        cache=cache_folder(),
        model=measured,
        device=options.device,
        threads=options.threads,
        moe_backend=options.moe_backend,
        dtype=options.dtype,
        load_mode=values["load_mode"],
    )
    report = examine(subject, tell=lambda text: say_line(f"plan: {text}"))
    if report.noise is not None:
        say_line(f"plan: {report.noise}")
    has_native = not isinstance(library.load(), str) and options.moe_backend != "torch"
    threads = options.threads or useful_threads(model)
    return _on_device(report.profile, options), Backend("cpu" if has_native else "torch", threads)


def _on_device(profile: "HardwareProfile", options: EngineOptions) -> "HardwareProfile":
    """The machine without its GPU, where the CPU is to compute alone."""
    if options.device == CPU:
        return replace(profile, device=None, down=None, up=None)
    if profile.device is None and (options.device != AUTO or options.device_memory is not None):
        name = "device" if options.device != AUTO else "device-memory"
        raise UsageError(f"--{name}: {profile.name} has no GPU, allowed with one")
    return profile


def _with_device(
    sizes: "Sizes", model: "CheckpointFolder", profile: "HardwareProfile", options: EngineOptions
) -> "Sizes":
    """The sizes, with those of the machine's GPU where it has one. What its context takes, and the
    host's libraries for it, is only known where it runs."""
    from windlass.build.checkpoint_sizes import device_sizes

    if profile.device is None:
        return sizes
    if options.device_memory is not None:
        _check_has(profile, "device_memory", options.device_memory, profile.device)
    memory = options.device_memory or int(_DEVICE_SHARE * profile.device.memory_bytes)
    backend = "torch" if options.moe_backend == "torch" else "triton"
    device = device_sizes(model, budget_bytes=memory, process_bytes=_CONTEXT_BYTES, backend=backend)
    return replace(sizes, device=device, process_bytes=sizes.process_bytes + _LIBRARY_BYTES)


def _check_has(machine: "HardwareProfile", name: str, wanted: int, own: "Processor") -> None:
    """UsageError where more is to be taken of a memory than the machine has."""
    from windlass.build.host_budget import too_much

    if wanted > own.memory_bytes:
        whose = f"all that the machine has, {machine.name}"
        raise too_much(name, wanted, own.memory_bytes, whose)


def _budget(values: Mapping[str, Any], profile: "HardwareProfile") -> int:
    if values["host_memory"] is not None:
        if values["machine"] is not None:
            _check_has(profile, "host_memory", values["host_memory"], profile.host)
        return int(values["host_memory"])
    if values["machine"] is not None:
        return int(_SHARE * profile.host.memory_bytes)
    from windlass.build.host_budget import default_budget

    return default_budget()


def _workload(
    values: Mapping[str, Any], options: EngineOptions, model: "CheckpointFolder"
) -> "Workload":
    from windlass.workload import Workload

    if values["workload"] is None:
        return Workload.from_lengths(
            values["prompt_len"] or _PROMPT,
            values["output_len"] or _OUTPUT,
            values["num_requests"] or _REQUESTS,
        )
    from windlass.batch.prompt_lengths import file_lengths
    from windlass.engine.tokenizer import load

    folder = resolve_model(options.tokenizer) if options.tokenizer else model.folder
    tokenizer = load(folder, model_folder=model.folder)
    longest = options.max_model_len or model.spec.max_positions
    params = default_params(model.folder, options)
    return file_lengths(values["workload"], tokenizer, longest, params)


COMMAND = Command(
    name="plan",
    help="Say what a run would hold, read and take, and why, before anything is loaded.",
    flags=FLAGS,
    run=run,
)

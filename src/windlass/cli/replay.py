"""`windlass replay`: what other forecasts, policies, sizes and links would have made of the routing
that a run recorded."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.cli.engine_flags import CONFIG_FLAG, ENGINE_FLAGS, MODEL_NAMES, say_line
from windlass.cli.flags import Command, Flag, choice, integer, number, several, share
from windlass.cli.plan_command import machine_to_plan, options_to_plan
from windlass.errors import UsageError
from windlass.files import replace_file
from windlass.options import EXPERT_CACHE_POLICIES, EXPERT_FORECASTS
from windlass.units import counted

if TYPE_CHECKING:
    from windlass.perf.sizes import Problem
    from windlass.replay.routing_trace import RoutingTrace
    from windlass.replay.study import NamedMachine

_WHAT, _WHERE = "what is tried", "machine"
_EVERYTHING, _THIS, _OFF = "all", "this", "off"
_RHO = (4.0,)


def _positive(text: str) -> float:
    value = number(text)
    if not 0 < value < 1e6:
        raise UsageError(f"value: got {text!r}, allowed a number above 0")
    return value


def _sees(text: str) -> int | None:
    return None if text == _EVERYTHING else integer(1)(text)


FLAGS = (
    Flag(name="expert-forecast", read=several(choice(*EXPERT_FORECASTS)), default=(_OFF, "usage"),
         metavar="NAMES", group=_WHAT,
         help=f"who expects uses, with commas between them: {', '.join(EXPERT_FORECASTS)} (default:"
         f" {_OFF},usage). {_OFF}: nothing is read ahead, what is kept goes by usage"),
    Flag(name="expert-cache-policy", read=several(choice(*EXPERT_CACHE_POLICIES)),
         default=("next-use", "lfru"), metavar="NAMES", group=_WHAT,
         help=f"who is given up: {', '.join(EXPERT_CACHE_POLICIES)} (default: next-use,lfru). lru,"
         " lfu, lfru and mrs give each layer its share, all others are one pool"),
    Flag(name="resident", read=several(share), default=(0.2, 0.33, 0.5), metavar="SHARES",
         group=_WHAT, help="experts in memory, of all (default: 20%,33%,50%)"),
    Flag(name="oracle", read=several(_sees), default=(1, None), metavar="LAYERS", group=_WHAT,
         help="references that know the routing of so many layers ahead, or all, and use the same"
         " link (default: 1,all)"),
    Flag(name="max-num-seqs", aliases=("-np",), read=integer(1), metavar="N", group=_WHAT,
         help="compose the passes anew: so many sequences at a time, one token of each per pass"
         " (default: the passes that were recorded)"),
    Flag(name="passes", read=integer(1), metavar="N", group=_WHAT,
         help="the first N passes alone (10,000 passes of 6 layers take about half a minute for"
         " each combination)"),
    Flag(name="guard", read=None, default=True, group=_WHAT,
         help="leave out reading ahead while it does not pay, as the engine does (default: on)"),
    Flag(name="prompts", read=Path, metavar="FILE", group=_WHAT,
         help="the job that was recorded: what its custom_ids begin with, up to the first -, is the"
         " domain of each sequence, and recovery after a change is measured"),
    Flag(name="rho", read=several(_positive), default=_RHO, metavar="NUMBERS", group=_WHERE,
         help="machines by ratio: what the link takes for the experts of a token, over what their"
         " layer takes to compute (default: 4; a disk of 3 GB/s beside a CPU: 10 to 15)"),
    Flag(name="machine", metavar="NAME|FILE", group=_WHERE,
         help="a machine with a profile instead, as `windlass plan` takes it, or this for this one;"
         " needs --model"),
    Flag(name="model", aliases=MODEL_NAMES, metavar="DIR|ORG/NAME", group=_WHERE,
         help="the checkpoint that was recorded, for --machine"),
    Flag(name="json", read=Path, metavar="FILE", group="records", help="write one JSON document"),
    Flag(name="page", read=Path, metavar="FILE", group="records",
         help="write one HTML page with plots"),
    CONFIG_FLAG,
)  # fmt: skip


def run(values: Mapping[str, Any], arguments: Sequence[str]) -> int:
    if values["file"] is None:
        raise UsageError("FILE is missing: a trace that --routing-trace wrote")
    if (values["machine"] is None) != (values["model"] is None):
        raise UsageError("--machine: allowed together with --model")
    if values["rho"] != _RHO and values["machine"] is not None:
        raise UsageError("--rho: allowed without --machine, which says what the link takes")
    _check_files(values)
    from windlass.replay.page import page
    from windlass.replay.study import StudyWishes, study

    trace = _trace(values)
    wishes = StudyWishes(
        forecasts=values["expert_forecast"],
        policies=values["expert_cache_policy"],
        resident=values["resident"],
        machines=_machines(values, trace),
        sees=values["oracle"],
        guards=values["guard"],
        domains=None if values["prompts"] is None else _domains(values["prompts"]),
    )
    found = study(trace, wishes, tell=lambda text: say_line(f"replay: {text}"))
    print("\n".join(found.lines()))
    if values["json"] is not None:
        _write(values["json"], json.dumps(found.to_json()) + "\n")
    if values["page"] is not None:
        _write(values["page"], page(found, f"Replay of {values['file'].name}"))
    return 0


def _check_files(values: Mapping[str, Any]) -> None:
    """Nothing that is read is written over, and nothing twice; found before anything runs."""
    read = {Path(values[name]).resolve() for name in ("file", "prompts") if values[name]}
    for name in ("json", "page"):
        path = values[name]
        if path is None:
            continue
        if path.resolve() in read:
            raise UsageError(f"--{name}: got {str(path)!r}, which another option names")
        read.add(path.resolve())
        if not path.absolute().parent.is_dir():
            raise UsageError(f"--{name}: got {str(path)!r}: there is no such folder")


def _trace(values: Mapping[str, Any]) -> "RoutingTrace":
    from windlass.forecast.registry import WITH_STATES
    from windlass.replay.routing_trace import read_trace
    from windlass.replay.trace_file import Trace

    file = Trace(values["file"])
    if file.cut_bytes:
        say_line(
            f"replay: {values['file']}: the last {counted(file.cut_bytes, 'byte')} of it make no"
            f" whole pass"
        )
    trace = read_trace(file, with_states=not set(WITH_STATES).isdisjoint(values["expert_forecast"]))
    if values["max_num_seqs"] is not None:
        trace = trace.lockstep(values["max_num_seqs"])
    return trace.first(values["passes"])


def _machines(values: Mapping[str, Any], trace: "RoutingTrace") -> list["NamedMachine"]:
    from windlass.replay.run import ratio_machine
    from windlass.replay.study import NamedMachine

    if values["machine"] is None:
        return [
            NamedMachine(f"rho {rho:g}", rho, partial(ratio_machine, trace, rho=rho))
            for rho in values["rho"]
        ]  # fmt: skip
    from windlass.planner.budget import READ_THREADS
    from windlass.replay.machine import check_model, profiled_machine

    with ExitStack() as opened:
        problem = _problem(values, opened)
    check_model(trace, problem, values["model"])
    return [
        NamedMachine(
            problem.profile.name, None,
            partial(profiled_machine, problem, read_threads=READ_THREADS),
        )
    ]  # fmt: skip


def _problem(values: Mapping[str, Any], opened: ExitStack) -> "Problem":
    """The model and the machine that are named."""
    from windlass.build.checkpoint_sizes import sizes_of
    from windlass.checkpoint.folder import read_model
    from windlass.perf.sizes import Problem

    named = {
        **{flag.key: flag.default for flag in ENGINE_FLAGS}, "model": values["model"],
        "workload": None, "device_memory": None,
        "machine": None if values["machine"] == _THIS else values["machine"],
    }  # fmt: skip
    options, measured = options_to_plan(named, opened)
    model = read_model(options, opened)
    profile, backend = machine_to_plan(named, options, model, measured)
    return Problem(model.spec, sizes_of(model, options, backend), profile)


def _domains(path: Path) -> dict[int, str]:
    """By number of sequence: that of its line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return {i: json.loads(line)["custom_id"].partition("-")[0] for i, line in enumerate(lines)}
    except OSError as error:
        raise UsageError(f"--prompts: {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--prompts: {path}: not a batch job: {error!r}") from error


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


COMMAND = Command(
    name="replay",
    help="Try forecasts, cache policies and sizes on the routing that a run recorded.",
    flags=FLAGS,
    run=run,
    positional=Flag(name="file", read=Path, metavar="FILE", help="what --routing-trace wrote"),
)

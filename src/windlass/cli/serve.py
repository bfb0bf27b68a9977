"""`windlass serve`: an OpenAI-compatible server of one model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass import __version__
from windlass.cli.engine_flags import CONFIG_FLAG, ENGINE_FLAGS, engine_options, say_line
from windlass.cli.flags import Command, Flag, integer, number, size
from windlass.cli.job_identity import job_identity
from windlass.cli.parser_flags import PARSER_FLAGS
from windlass.cli.summary import plan_lines
from windlass.doctor.kept import cache_folder, kept_profile, with_kept_usage
from windlass.errors import UsageError
from windlass.hub.locate import locate
from windlass.options import AUTO, CPU, EngineOptions, model_name, resolve_model
from windlass.units import GIB, MIB, counted, format_bytes

if TYPE_CHECKING:
    from windlass.batch.job_options import JobOptions
    from windlass.engine.engine import Engine
    from windlass.plan import Plan
    from windlass.server.data_folder import DataFolder
    from windlass.server.state import Loaded

_SERVER = "server"


def _seconds(text: str) -> float:
    """At least 0; -1 for never."""
    value = number(text)
    if value < 0 and value != -1:
        raise UsageError(f"value: got {text}, allowed 0 or more, or -1 for never")
    return value


def _ping(text: str) -> float:
    """From 0.1 on: comments sooner than that would be most of what is sent; -1 for none."""
    value = number(text)
    if value < 0.1 and value != -1:
        raise UsageError(f"value: got {text}, allowed 0.1 or more, or -1 for none")
    return value


def _port(text: str) -> int:
    value = integer(0)(text)
    if value > 65535:
        raise UsageError(f"value: got {text}, allowed 0 to 65535")
    return value


MODEL = Flag(name="checkpoint", metavar="MODEL", help="the model, as --model has it")
FLAGS = (
    Flag(name="host", metavar="ADDRESS", default="127.0.0.1", group=_SERVER,
         help="where to listen: 127.0.0.1, this machine alone (default), or 0.0.0.0, all networks: "
         "without --api-key whoever reaches it may ask"),
    Flag(name="port", read=_port, metavar="N", default=8000, group=_SERVER,
         help="default 8000; 0: any that is free"),
    Flag(name="api-key", metavar="KEY", group=_SERVER,
         help="what clients must send as a bearer token; several with commas"),
    Flag(name="served-model-name", aliases=("-a", "--alias"), metavar="NAME", group=_SERVER,
         help="the name requests may use and answers carry; several with commas (default: the "
         "model's)"),
    Flag(name="sse-ping-interval", read=_ping, metavar="S", default=15.0, group=_SERVER,
         help="seconds of silence after which a stream gets a comment, so that clients do not give "
         "up while a long prompt is read (default 15; -1: none)"),
    Flag(name="max-requests", read=integer(1), metavar="N", default=256, group=_SERVER,
         help="requests under way or waiting; more get status 429 (default 256)"),
    Flag(name="max-body-size", read=size, metavar="SIZE", default=64 * MIB, group=_SERVER,
         help="longest request (default 64MiB)"),
    Flag(name="request-timeout", read=_seconds, metavar="S", default=-1.0, group=_SERVER,
         help="seconds that an answer may take, waiting included, before it ends with an error "
         "(default -1: for ever)"),
    Flag(name="shutdown-timeout", read=_seconds, metavar="S", default=30.0, group=_SERVER,
         help="seconds that answers get to end after SIGTERM (default 30)"),
    Flag(name="data-dir", read=Path, metavar="DIR", group=_SERVER,
         help="where /v1/files and /v1/batches keep what they have; a server that is started again "
         "goes on with its batches (default: windlass/serve/MODEL in the user's cache)"),
    Flag(name="max-file-size", read=size, metavar="SIZE", default=512 * MIB, group=_SERVER,
         help="longest uploaded file (default 512MiB)"),
    Flag(name="max-stored-size", read=size, metavar="SIZE", default=16 * GIB, group=_SERVER,
         help="bytes of all files together, those that batches have written among them; uploads "
         "beyond get status 413 (default 16GiB)"),
    *PARSER_FLAGS,
    *ENGINE_FLAGS,
    CONFIG_FLAG,
)  # fmt: skip


def run(values: Mapping[str, Any], arguments: Sequence[str]) -> int:
    try:
        from windlass.server.run import Address, serve
        from windlass.server.state import Loaded, ServerLimits, make_state
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("windlass"):
            raise
        raise UsageError(
            f"serve: {error.name} is not installed: pip install '.[server]' in a checkout"
        ) from error

    given = (values["api_key"] or "").split(",")
    keys = tuple(key.strip() for key in given if key.strip())
    if values["api_key"] is not None and not keys:
        raise UsageError("--api-key: got an empty key")
    values = {**values, "model": _model(values)}
    options = engine_options(values)
    _check_machine(options)
    located = locate(options)
    names = _names(values["served_model_name"], located.options.model, values["model"])
    ping, drain = values["sse_ping_interval"], values["shutdown_timeout"]
    most = values["request_timeout"]
    limits = ServerLimits(
        ping_s=None if ping < 0 else ping,
        answer_s=None if most < 0 else most,
        body_bytes=values["max_body_size"],
        answers=values["max_requests"],
        drain_s=float("inf") if drain < 0 else drain,
    )

    state = make_state(names, limits)

    def load(note: Callable[[str], None]) -> "Loaded":
        from windlass.build.open import open_engine
        from windlass.engine.service import Service
        from windlass.protocol.answers import choose_parsers
        from windlass.protocol.openai import ServedModel
        from windlass.server.batch_worker import RowEngine

        def downloaded(done: int, total: int) -> None:
            note(f"downloading, {format_bytes(done)} of {format_bytes(total)}")

        options = with_kept_usage(located.with_weights(say_line, downloaded))
        note("opening the checkpoint, planning memory")
        engine = open_engine(options, source=_Clients(), profile=kept_profile(options))
        for line in (*plan_lines(engine), _room_line(engine.plan)):
            say_line(line)
        served = ServedModel(
            names, engine.tokenizer, engine.max_model_len, engine.default_params,
            limited_by=engine.limited_by,
            parsers=choose_parsers(
                engine.tokenizer, values["tool_call_parser"], values["reasoning_parser"]
            ),
        )  # fmt: skip
        service = Service(engine)
        if not isinstance(state.data, str):
            jobs = _jobs(values, located.options, names)
            state.data.worker.start(RowEngine(engine, service, jobs))
        return Loaded(service, served, engine.tokenizer, _facts(engine))

    address = Address(host=values["host"], port=values["port"], keys=keys)
    if not keys and address.host not in ("127.0.0.1", "localhost", "::1"):
        say_line(f"no --api-key: whoever reaches {address.host} may ask")
    with ExitStack() as stack:
        state.data = _data_folder(values, names[0], stack)
        serve(state, address, load, say=say_line)
    return 0


def _check_machine(options: EngineOptions) -> None:
    """UsageError for what this machine has not, before a port is open and weights are loaded."""
    from windlass.build.host_budget import check_budget

    check_budget(options.host_memory)
    if options.device not in (AUTO, CPU):
        from windlass.device.cuda import cuda_index

        cuda_index(options.device)


def _data_folder(values: Mapping[str, Any], name: str, stack: ExitStack) -> "DataFolder | str":
    """Where files and batches are; why there are none, where another server has the folder and
    none was named. Raises UsageError where a folder that was named cannot be had."""
    from windlass.server.data_folder import data_folder

    given: Path | None = values["data_dir"]
    folder = given or cache_folder() / "windlass/serve" / name.replace("/", "--")
    opening = data_folder(
        folder,
        most_bytes=values["max_file_size"],
        stored_bytes=values["max_stored_size"],
        say=say_line,
    )
    try:
        data = stack.enter_context(opening)
    except UsageError as error:
        if given is not None:
            raise
        say_line(f"no files, no batches: {error}")
        return str(error)
    say_line(f"files and batches: {folder}")
    return data


def _jobs(values: Mapping[str, Any], engine: EngineOptions, names: tuple[str, ...]) -> "JobOptions":
    """What the jobs of batches have in common."""
    from windlass.batch.job_options import JobOptions

    return JobOptions(
        input_file=Path(), output_file=Path(), error_file=None, created=0,
        served_names=names,
        identity=job_identity(values, engine, names[0]),
        recorded={"version": __version__},
        max_model_len=engine.max_model_len,
        tool_call_parser=values["tool_call_parser"],
        reasoning_parser=values["reasoning_parser"],
    )  # fmt: skip


class _Clients:
    """Whoever will ask, for the planner: nothing is known of their prompts."""

    def job(self, tokenizer: object, params: object, longest: int) -> None:
        return None

    def row_bytes(self, max_model_len: int, vocab_size: int) -> int:
        from windlass.engine.grammars import grammars_bytes

        return grammars_bytes(vocab_size)


def _model(values: Mapping[str, Any]) -> str:
    given: str | None = values["checkpoint"]
    named: str = values["model"]
    if given is not None and named not in ("demo", given):
        raise UsageError(f"--model: got {named!r} beside {given!r}, allowed one of them")
    return given if given is not None else named


def _names(given: str | None, folder: str, typed: str) -> tuple[str, ...]:
    if given is not None:
        names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
        if not names:
            raise UsageError("--served-model-name: got an empty name")
        return names
    return tuple(dict.fromkeys((model_name(resolve_model(folder)), typed)))


def _room_line(plan: "Plan") -> str:
    """How many clients have room at once."""
    longest = plan.max_model_len
    pools = [tier.kv_pages * plan.page_tokens for tier in plan.homes.values()]
    whole = min(plan.max_num_seqs, sum(tokens // longest for tokens in pools))
    each = min(longest, sum(pools) // plan.max_num_seqs)
    return (
        f"KV cache of {counted(sum(pools), 'token')}: {counted(whole, 'sequence')} of"
        f" {longest} tokens at once, or {plan.max_num_seqs} of {each}"
    )


def _facts(engine: "Engine") -> dict[str, Any]:
    """Where the model runs, for `/health`."""
    return {
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.plan.max_num_seqs,
        "tiers": {tier.name: {"total_bytes": tier.total_bytes} for tier in engine.plan.tiers},
        "plan": engine.plan.lines(),
    }


COMMAND = Command(
    name="serve",
    help="Serve a model to OpenAI's clients over HTTP.",
    flags=FLAGS,
    run=run,
    positional=MODEL,
)

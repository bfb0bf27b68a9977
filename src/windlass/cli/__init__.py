"""The command line. Finds the command, reads its values, turns errors into exit codes: 0 done,
1 failed, 2 wrong usage, 3 done but some rows failed, 130 interrupted."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from windlass import __version__
from windlass.cli import bench_serve, doctor, generate, quantize, replay, run_batch, serve, synth
from windlass.cli import plan_command as plan
from windlass.cli.engine_flags import refuse_known, translate_known
from windlass.cli.flags import (
    Command,
    build_parser,
    matching_help,
    nearest,
    read_values,
    system_environment,
)
from windlass.cli.output import checked_output
from windlass.cli.signals import EXIT_INTERRUPTED, terminable
from windlass.errors import UsageError, WindlassError

COMMANDS: tuple[Command, ...] = (
    run_batch.COMMAND, serve.COMMAND, generate.COMMAND, plan.COMMAND, doctor.COMMAND,
    quantize.COMMAND, synth.COMMAND, replay.COMMAND, bench_serve.COMMAND,
)  # fmt: skip
EXIT_FAILED, EXIT_USAGE = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _log_lines(), checked_output(), terminable():
            return _dispatch(arguments)
    except UsageError as error:
        print(f"windlass: {error}", file=sys.stderr)
        return EXIT_USAGE
    except WindlassError as error:
        print(f"windlass: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if sys.stdout is None:
            print("windlass: standard output is closed", file=sys.stderr)
        return EXIT_FAILED  # else whoever read it left (`| head`), and knows


class _Lines(logging.Handler):
    """What the library warns of, as lines like those of the commands."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


@contextmanager
def _log_lines() -> Iterator[None]:
    logger, handler = logging.getLogger("windlass"), _Lines()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("-V", "--version"):
        print(f"windlass {__version__}")
        return 0
    names = [each.name for each in COMMANDS]
    words = 2 if " ".join(arguments[:2]) in names else 1  # `bench serve` has two
    name, rest = " ".join(arguments[:words]), arguments[words:]
    command = next((each for each in COMMANDS if each.name == name), None)
    if command is None:
        raise UsageError(
            f"unknown command: {name}{nearest(name, names)}, allowed {', '.join(names)}"
        )
    options = rest[: rest.index("--")] if "--" in rest else rest
    if "-h" in options or "--help" in options:
        print(build_parser(command).format_help(), end="")
        return 0
    for option in options:
        if option.startswith("--help="):
            print(matching_help(command, option.removeprefix("--help=")))
            return 0
    environment = system_environment(COMMANDS)
    own = {each for flag in command.flags for each in flag.names}
    known = translate_known(refuse_known(rest, own=own))
    values = read_values(command, known, environment)
    try:
        return command.run(values, rest)
    except UsageError as error:
        raise UsageError(_as_typed(str(error), command, options)) from error


def _as_typed(message: str, command: Command, options: Sequence[str]) -> str:
    """An error that begins with the name of an option, with that as it was typed."""
    name, colon, rest = message.partition(":")
    typed = {option.partition("=")[0] for option in options}
    found = [one for flag in command.flags if flag.key == name for one in flag.names]
    return next((one for one in found if one in typed), name) + colon + rest


def _overview() -> str:
    commands = "\n".join(f"  {command.name:12} {command.help}" for command in COMMANDS)
    return (
        f"windlass {__version__}: Mixture-of-Experts models larger than memory\n\n"
        f"usage: windlass COMMAND [options]\n\n{commands}\n\n"
        "  windlass COMMAND --help      all options of a command\n"
        "  windlass COMMAND --help=WORD those that match\n"
        "  windlass --version"
    )

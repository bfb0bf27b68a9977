"""Flags as data, and the layers a value comes from: flag, environment, file, default. Every flag
is applied or refused. Knows no command and imports nothing heavy."""

import argparse
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from windlass.errors import UsageError
from windlass.units import parse_bytes

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One option. `name` without dashes; its mirror is WINDLASS_<NAME>, its key in a file <name>
    with underscores. `read` makes a value of text, None for a switch: --NAME, and --no-NAME where
    it is on by default."""

    name: str
    help: str
    read: Callable[[str], Any] | None = str
    default: Any = None
    aliases: tuple[str, ...] = ()
    metavar: str | None = None
    group: str = "options"
    is_required: bool = False

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return "WINDLASS_" + self.key.upper()

    @property
    def names(self) -> tuple[str, ...]:
        """All that may be typed."""
        is_on = self.read is None and self.default
        return ("--" + self.name, *self.aliases, *((f"--no-{self.name}",) if is_on else ()))

    def value(self, text: str, *, source: str) -> Any:
        """The value that `text` means. Raises UsageError naming `source`."""
        if self.read is None:
            if text.lower() not in _TRUE + _FALSE:
                raise UsageError(f"{source}: got {text!r}, allowed true or false")
            return text.lower() in _TRUE
        try:
            return self.read(text)
        except UsageError as error:
            raise UsageError(f"{source}: {str(error).partition(': ')[2] or error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A verb of the command line. `run` gets the values by key and the arguments as typed."""

    name: str
    help: str
    flags: tuple[Flag, ...]
    run: Callable[[Mapping[str, Any], Sequence[str]], int]
    positional: Flag | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser(command: Command) -> argparse.ArgumentParser:
    """Values given on the command line appear as text; what is absent stays absent."""
    parser = _Parser(
        prog=f"windlass {command.name}",
        description=command.help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        epilog="Every option can also be set as WINDLASS_<NAME> or in --config FILE.toml; "
        "--help=WORD shows the options that match.",
    )
    if command.positional is not None:
        parser.add_argument(
            command.positional.key,
            nargs="?",
            help=command.positional.help,
            metavar=command.positional.metavar,
        )
    groups: dict[str, Any] = {}
    for flag in command.flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        text = flag.help.replace("%", "%%")
        if flag.read is None:
            for name in flag.names:
                groups[flag.group].add_argument(
                    name, dest=flag.key, action="store_const", help=text,
                    const="false" if name == f"--no-{flag.name}" else "true",
                )  # fmt: skip
        else:
            groups[flag.group].add_argument(
                *flag.names, dest=flag.key, metavar=flag.metavar or "VALUE", help=text
            )
    return parser


def read_values(
    command: Command, arguments: Sequence[str], environment: Mapping[str, str]
) -> dict[str, Any]:
    """The value of every flag by key. Raises UsageError."""
    parser = build_parser(command)
    given, rest = parser.parse_known_args(list(arguments))
    if rest:
        raise UsageError(_unknown(rest[0], command))
    typed: dict[str, str] = vars(given)
    file_name = typed.get("config") or environment.get("WINDLASS_CONFIG")
    in_file = _read_file(Path(file_name), command) if file_name else {}
    values: dict[str, Any] = {}
    for flag in _all(command):
        if flag.key in typed:
            values[flag.key] = flag.value(typed[flag.key], source="--" + flag.name)
        elif flag.variable in environment:
            values[flag.key] = flag.value(environment[flag.variable], source=flag.variable)
        elif flag.key in in_file:
            source = f"{file_name}: {flag.key}"
            values[flag.key] = flag.value(in_file[flag.key], source=source)
        elif flag.is_required:
            raise UsageError(f"--{flag.name} is missing: {flag.help}")
        else:
            values[flag.key] = flag.default
    return values


def matching_help(command: Command, word: str) -> str:
    """The options whose name, group or text contains `word`."""
    word = word.lower()
    found = [
        flag for flag in command.flags
        if word in f"{' '.join(flag.names)} {flag.group} {flag.help}".lower()
    ]  # fmt: skip
    if not found:
        raise UsageError(f"--help: no option of {command.name} matches {word!r}")
    return "\n".join(
        f"  {', '.join(sorted(flag.names, key=len))}"
        f"{'' if flag.read is None else ' ' + (flag.metavar or 'VALUE')}\n      {flag.help}"
        for flag in found
    )


def _all(command: Command) -> Iterator[Flag]:
    if command.positional is not None:
        yield command.positional
    yield from command.flags


def _unknown(argument: str, command: Command) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument: {argument!r}"
    name = argument.partition("=")[0]
    known = ["--help", *(name for flag in command.flags for name in flag.names)]
    return f"unknown option: {name}{nearest(name, known)}"


def nearest(name: str, known: Sequence[str]) -> str:
    """` (did you mean --x?)`, or nothing."""
    near = get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _read_file(path: Path, command: Command) -> dict[str, str]:
    """The file's values as text. Tables named after a command hold for it alone."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config: {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--config: {path}: {error}") from error
    flat = {key: value for key, value in document.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    flat |= tables.pop(command.name, {})
    known = [flag.key for flag in _all(command)]
    result = {}
    for key, value in flat.items():
        key = key.replace("-", "_")
        if key not in known:
            raise UsageError(f"{path}: unknown option: {key}{nearest(key, known)}")
        if not isinstance(value, (str, int, float, bool)):
            raise UsageError(f"{path}: {key}: got {value!r}, allowed a string, number or boolean")
        result[key] = str(value)
    return result


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """Reads an integer from `low`."""

    def read(text: str) -> int:
        try:
            value: int | None = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            upper = "" if high is None else f" to {high}"
            raise UsageError(f"value: got {text!r}, allowed an integer from {low}{upper}")
        return value

    return read


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"value: got {text!r}, allowed a number") from error


def choice(*allowed: str) -> Callable[[str], str]:
    """Reads one of `allowed`."""

    def read(text: str) -> str:
        if text not in allowed:
            raise UsageError(f"value: got {text!r}, allowed {', '.join(allowed)}")
        return text

    return read


def several(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Reads values with commas between them; of equal ones the first."""

    def read_all(text: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(read(one.strip()) for one in text.split(",")))

    return read_all


def share(text: str) -> float:
    """`33%` or `0.33`."""
    value = number(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < value <= 1:
        raise UsageError(f"value: got {text!r}, allowed more than 0% to 100%")
    return value


def size(text: str) -> int:
    return parse_bytes(text, what="value")


def count(text: str) -> int:
    """`8k` is 8192."""
    if text[-1:] in ("k", "K"):
        return integer(1)(text[:-1]) * 1024
    return integer(-1)(text)


def system_environment(commands: Sequence[Command]) -> dict[str, str]:
    """Our own variables. Raises UsageError for one that no command knows."""
    own = {name: text for name, text in os.environ.items() if name.startswith("WINDLASS_")}
    known = [flag.variable for command in commands for flag in _all(command)]
    for name in own:
        if name not in known:
            raise UsageError(f"unknown variable: {name}{nearest(name, known)}")
    return own

"""Reading JSON bodies strictly: every field has one type, null means absent, unknown names are
refused with a suggestion. Knows no endpoint."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from windlass.errors import RequestError

T = TypeVar("T")

_WORDS: dict[type, str] = {
    bool: "true or false", int: "an integer", str: "a string", list: "an array", dict: "an object",
}  # fmt: skip


def shorten(value: object, limit: int = 80) -> str:
    """`repr` cut to `limit` characters, for messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def optional(body: Mapping[str, Any], name: str, kind: type[T], *, where: str = "") -> T | None:
    """The field `name` as `kind`, None if absent or null. `where` prefixes the name in errors."""
    value = body.get(name)
    if value is None:
        return None
    # type() and not isinstance(): true is no integer here
    if type(value) is not kind:
        raise RequestError(
            f"{where}{name}: got {shorten(value)}, allowed {_WORDS[kind]}", param=where + name
        )
    return value


def required(body: Mapping[str, Any], name: str, kind: type[T], *, where: str = "") -> T:
    """Like `optional`, but the field must be there."""
    value = optional(body, name, kind, where=where)
    if value is None:
        raise RequestError(
            f"{where}{name}: missing, allowed {_WORDS[kind]}",
            param=where + name,
            code="missing_required_parameter",
        )
    return value


def refuse_unknown(
    body: Mapping[str, Any], known: Collection[str], *, where: str = "", also: str = ""
) -> None:
    """Raises for the first field that is not in `known`; null counts as absent. `also` ends the
    message."""
    for name, value in body.items():
        if name in known or value is None:
            continue
        near = get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RequestError(
            f"{where}{name}: not supported{hint}{also}",
            param=where + name,
            code="unsupported_parameter",
        )


def only(body: Mapping[str, Any], name: str, allowed: Collection[object], why: str) -> None:
    """Raises unless the field is absent or one of `allowed`; `why` says what is missing."""
    value = body.get(name)
    if value is not None and not any(
        value == item and type(value) is type(item) for item in allowed
    ):
        raise RequestError(
            f"{name}: got {shorten(value)}, {why}", param=name, code="unsupported_parameter"
        )

"""Strict reading of a config.json dictionary. Knows keys and types, no model family."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from windlass.errors import ModelError

T = TypeVar("T")

_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string",
          dict: "an object", list: "a list"}  # fmt: skip


class Config:
    """Typed access to a parsed config.json. A key that is absent and one that is null read alike.

    Every method raises ModelError naming the key, what was found and what is allowed. Keys that
    were asked for are remembered, so that `unread` can tell which settings nobody looked at.
    """

    def __init__(self, raw: Mapping[str, Any], *, where: str = "config.json") -> None:
        self.raw = raw
        self.where = where
        self._read: set[str] = set()
        self._sections: dict[str, Config] = {}

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        self._read.add(key)
        return self.raw.get(key) is not None

    def require(self, key: str, kind: type[T]) -> T:
        """The value of `key`, which must be a `kind`; a float may be written as an integer."""
        if not self.has(key):
            raise ModelError(f"{self.where}: {key} is missing, allowed {_NAMES[kind]}")
        return self._typed(key, self.raw[key], kind)

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The value of `key`, or `default` where it is absent or null."""
        return self.require(key, kind) if self.has(key) else default

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value of `key`, or None where it is absent or null."""
        return self.require(key, kind) if self.has(key) else None

    def first(self, keys: Sequence[str], kind: type[T], default: T | None = None) -> T:
        """The value under any of several spellings of one setting, which must agree."""
        found = {key: self.require(key, kind) for key in keys if self.has(key)}
        if not found:
            if default is not None:
                return default
            raise ModelError(
                f"{self.where}: {' or '.join(keys)} is missing, allowed {_NAMES[kind]}"
            )
        values = list(found.values())
        if any(value != values[0] for value in values):
            text = ", ".join(f"{key} = {value!r}" for key, value in found.items())
            raise ModelError(f"{self.where}: got {text}, allowed one value for both")
        return values[0]

    def size(self, *keys: str, default: int | None = None) -> int:
        """A positive integer under any of several spellings."""
        value = self.first(keys, int, default)
        if value < 1:
            raise ModelError(f"{self.where}: {keys[0]} is {value}, allowed a positive integer")
        return value

    def one_of(self, key: str, allowed: Sequence[T], default: T) -> T:
        """The value of `key`, which must be in `allowed`; `default` where it is absent."""
        value = self.raw[key] if self.has(key) else default
        if not any(value == one and type(value) is type(one) for one in allowed):
            choices = ", ".join(repr(one) for one in allowed)
            raise ModelError(f"{self.where}: {key} is {value!r}, allowed {choices}")
        return cast(T, value)

    def items(self, key: str, kind: type[T], default: Sequence[T] = ()) -> tuple[T, ...]:
        """A list whose elements are all a `kind`."""
        if not self.has(key):
            return tuple(default)
        values: list[Any] = self.require(key, list)
        return tuple(self._typed(f"{key}[{i}]", value, kind) for i, value in enumerate(values))

    def section(self, key: str) -> "Config":
        """A nested object, itself read strictly; the same one every time."""
        if key not in self._sections:
            raw: Mapping[str, Any] = self.require(key, dict)
            self._sections[key] = Config(raw, where=f"{self.where}: {key}")
        return self._sections[key]

    def ignore(self, *keys: str) -> None:
        """Says that `keys` mean nothing here, as if they had been asked for."""
        self._read.update(keys)

    def unread(self) -> list[str]:
        """Keys that are there, not null, and were never asked for."""
        return [k for k, value in self.raw.items() if value is not None and k not in self._read]

    def with_sections(self) -> Iterator["Config"]:
        """This and every nested object that was read as a section."""
        yield self
        for section in self._sections.values():
            yield from section.with_sections()

    def _typed(self, key: str, value: Any, kind: type[T]) -> T:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind is float and is_number:
            return cast(T, float(value))
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
        raise ModelError(f"{self.where}: {key} is {value!r}, allowed {_NAMES[kind]}")

"""Which modules a setting names, in the spellings of quantisation tools. Knows no format."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from windlass.errors import ModelError

_PLAIN = re.compile(r"[\w.\-]*")  # a name without a sign that means something in a pattern


@dataclass(frozen=True, slots=True)
class Modules:
    """A set of module names. A name belongs to it that is one of `names`, lies under one of
    `trees`, ends in one of `endings`, contains one of `fragments` or begins as a pattern says."""

    names: frozenset[str] = frozenset()
    trees: frozenset[str] = frozenset()
    endings: tuple[str, ...] = ()
    fragments: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    everything: bool = False

    def __contains__(self, name: str) -> bool:
        if self.everything or name in self.names or name.endswith(self.endings):
            return True
        if self.trees and self._is_under_tree(name):
            return True
        if any(fragment in name for fragment in self.fragments):
            return True
        return any(pattern.match(name) for pattern in _compiled(self.patterns))

    def __or__(self, other: "Modules") -> "Modules":
        return Modules(
            names=self.names | other.names,
            trees=self.trees | other.trees,
            endings=self.endings + other.endings,
            fragments=self.fragments + other.fragments,
            patterns=self.patterns + other.patterns,
            everything=self.everything or other.everything,
        )

    def _is_under_tree(self, name: str) -> bool:
        end = name.find(".")
        while end != -1:
            if name[:end] in self.trees:
                return True
            end = name.find(".", end + 1)
        return name in self.trees


def hub_modules(keys: Iterable[str], where: str) -> Modules:
    """transformers' `modules_to_not_convert`: the name or a module around it, the end of the name,
    or a pattern for its beginning, up to a dot."""
    keys = tuple(keys)
    trees = frozenset(key for key in keys if _PLAIN.fullmatch(key))
    patterns = tuple(
        rf"(?:{key})(?:(?<=\.)|(?=\.|$))" for key in keys if key not in trees and key
    )  # fmt: skip
    _check(patterns, where)
    return Modules(trees=trees, endings=tuple(key for key in keys if key), patterns=patterns)


def listed_modules(entries: Iterable[str], where: str) -> Modules:
    """compressed-tensors' `ignore` and `targets`: names and, after "re:", patterns for the
    beginning of names."""
    entries = tuple(entries)
    patterns = tuple(entry[3:] for entry in entries if entry.startswith("re:"))
    _check(patterns, where)
    names = frozenset(entry for entry in entries if not entry.startswith("re:"))
    return Modules(names=names, patterns=patterns)


def searched_modules(entries: Iterable[str], where: str) -> Modules:
    """AutoRound's `extra_config`: names, and patterns for any part of names."""
    return listed_modules(
        (entry if _PLAIN.fullmatch(entry) else f"re:.*(?:{entry})" for entry in entries), where
    )


def globbed_modules(entries: Iterable[str], where: str) -> Modules:
    """ModelOpt's `exclude_modules`: whole names, as a shell would match them."""
    return listed_modules((f"re:{fnmatch.translate(entry)}" for entry in entries), where)


def _check(patterns: Iterable[str], where: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ModelError(f"{where}: {pattern!r} is no regular expression: {error}") from error


@lru_cache
def _compiled(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(pattern) for pattern in patterns)

"""The JSON document of a comparison: grows run by run, is saved after each, and can be gone on
with. Knows what was done, not what it means."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from machine import to_text

_OF_A_PART = ("command", "date", "commit", "is_modified", "rates")  # the machine is the same
_LISTS = ("checks", "sweeps", "runs", "limited_sweeps", "limited")


class StopAfter(Exception):
    """The time that the user gave is over; what was measured is saved."""


class Document:
    """Entries by key in lists; `record` computes an entry once."""

    def __init__(self, path: Path | None, head: dict[str, Any], *, stop_after_s: float) -> None:
        """Goes on with the document at `path`, if there is one. `head`: about this call."""
        self._path = path
        self._end = time.monotonic() + stop_after_s
        self.data: dict[str, Any] = dict(head) | {"parts": [], "models": {}, "skipped": {}}
        self.data |= {name: [] for name in _LISTS}
        if path is not None and path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
        self.data["parts"].append({name: head[name] for name in _OF_A_PART if name in head})

    def forget(self, *, engines: Sequence[str], retry: bool) -> None:
        """Drops entries of `engines`, and those without a result, to make them again."""
        for name in _LISTS:
            self.data[name] = [
                entry for entry in self.data[name]
                if entry["engine"] not in engines and not (retry and _has_failed(entry))
            ]  # fmt: skip

    def find(self, name: str, key: str) -> dict[str, Any] | None:
        return next((entry for entry in self.data[name] if entry["key"] == key), None)

    def record(
        self, name: str, key: str, engine: str, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The entry of that key, made now if there is none. Raises StopAfter."""
        found = self.find(name, key)
        if found is not None:
            return found
        if time.monotonic() > self._end:
            raise StopAfter
        print(f"{name}: {key}", flush=True)
        entry = {"key": key, "engine": engine, "part": len(self.data["parts"]) - 1, **make()}
        self.data[name].append(entry)
        self.save()
        return entry

    def save(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(to_text(self.data), encoding="utf-8")
        os.replace(part, self._path)


def _has_failed(entry: dict[str, Any]) -> bool:
    return bool(entry.get("status", "ok") in ("timeout", "failed"))

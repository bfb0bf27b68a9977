"""Checks of a script for a GPU: a line as each ends, and one JSON file that is whole after each,
so that a run that is cut short leaves what it had."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from windlass.files import replace_file


class Report:
    """`about`: what is measured where; it can be added to. `minutes`: after which nothing is begun
    that would take longer than what is left."""

    def __init__(self, path: Path, about: dict[str, Any], *, minutes: float) -> None:
        self.about = about
        self.checks: list[dict[str, Any]] = []
        self._path = path
        self._begin, self._limit_s = time.monotonic(), 60 * minutes
        self._longest_s = 0.0

    def add(self, name: str, *, passed: bool | None, **numbers: Any) -> None:
        """`passed`: None for a measurement that nothing is asked of."""
        self._keep("ok" if passed else "--" if passed is None else "FAIL", name, numbers)

    def aim(self, name: str, *, got: float, wanted: float, **numbers: Any) -> None:
        """What is hoped for: a figure that is too low is said and is no failure."""
        verdict = "met" if got >= wanted else "LOW"
        self._keep(verdict, name, {"got": got, "wanted": wanted, **numbers})

    def skip(self, name: str, why: str) -> None:
        self._keep("skipped", name, {"why": why})

    @property
    def failed(self) -> list[str]:
        return [check["check"] for check in self.checks if check["verdict"] == "FAIL"]

    def run(self, checks: Sequence[tuple[str, Callable[[], None]]]) -> int:
        """All in turn; one that raises fails and ends no other. 1 where one failed."""
        for name, check in checks:
            begin = time.monotonic()
            left = self._limit_s - (begin - self._begin)
            if left < self._longest_s:
                self.skip(name, f"{left:.0f} s are left, a check took up to {self._longest_s:.0f}")
                continue
            try:
                check()
            except Exception as error:  # noqa: BLE001  whatever it is, it is this check's result
                self.add(name, passed=False, error=f"{type(error).__name__}: {error}")
            took = time.monotonic() - begin
            self._longest_s = max(self._longest_s, took)
            print(f"   {name}: {took:.1f} s", flush=True)
        print(f"{len(self.checks)} results, {len(self.failed)} failed: {self._path}")
        return 1 if self.failed else 0

    def _keep(self, verdict: str, name: str, numbers: dict[str, Any]) -> None:
        self.checks.append({"check": name, "verdict": verdict, **numbers})
        plain = (f"{key} {_short(value)}" for key, value in numbers.items() if _is_plain(value))
        print(verdict, name, ", ".join(plain), flush=True)
        at_s = round(time.monotonic() - self._begin, 1)
        document = {**self.about, "seconds": at_s, "checks": self.checks}
        replace_file(self._path, (json.dumps(document, indent=1) + "\n").encode())


def _is_plain(value: object) -> bool:
    return not isinstance(value, dict | list | tuple)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

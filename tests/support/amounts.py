"""How much `make test` takes of what `make test-all` takes whole."""

import os
from collections.abc import Iterable
from typing import Any

import pytest

_ALL = os.environ.get("HYPOTHESIS_PROFILE") == "new"


def some(few: int, of: int) -> int:
    """Examples of a property: `few` in `make test`, all `of` them in `make test-all`."""
    return of if _ALL else few


def rarely(values: Iterable[Any]) -> list[Any]:
    """Parameters that `make test-all` alone takes."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]

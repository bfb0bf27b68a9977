"""Clients that are not installed for `make test`: `make test-clients` installs and drives them."""

from collections.abc import Iterator

import pytest

from live_server import Running, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with serving(
        "demo", "--host-memory", "1GiB", "--max-num-seqs", "8", "--kv-cache-dtype", "float32"
    ) as running:
        yield running

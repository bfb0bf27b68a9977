"""Clients that are not installed for `make test`: `make test-clients` installs and drives them."""

import os
from collections.abc import Iterator

import pytest

from live_server import Running, serving

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before they are imported


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with serving("demo", "--host-memory", "1GiB", "--max-num-seqs", "8") as running:
        yield running

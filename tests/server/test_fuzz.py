"""A share of `bench/server/fuzz.py`: no body is a fault of the server's, and none takes it down."""

import asyncio
import sys
from pathlib import Path

import pytest

from asgi import ask
from fake_engine import FakeEngine
from fake_server import Server

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from server import fuzz


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_body_is_a_fault_of_the_servers(count: int) -> None:
    server = Server(FakeEngine(max_model_len=4096))
    loop = asyncio.new_event_loop()

    def send(case: fuzz.Case) -> tuple[int, bytes]:
        answered = loop.run_until_complete(
            ask(server.app, "POST", case.path, pieces=[case.data])
        )  # fmt: skip
        return answered.status, b"".join(answered.pieces)

    with server.load():
        statuses = fuzz.run(send, seed=count, count=count)
        assert server.state.num_open == 0
    loop.close()
    assert sum(statuses.values()) == count and min(statuses[200], statuses[400]) > count // 10


def test_a_fault_is_seen() -> None:
    assert fuzz.fault(fuzz.CHAT, 200, b"anything") is None
    for status, body in ((500, b"{}"), (400, b"oh"), (400, b'{"error": "oh"}')):
        assert fuzz.fault(fuzz.CHAT, status, body) is not None
    with pytest.raises(AssertionError, match="status 500"):
        fuzz.run(lambda case: (500, b""), seed=0, count=1)

"""What the server shows of itself: the page's file, the numbers, the stream of them."""

import asyncio
import base64
import hashlib
import json
import re

import pytest

from asgi import ask
from fake_engine import FakeEngine
from fake_server import Server, error_of
from windlass.server.app import make_app
from windlass.server.watchers import Warmth


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def test_the_page_is_one_file_that_may_only_run_itself() -> None:
    server = Server(FakeEngine())
    answered = server.ask("GET", "/")
    text = b"".join(answered.pieces).decode()
    assert len(text) < 60_000 and "http" not in text.replace("https://", "http").replace("/v1/", "")
    policy = answered.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag in ("script", "style"):
        (own,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert " style=" not in text and not re.search(r" on[a-z]+=", text)


def test_the_page_needs_no_key_and_its_numbers_do() -> None:
    server = Server(FakeEngine())
    app = make_app(server.state, keys=("secret",))
    assert asyncio.run(ask(app, "GET", "/")).status == 200
    for path in ("/v1/stats", "/v1/stats/stream"):
        error_of(asyncio.run(ask(app, "GET", path)), 401)


def test_numbers_have_the_names_of_metrics(engine: FakeEngine) -> None:
    server = Server(engine)
    with server.load():
        server.post("/v1/completions", {"prompt": "hello", "max_tokens": 4})
        stats = server.ask("GET", "/v1/stats").json
        text = b"".join(server.ask("GET", "/metrics").pieces).decode()
    for name, value in stats["metrics"].items():
        plain, _, label = name.partition("[")
        found = re.findall(rf"^windlass:{plain}(?:_total)?\{{(.*)\}} (\S+)$", text, re.MULTILINE)
        own = [float(number) for labels, number in found if label.rstrip("]") in labels]
        assert value in own, name
    experts = stats["experts"]
    assert experts["layers"] == [1, 3] and experts["tiers"] == {"host": ["0030", "0000"]}
    assert experts["uses"] == [[0, 0, engine.stats().passes, 0], [0] * 4]
    assert experts["evicted_seconds"] == [[-1.0] * 4] * 2


def test_the_stream_tells_of_loading_then_of_the_machine(engine: FakeEngine) -> None:
    server = Server(engine)
    server.state.loading = "opening the checkpoint"
    (first,) = server.ask("GET", "/v1/stats/stream", leaves_after=1).events
    assert json.loads(first) == {"status": "loading", "message": "opening the checkpoint"}
    with server.load():
        answered = server.ask("GET", "/v1/stats/stream", leaves_after=2)
    *_, last = map(json.loads, answered.events)
    assert answered.headers["content-type"].startswith("text/event-stream")
    assert last["experts"]["tiers"] == {"host": ["0030", "0000"]}
    assert last["expected"] == {
        "decode_tokens_s": 10.0, "link_bytes_s": {"disk": 1e9}, "are_assumed": False
    }  # fmt: skip
    assert server.state.watchers.count == 0, "who has left is not counted"


def test_few_may_watch(engine: FakeEngine) -> None:
    server = Server(engine)
    with server.load():
        server.state.watchers.count = 8
        error_of(server.ask("GET", "/v1/stats/stream"), 429)


def test_what_was_used_lately_is_warm() -> None:
    warmth = Warmth()
    assert warmth.look({0: [5, 0, 0]}) == ["000"], "what was before nobody looked is unknown"
    assert warmth.look({0: [5, 4, 1]}) == ["094"]
    for _ in range(40):
        warmth.look({0: [5, 4, 1]})
    assert warmth.look({0: [6, 4, 1]}) == ["942"]

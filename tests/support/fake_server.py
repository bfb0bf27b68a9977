"""The server's application over an engine without a model, asked without a network."""

import asyncio
from typing import Any

from hypothesis import strategies as st

from asgi import Answered, ask
from fake_engine import FakeEngine
from windlass.engine.service import Service
from windlass.protocol.openai import ServedModel
from windlass.server.app import make_app
from windlass.server.state import Loaded, ServerLimits, make_state

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(-1, 3) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


class Server:
    """An application over a fake engine."""

    def __init__(self, engine: FakeEngine, **options: Any) -> None:
        self.engine = engine
        self.state = make_state(("fake", "other"), ServerLimits(**options))
        self.app = make_app(self.state)

    def load(self) -> Service:
        engine = self.engine
        service = Service(engine)
        model = ServedModel(
            self.state.names, engine.tokenizer, engine.max_model_len, engine.default_params
        )
        facts = {"max_model_len": engine.max_model_len}
        self.state.loaded = Loaded(service, model, engine.tokenizer, facts)
        return service

    def ask(self, method: str, path: str, body: Any = None, **more: Any) -> Answered:
        return asyncio.run(ask(self.app, method, path, body, **more))

    def post(self, path: str, body: Any, **more: Any) -> Answered:
        return self.ask("POST", path, body, **more)


class BrokenEngine(FakeEngine):
    def step(self) -> Any:
        raise RuntimeError("the disk is gone")


def error_of(answered: Answered, status: int) -> dict[str, Any]:
    assert answered.status == status, (answered.status, answered.pieces)
    assert set(answered.json) == {"error"}
    error: dict[str, Any] = answered.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    return error

"""An application over a fake engine and a data folder, asked without a network."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from asgi import Answered, ask
from fake_engine import FakeEngine, install
from windlass.batch.job_options import JobOptions
from windlass.cli import main
from windlass.engine.service import Service
from windlass.protocol.openai import ServedModel
from windlass.server.app import make_app
from windlass.server.batch_worker import RowEngine
from windlass.server.data_folder import DataFolder, data_folder
from windlass.server.state import Loaded, ServerLimits, make_state

BOUNDARY = "a-boundary"
PATIENCE_S = 60
IDENTITY = {"seed": 0}


def jobs(identity: Mapping[str, Any]) -> JobOptions:
    """Of batches that run here."""
    return JobOptions(
        input_file=Path(), output_file=Path(), error_file=None, served_names=("fake",),
        identity=identity, recorded={}, max_model_len=None, created=0,
    )  # fmt: skip


def form(content: bytes, filename: str | None = "in.jsonl", **fields: str) -> bytes:
    """A multipart body."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    if filename is not None:
        head = f'Content-Disposition: form-data; name="file"; filename="{filename}"'
        parts.append(
            f"--{BOUNDARY}\r\n{head}\r\nContent-Type: application/json\r\n\r\n".encode()
            + content
            + b"\r\n"
        )
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


class DataServer:
    """`said`: lines that it would print."""

    def __init__(
        self, folder: Path, *, most_bytes: int = 1 << 20, stored_bytes: int = 1 << 30
    ) -> None:
        self._stack = ExitStack()
        self.said: list[str] = []
        self.state = make_state(("fake",), ServerLimits())
        self.data: DataFolder = self._stack.enter_context(
            data_folder(
                folder, most_bytes=most_bytes, stored_bytes=stored_bytes, say=self.said.append
            )
        )
        self.state.data = self.data
        self.app = make_app(self.state)

    def load(self, engine: FakeEngine, identity: Mapping[str, Any] = IDENTITY) -> None:
        service = self._stack.enter_context(Service(engine))
        # before the service ends, as in `serve`
        self._stack.callback(self.data.worker.stop)
        model = ServedModel(("fake",), engine.tokenizer, 256, engine.default_params)
        self.state.loaded = Loaded(service, model, engine.tokenizer, {})
        self.data.worker.start(RowEngine(engine, service, jobs(identity)))

    def close(self) -> None:
        self._stack.close()

    def ask(self, method: str, path: str, body: Any = None, **more: Any) -> Answered:
        return asyncio.run(ask(self.app, method, path, body, **more))

    def upload(self, content: bytes, *, cut: int | None = None, **fields: str) -> Answered:
        """`cut`: bytes of each piece that is sent."""
        body = form(content, **{"purpose": "batch", **fields})
        step = cut or len(body)
        return self.send_form([body[i : i + step] for i in range(0, len(body), step)])

    def send_form(self, pieces: list[bytes]) -> Answered:
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        return self.ask("POST", "/v1/files", pieces=pieces, headers={"content-type": kind})

    def create(self, content: bytes, **fields: Any) -> dict[str, Any]:
        """A batch over a file of its own."""
        file = self.upload(content).json["id"]
        wish = {
            "input_file_id": file,
            "endpoint": "/v1/completions",
            "completion_window": "24h",
            **fields,
        }
        answered = self.ask("POST", "/v1/batches", wish)
        assert answered.status == 200, answered.pieces
        found: dict[str, Any] = answered.json
        return found

    def batch(self, batch_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/v1/batches/{batch_id}").json
        return found

    def wait(self, batch_id: str, *statuses: str) -> dict[str, Any]:
        """The batch, once it has one of these."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := self.batch(batch_id))["status"] not in statuses:
            assert time.monotonic() < deadline, found
            time.sleep(0.005)
        return found

    def lines(self, file_id: str) -> list[Any]:
        """Content of a file of JSON lines."""
        content = self.ask("GET", f"/v1/files/{file_id}/content")
        assert content.status == 200
        return [json.loads(line) for line in b"".join(content.pieces).splitlines()]


@contextmanager
def data_server(folder: Path, **options: Any) -> Iterator[DataServer]:
    server = DataServer(folder, **options)
    try:
        yield server
    finally:
        server.close()


def rows(number: int, **body: Any) -> bytes:
    """An input of completions; body fields for all."""
    lines = [
        {
            "custom_id": f"r{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"row {i}", "max_tokens": 4 + i % 9, **body},
        }
        for i in range(number)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def serve_fake(folder: str, log: str) -> None:
    """`windlass serve` with the fake engine, in a process of its own: data in `folder`/data, what
    it says in `folder`/`log`."""
    os.chdir(folder)
    os.environ |= {"FAKE_STEP_S": "0.02", "FAKE_CAPACITY": "8"}
    sys.stderr = open(log, "w", buffering=1)
    install()
    sys.exit(main(["serve", "model", "--port", "0", "--data-dir", "data", "-a", "fake"]))

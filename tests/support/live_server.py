"""`windlass serve` as a process."""

import http.client
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import openai
import pytest

from processes import PATIENCE_S, forked, printing_to
from windlass.cli import main

QUIET = {"max_retries": 0, "timeout": PATIENCE_S}


@dataclass
class Running:
    """`opened`: closed at the end."""

    process: BaseProcess
    port: int
    opened: ExitStack

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def exit_code(self) -> int | None:
        """When it has ended."""
        self.process.join(PATIENCE_S)
        return self.process.exitcode

    def client(self, **options: Any) -> openai.OpenAI:
        settings = {"api_key": "none", **QUIET, **options}
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **settings)
        return self.opened.enter_context(client)

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())


def _serve(arguments: tuple[str, ...]) -> None:
    sys.exit(main(["serve", "--port", "0", "--threads", "1", *arguments]))


@contextmanager
def serving(*arguments: str) -> Iterator[Running]:
    """A server that is ready; killed at the end, if it has not ended."""
    with (
        tempfile.TemporaryDirectory() as folder,
        forked(printing_to, Path(folder), _serve, arguments) as process,
    ):
        said = Path(folder, "stderr")
        while not said.exists() or "\nready" not in said.read_text():
            if not process.is_alive():
                pytest.fail(said.read_text() if said.exists() else f"exit {process.exitcode}")
            time.sleep(0.02)
        found = re.search(r"^listening at http://127\.0\.0\.1:(\d+)", said.read_text(), re.M)
        assert found is not None, said.read_text()
        with ExitStack() as opened:
            yield Running(process, int(found[1]), opened)

"""`windlass serve` as a process."""

import http.client
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from processes import PATIENCE_S

QUIET = {"max_retries": 0, "timeout": PATIENCE_S}


@dataclass
class Running:
    process: "subprocess.Popen[str]"
    port: int

    def client(self, **options: Any) -> openai.OpenAI:
        settings = {"api_key": "none", **QUIET, **options}
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **settings)

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())


@contextmanager
def serving(*arguments: str) -> Iterator[Running]:
    """A server that is ready; killed at the end, if it has not ended."""
    command = [sys.executable, "-m", "windlass.cli", "serve", "--port", "0", "--threads", "1"]
    with subprocess.Popen(
        [*command, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stderr is not None
            said, port = [], 0
            for line in process.stderr:
                said.append(line)
                found = re.match(r"listening at http://127\.0\.0\.1:(\d+)", line)
                port = int(found[1]) if found else port
                if line.startswith("ready"):
                    break
            else:
                pytest.fail("".join(said))
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield Running(process, port)
        finally:
            process.kill()

"""The openai package of npm drives the server."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from live_server import Running
from processes import PATIENCE_S

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.skipif(
    not (HERE / "node_modules" / "openai").is_dir(), reason="npm's openai is not installed"
)
def test_the_openai_package_of_npm(server: Running) -> None:
    """What its script asserts, and that its answer is that of the package of Python."""
    url = f"http://127.0.0.1:{server.port}/v1"
    done = subprocess.run(
        ["node", HERE / "openai_client.mjs", url],
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same = server.client().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Tell me of the sea."}],
        max_completion_tokens=16, seed=3, temperature=0.8,
    )  # fmt: skip
    assert same.usage is not None
    found = json.loads(done.stdout)
    assert found["text"] == same.choices[0].message.content
    assert found["usage"]["total_tokens"] == same.usage.total_tokens

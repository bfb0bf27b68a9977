"""guidellm drives the server."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from live_server import Running
from processes import PATIENCE_S
from windlass.options import resolve_model

REQUESTS, PROMPT, OUTPUT = 6, 40, 9


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("guidellm") is None, reason="guidellm is not installed")
@pytest.mark.parametrize("kind", ["chat_completions", "text_completions"])
def test_guidellm(server: Running, tmp_path: Path, kind: str) -> None:
    """Requests at a rate, of synthetic prompts; none fails, all have the length asked for."""
    out = tmp_path / "report.json"
    done = subprocess.run(
        ["guidellm", "benchmark", "run", "--target", f"http://127.0.0.1:{server.port}",
         "--profile", "poisson", "--rate", "3", "--max-requests", str(REQUESTS),
         "--data", f"prompt_tokens={PROMPT},output_tokens={OUTPUT}", "--request-type", kind,
         "--processor", resolve_model("demo"), "--output-path", out, "--disable-console"],
        capture_output=True, text=True, timeout=5 * PATIENCE_S, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(out.read_text())["benchmarks"]
    requests = run["requests"]
    assert len(requests["successful"]) == REQUESTS and not requests["errored"]
    for one in requests["successful"]:
        assert one["output_tokens"] == OUTPUT and one["prompt_tokens"] >= PROMPT
        assert one["time_to_first_token_ms"] > 0

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
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(server: Running, tmp_path: Path, path: str) -> None:
    """Requests at a rate, of synthetic prompts; none fails, all have the length asked for."""
    out, target = tmp_path / "report.json", f"http://127.0.0.1:{server.port}"
    done = subprocess.run(
        ["guidellm", "run", "--profile", "kind=poisson,rate=3", "--disable-console",
         "--backend", f"kind=openai_http,target={target},request_format={path}",
         "--constraint", f"kind=max_requests,count={REQUESTS}",
         "--tokenizer", f"kind=huggingface_auto,model={resolve_model('demo')}",
         "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
         "--output", f"kind=json,path={out}"],
        capture_output=True, text=True, timeout=5 * PATIENCE_S, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(out.read_text())["benchmarks"]
    requests = run["requests"]
    assert len(requests["successful"]) == REQUESTS and not requests["errored"]
    for one in requests["successful"]:
        assert one["output_tokens"] == OUTPUT and one["prompt_tokens"] >= PROMPT
        assert one["time_to_first_token_ms"] > 0

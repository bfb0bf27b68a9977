"""guidellm drives the server."""

import shutil
from pathlib import Path

import pytest

from serving import Running


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("guidellm") is None, reason="guidellm is not installed")
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(server: Running, tmp_path: Path, path: str) -> None:
    """Requests at a rate, with prompts and answers of a length; none fails."""

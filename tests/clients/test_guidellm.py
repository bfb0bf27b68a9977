"""guidellm drives the server."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from processes import PATIENCE_S
from serving import Running
from windlass.options import resolve_model


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("guidellm") is None, reason="guidellm is not installed")
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(server: Running, tmp_path: Path, path: str) -> None:
    """Requests at a rate, with prompts and answers of a length; none fails."""
    pass

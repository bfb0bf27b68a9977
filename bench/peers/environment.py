"""The environment of the peers: a virtual environment beside Windlass's own, made on first use."""

import os
import subprocess
import sys
from pathlib import Path

from machine import ROOT

_HERE = Path(__file__).resolve().parent
VENV = ROOT / ".venv-peers"
PYTHON = VENV / "bin" / "python"
_STAMP = VENV / ".installed"


def ensure() -> None:
    """Installs what `requirements.txt` names, unless done; llama.cpp is compiled for this machine,
    which takes ten minutes on two cores."""
    wanted = (_HERE / "requirements.txt").read_text(encoding="utf-8")
    if _STAMP.exists() and _STAMP.read_text(encoding="utf-8") == wanted:
        return
    print(f"{VENV}: installing transformers and llama.cpp, some ten minutes", flush=True)
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    subprocess.run(
        [
            *(str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("-c", str(ROOT / "constraints.txt"), "-r", str(_HERE / "requirements.txt")),
        ],
        env=os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
        check=True,
    )
    _STAMP.write_text(wanted, encoding="utf-8")

"""What the library does to the process that it runs in."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engines import make_model
from windlass import LLM

IMPORTS = """
import locale, logging, os, pkgutil, signal, sys, threading, warnings
import jinja2, numpy, rich.progress, tokenizers, torch

ours = logging.getLogger("windlass")

def settings():
    return {
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "type": torch.get_default_dtype(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "random": torch.initial_seed(),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "locale": locale.setlocale(locale.LC_ALL),
        "folder": os.getcwd(),
        "hooks": (sys.excepthook, threading.excepthook, sys.getswitchinterval()),
        "threads": threading.active_count(),
        "logging": (logging.getLogger().level, list(logging.getLogger().handlers)),
        "our logging": (ours.level, list(ours.handlers)),
    }

before = settings()
import windlass
names = [each.name for each in pkgutil.walk_packages(windlass.__path__, "windlass.")]
assert "windlass.llm" in names and "windlass.build.open" in names
for name in names:
    if name.endswith(("__main__", "libwindlass_cpu")):
        continue
    try:
        __import__(name)
    except ModuleNotFoundError as error:  # what only a GPU or an evaluation needs
        if str(error.name).partition(".")[0] not in ("triton", "lm_eval"):
            raise
after = settings()
assert before == after, [name for name in before if before[name] != after[name]]
"""


def test_importing_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_opening_a_model_sets_is_logged_and_said_in_its_documentation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model("mixtral", tmp_path)
    capsys.readouterr()
    before = torch.get_num_threads()
    with caplog.at_level(logging.INFO, "windlass"), LLM(str(tmp_path), host_memory="4GiB"):
        (record,) = caplog.records
    now = torch.get_num_threads()
    torch.set_num_threads(before)
    assert (record.levelname, record.name) == ("INFO", "windlass.build.open")
    said = record.getMessage()
    assert f"torch computes with {now} threads (before: {before})" in said and "malloc" in said
    assert LLM.__doc__ is not None and "whole process" in LLM.__doc__
    assert capsys.readouterr() == ("", "")

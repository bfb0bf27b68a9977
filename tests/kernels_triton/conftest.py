"""Triton's kernels in its interpreter, guarded (triton_guard.py). `make test-kernels` asks for it;
elsewhere each module is skipped by name: a process either interprets all kernels or none."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HAS_TRITON = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"

if HAS_TRITON:
    import triton_guard

    triton_guard.install()
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))


class _WithoutTriton(pytest.Module):
    def collect(self):
        pytest.skip("needs Triton's interpreter: make test-kernels", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector):
    return None if HAS_TRITON else _WithoutTriton.from_parent(parent, path=module_path)

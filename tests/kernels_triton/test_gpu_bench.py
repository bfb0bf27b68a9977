"""The script for a GPU runs here on tiny shapes, and fails where a kernel is wrong."""

import json
from pathlib import Path

import pytest
import torch

from gpu import kernels as bench


def test_a_dry_run_passes_every_check(tmp_path: Path) -> None:
    assert bench.main(["--dry", "--out", str(tmp_path)]) == 0
    checks = json.loads((tmp_path / "kernels.json").read_text())["checks"]
    kinds = [check["check"].split(" ")[0] for check in checks]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "error": 12, "bits": 6, "bf16:": 1, "rate": 5,
        "decode": 2, "prompts": 2, "linear": 3, "norm": 1, "routing": 1, "logits": 1,
    }  # fmt: skip


def test_bits_that_differ_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = iter([*[0.0] * 6, *range(1, 7)])
    monkeypatch.setattr(bench.Bench, "run", lambda *args: torch.full((9, 9), float(next(alike))))
    found = bench.Bench(bench.DRY, is_dry=True)
    found.bits()
    assert all(check["passed"] for check in found.report.checks)
    found.bits()
    passed = {c["check"]: c["passed"] for c in found.report.checks[7:] if "bits" in c["check"]}
    assert passed == {
        "bits of bf16, 16, 1 rows": True, "bits of bf16, 32, 1 rows": False,
        "bits of bf16, few, 1 rows": True, "bits of bf16, 16, 18 rows": False,
        "bits of bf16, 32, 18 rows": False, "bits of bf16, other slots": False,
    }  # fmt: skip

"""The script of whole engines on a GPU runs here, on a torch.cuda that is not there, and fails
where tokens differ, where memory exceeds its budget and where a check raises."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fake_torch_cuda import FakeTorchCuda, fake_cuda
from windlass.build import devices

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from gpu.engine_runs import Runs
from gpu.few_rows import FewRows
from gpu.report import Report
from gpu.sizes import SIZES

from gpu import engine as bench
from gpu import peer_transformers
from windlass.models.registry import read_spec
from windlass.models.spec import Moe
from windlass.perf.flops import expert_matrices

__all__ = ["fake_cuda"]  # a fixture


@pytest.fixture
def on_cpu(fake_cuda: FakeTorchCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTorchCuda:
    """The GPU's memory is the CPU's."""
    place = SimpleNamespace(device=lambda *name: torch.device("cpu"))
    monkeypatch.setattr(devices, "torch", place)
    return fake_cuda


def _seconds_of_rows(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """What passes of one row through few layers and through more take: two noisy numbers whose
    difference may have either sign on a busy machine."""
    measured, left = FewRows._row_s, iter(seconds)
    monkeypatch.setattr(FewRows, "_row_s", lambda self, n: (next(left), measured(self, n)[1]))


def test_a_dry_run_passes_every_check(on_cpu, tmp_path, monkeypatch):
    _seconds_of_rows(monkeypatch, 0.001, 0.003)
    arguments = ["--size", "dry", "--machine", "l4", "--host-memory", "8GiB", "--dtype", "auto"]
    assert bench.main([*arguments, "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "dry.json").read_text())
    found = {one["check"]: one for one in document["checks"]}
    assert "error" not in str([one for one in found.values() if one["verdict"] == "FAIL"])
    named = [name for name in found if name.endswith(": tokens")]
    assert [found[name]["compared_with"] for name in named] == [
        "none before it", "as planned", "as planned", "as planned", "none before it",
        "host attention 0.5", "as planned", "as planned", "as planned",
    ]  # fmt: skip
    assert found["host attention 0.5: tokens"]["host_attention"] == 0.5
    runs = [one for name, one in found.items() if name.endswith(": memory within its budget")]
    assert len(runs) == len(named) + 1  # one sequence
    for one in runs:
        assert one["verdict"] == "ok" and one["link_gb"] > 0 < one["decode_tokens_per_s"]
    aims = {name: one["wanted"] for name, one in found.items() if one["verdict"] in ("met", "LOW")}
    assert aims == {
        "share of the bound": 0.85, "module-based over model-based, decoding": 8.0,
        "one sequence: oracle over it": pytest.approx(1 / 1.3),
    }  # fmt: skip
    more = found["model-based: memory within its budget"]["passes"]
    assert more > found["one group: memory within its budget"]["passes"]
    assert found["a worker that fails"]["error"] == "the copy engine is gone"
    assert found["launches at one row"]["layer_us"] == pytest.approx(2000.0)
    assert found["prediction"]["took_s"] > 0
    assert document["plan"]["tiers"]["device"]["parts"]["expert"]["slots"] == 4


def test_layers_that_seem_to_take_no_time_give_no_figure(monkeypatch, tmp_path):
    report = Report(tmp_path / "found.json", {"machine": "none"}, minutes=1)
    took = iter([(0.003, None), (0.001, None)])
    monkeypatch.setattr(FewRows, "_row_s", lambda self, layers: next(took))
    runs: Any = SimpleNamespace(size=SIZES["dry"])
    FewRows(runs, report).one_row()
    assert [(one["verdict"], one["why"]) for one in report.checks] == [
        ("skipped", "2 layers took no longer than 1: 1000 and 3000 us")
    ]


class _Fails:
    """Checks, of which the first raises and the second takes all the time there is."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def raises(self) -> None:
        raise RuntimeError("no memory")

    def long(self) -> None:
        time.sleep(0.05)
        self.report.aim("rate", got=1.0, wanted=2.0)

    def late(self) -> None:
        raise AssertionError("begun without time")


def test_a_report_is_whole_after_each_check_and_says_what_was_left_out(tmp_path, capsys):
    path = tmp_path / "found.json"
    report = Report(path, {"machine": "none"}, minutes=0.08 / 60)
    checks = _Fails(report)
    assert report.run([("a", checks.raises), ("b", checks.long), ("c", checks.late)]) == 1
    document = json.loads(path.read_text())
    assert document["machine"] == "none"
    assert [(one["check"], one["verdict"]) for one in document["checks"]] == [
        ("a", "FAIL"), ("rate", "LOW"), ("c", "skipped"),
    ]  # fmt: skip
    assert document["checks"][0]["error"] == "RuntimeError: no memory"
    assert "FAIL a error RuntimeError: no memory" in capsys.readouterr().out


def test_tokens_that_differ_and_memory_beyond_its_budget_fail(tmp_path):
    report = Report(tmp_path / "found.json", {}, minutes=1)
    place: Any = None  # nothing is opened
    checks = bench.EngineBench(Runs(SIZES["dry"], place), report)
    ran: Any = SimpleNamespace(plan=SimpleNamespace(host_attention=0.0), tokens={"r0": (1, 2)},
                          decode_rate=1.0, keeps_budget=True, numbers={})  # fmt: skip
    checks._compare("a", ran)
    ran.tokens = {"r0": (1, 3)}
    checks._compare("b", ran)
    ran.tokens, ran.keeps_budget = {"r0": (1, 2)}, False
    checks._compare("c", ran)
    assert report.failed == ["b: tokens", "c: memory within its budget"]


@pytest.mark.parametrize("name", [name for name in SIZES if name != "dry"])
def test_shapes_are_those_of_the_models(name):
    """Billions of parameters of the experts of all layers: what is published of each, less
    attention and embeddings."""
    size = SIZES[name]
    spec, _ = read_spec(size.config)
    assert len(spec.blocks) == size.layers
    params = sum(
        block.ffn.num_experts * expert_matrices(spec, layer)
        for layer, block in enumerate(spec.blocks) if isinstance(block.ffn, Moe)
    )  # fmt: skip
    billions = {"deepseek-v2-lite-8": 14.4, "qwen3-30b-16": 29.0, "mixtral-16": 45.1,
                "mixtral-24": 45.1, "gpt-oss-8": 19.1}  # fmt: skip
    assert round(params / 1e9, 1) == billions[name]
    fewer = size.with_layers(4)
    assert len(read_spec(fewer.config)[0].blocks) == 4
    assert fewer.device_memory == size.device_memory * 4 // size.layers


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--size", "dry", "--out", str(tmp_path)]) == 0
    assert "skipped: torch" in capsys.readouterr().out


def test_the_peer_says_what_is_missing_and_measures_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peer_transformers, "find_spec", lambda name: None)
    assert peer_transformers.main(["--size", "mixtral-16", "--out", str(tmp_path)]) == 0
    assert "skipped: transformers, accelerate is not installed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_peer_runs_on_the_cpu(tmp_path):
    assert peer_transformers.main(["--size", "dry", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "dry-transformers.json").read_text())
    names = [one["check"] for one in document["checks"]]
    assert names == ["load", "1 sequences", "8 sequences"]
    assert all(one["decode_tokens_per_s"] > 0 for one in document["checks"][1:])

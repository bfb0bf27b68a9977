"""Few rows as graphs that a GPU keeps: whole engines give the same bits as without."""

from typing import Any

import pytest

from graph_engines import answers, watch_replays
from windlass.ids import WeightKey
from windlass.kernels import cuda_graphs

FEW: dict[str, Any] = {"moe_expert_cache_size": "64KiB"}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, FEW], ids=["whole", "pieces"])
def test_the_same_bits_as_without(gpu, checkpoint, monkeypatch, family, options):
    if gpu.is_exact and (family, options) != ("qwen3_moe", FEW):
        pytest.skip("the fake runs others in tests/runtime/test_graphs.py")
    gpu.keep_graphs()
    monkeypatch.setattr(cuda_graphs, "_LEAST_POSITIONS", 16)  # tables grow on the way
    monkeypatch.setattr(cuda_graphs, "_LEAST_PAGES", 1)
    replayed = watch_replays(monkeypatch)
    path = checkpoint(family)
    job = {"lengths": (6, 3), "steps": (3, 5)}
    with gpu.open(path, enforce_eager=True, **options) as engine:
        want = answers(engine, **job)
    assert not replayed
    with gpu.open(path, **options) as engine:
        assert answers(engine, **job) == want
    assert any(isinstance(key, WeightKey) for key in replayed) == bool(options) and replayed

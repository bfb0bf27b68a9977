"""Few rows as graphs that a GPU keeps: whole engines give the same bits as without."""

from typing import Any

import pytest

from engines import prompts, request, run_all
from windlass.engine.engine import Engine
from windlass.ids import Part, WeightKey
from windlass.kernels import cuda_graphs
from windlass.kernels.cuda_graphs import CudaCapture

FEW: dict[str, Any] = {"moe_expert_cache_size": "64KiB"}


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Keys of layers, and of pieces of them, that were replayed."""
    keys: list[object] = []
    run = CudaCapture.run

    def watched(capture: CudaCapture, key: object, *args: Any, **more: Any) -> object:
        before = capture.num_replayed
        result = run(capture, key, *args, **more)
        keys.extend([key] * (capture.num_replayed - before))
        return result

    monkeypatch.setattr(CudaCapture, "run", watched)
    return keys


def _answers(engine: Engine) -> list[dict[str, Any]]:
    """Sequences that begin and end at different times, in two jobs: others are where those were."""
    found = []
    for seed in (0, 1):
        requests = [
            request(f"r{i}", prompt, max_tokens=3 + 3 * i, logprobs=2)
            for i, prompt in enumerate(prompts((9, 20, 5), seed=seed))
        ]
        found.append({name: out.outputs[0] for name, out in run_all(engine, requests).items()})
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "lfm2_moe"])
@pytest.mark.parametrize("options", [{}, FEW], ids=["whole layers", "pieces"])
def test_the_same_bits_as_without(gpu, checkpoint, monkeypatch, replayed, family, options):
    monkeypatch.setattr(cuda_graphs, "_LEAST_POSITIONS", 16)  # tables grow on the way
    monkeypatch.setattr(cuda_graphs, "_LEAST_PAGES", 1)
    gpu.keep_graphs()
    path = checkpoint(family)
    with gpu.open(path, enforce_eager=True, **options) as engine:
        answers = _answers(engine)
    assert all(len(one.token_ids) > 2 for job in answers for one in job.values())
    assert not replayed
    with gpu.open(path, **options) as engine:
        assert _answers(engine) == answers
    pieces = {key[0] for key in replayed if isinstance(key, tuple) and not isinstance(key, WeightKey)}
    blocks = {key for key in replayed if isinstance(key, WeightKey)}
    if options:
        assert pieces == {"experts", "combine"} and {key.part for key in blocks} == {Part.BLOCK}
    else:
        assert replayed and not pieces and not blocks

"""Quantised checkpoints through the whole engine: transformers runs the dequantised weights."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from engines import engine_for, make_model, prompts, request, run_all
from fakes import FakeDevice
from golden import TOLERANCE, distance
from quantised import make_quantised
from quantised_cases import CASES
from windlass.errors import CheckpointError, UsageError
from windlass.ids import Part

LENGTHS = (70, 9)
STEPS = 12


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, tmp_path_factory) -> tuple[Path, Any]:
    """A quantised checkpoint, and transformers' model of its dequantised twin."""
    case, path = CASES[request.param], tmp_path_factory.mktemp("quantised")
    return path, make_quantised(case.family, case.quantiser, case.settings, path, **case.changes)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_equal_to_transformers_on_dequantised_weights(
    checkpoint: tuple[Path, Any], backend: str
) -> None:
    path, model = checkpoint
    texts = prompts(LENGTHS)
    with engine_for(path, max_num_batched_tokens=80, moe_backend=backend) as engine:
        requests = [request(str(i), p, max_tokens=STEPS, logprobs=-1) for i, p in enumerate(texts)]
        results = run_all(engine, requests)
    are_equal, worst = distance(model, texts, results)
    assert are_equal
    assert worst <= TOLERANCE, f"{worst:.1e}"


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", ["fp8", "mxfp4", "gptq-reordered", "int8-everything"])
def test_bits_do_not_depend_on_budget_batch_or_arrival(
    name: str, backend: str, tmp_path: Path
) -> None:
    case = CASES[name]
    make_quantised(case.family, case.quantiser, case.settings, tmp_path, **case.changes)
    requests = [
        request(f"r{i}", p, max_tokens=5 + 3 * i, logprobs=3)
        for i, p in enumerate(prompts((70, 3, 33)))
    ]
    alone = {}
    with engine_for(tmp_path, moe_backend=backend) as engine:
        for one in requests:
            alone.update(run_all(engine, [one]))
        slots = engine.plan.host.of(Part.EXPERT).slot_bytes or 0
    options: dict[str, Any] = dict(
        moe_expert_cache_size=f"{2 * slots // 1024}KiB", micro_batch_size=64, moe_backend=backend
    )
    device = FakeDevice(seed=1)
    with engine_for(tmp_path, device=device, max_num_batched_tokens=75, **options) as engine:
        together = run_all(engine, requests)
        stats = engine.stats()
    assert stats.expert_hits < stats.expert_requests
    for key, output in alone.items():
        first, second = output.outputs[0], together[key].outputs[0]
        assert first.token_ids == second.token_ids and first.logprobs == second.logprobs


def test_packed_bytes_are_all_that_is_read_and_kept(tmp_path: Path) -> None:
    """Slots and reads are those of the stored codes, a quarter of bf16's."""
    case = CASES["int4-group"]
    settings: dict[str, Any] = dict(moe_intermediate_size=512, hidden_size=256)
    make_quantised(case.family, case.quantiser, case.settings, tmp_path, **settings)
    elements = 3 * 512 * 256
    with engine_for(tmp_path) as engine:
        run_all(engine, [request("a", prompts((9,))[0])])
        slot = engine.plan.host.of(Part.EXPERT).slot_bytes or 0
        stats = engine.stats()
    stored = elements // 2 + 2 * elements // 8  # bf16 scales
    assert stored <= slot <= stored + 6 * 4096
    files = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert stats.bytes_read < 1.2 * files


@pytest.mark.parametrize(
    ("ending", "value", "message"),
    [
        (".bias", -0.5, "got a bias with 1 numbers that are not 0, allowed all 0 in a model"),
        (".qzeros", 0x66666666, "got zero points of 6, 7, allowed all 7 or all 8"),
    ],
)
def test_tensors_that_should_say_nothing_and_do(
    ending: str, value: float, message: str, tmp_path: Path
) -> None:
    """Of one expert of many: it is read with the expert, through a cache of few."""
    case = CASES["gptq-symmetric"]
    make_quantised(case.family, case.quantiser, case.settings, tmp_path, **case.changes)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.2.mlp.experts.3.up_proj{ending}"
    tensors[name].view(-1)[2] = value
    save_file(tensors, file, metadata={"format": "pt"})
    one = request("a", prompts((60,))[0])
    with engine_for(tmp_path, moe_expert_cache_size="2") as engine:
        with pytest.raises(CheckpointError) as caught:
            run_all(engine, [one])
    assert f"tensor {name}: {message}" in str(caught.value)


@pytest.mark.parametrize(("asserted", "found"), [("fp8", "gptq"), ("awq", None), ("gptq", "gptq")])
def test_quantization_is_an_assertion(asserted: str, found: str | None, tmp_path: Path) -> None:
    if found is None:
        make_model("qwen3_moe", tmp_path)
    else:
        case = CASES[found]
        make_quantised(case.family, case.quantiser, case.settings, tmp_path)
    if asserted == found:
        engine_for(tmp_path, quantization=asserted).close()
        return
    with pytest.raises(UsageError) as caught:
        engine_for(tmp_path, quantization=asserted)
    assert f"quantization: got '{asserted}'" in str(caught.value)
    assert (found or "not quantised") in str(caught.value)

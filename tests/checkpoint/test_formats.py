"""Quantised checkpoints through the whole engine: transformers runs the dequantised weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_engine_golden import TOLERANCE, _reference

import quantised
from engines import engine_for, logprob_rows, make_model, prompts, request, run_all
from fakes import FakeDevice
from quantised import Quantiser, make_quantised
from windlass.errors import UsageError
from windlass.ids import Part

LENGTHS = (70, 9)
STEPS = 32


class Case(NamedTuple):
    family: str
    quantiser: Quantiser
    settings: dict[str, Any]
    changes: dict[str, Any]


FP8 = dict(
    quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128]
)
# two blocks or more each way, the last ones ragged
DEEPSEEK = dict(
    hidden_size=160, num_hidden_layers=2, kv_lora_rank=144, q_lora_rank=136, qk_nope_head_dim=128,
    v_head_dim=128, num_attention_heads=2, num_key_value_heads=2, intermediate_size=200,
    moe_intermediate_size=136,
)  # fmt: skip
MXFP4 = dict(
    quant_method="mxfp4",
    modules_to_not_convert=["model.layers.*.self_attn", "model.layers.*.mlp.router",
                            "model.embed_tokens", "lm_head"],
)  # fmt: skip


_ROUTERS = ("lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$")


def compressed(form: str, *, ignore: Sequence[str] = _ROUTERS, **weights: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False,
               "observer": "minmax", "observer_kwargs": {}, "group_size": None,
               "block_structure": None, "actorder": None, **weights}  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None,
             "output_activations": None}  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None, "quantization_status": "compressed", "version": "0.9.4",
        "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip


def gptq(**changes: Any) -> dict[str, Any]:
    """As AutoGPTQ and GPTQModel write it."""
    return {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": False,
            "damp_percent": 0.01, "true_sequential": True, "static_groups": False,
            "checkpoint_format": "gptq", "lm_head": False, "dynamic": {"-:.*mlp\\.gate$": {}},
            **changes}  # fmt: skip


AWQ = dict(quant_method="awq", bits=4, group_size=8, zero_point=True, version="gemm",
           modules_to_not_convert=["gate"])  # fmt: skip
FLOAT = dict(num_bits=8, type="float")
INT = dict(strategy="group", group_size=8)

CASES = {
    "fp8": Case("deepseek_v3", quantised.fp8_block(), FP8, DEEPSEEK),
    "mxfp4": Case(
        "gpt_oss", quantised.mxfp4, MXFP4, dict(hidden_size=64, intermediate_size=96)
    ),
    "int4-group": Case(
        "qwen3_moe", quantised.compressed(4, 8), compressed("pack-quantized", **INT), {}
    ),
    "int4-group-asymmetric": Case(
        "mixtral",
        quantised.compressed(4, 8, is_symmetric=False),
        compressed("pack-quantized", symmetric=False, **INT),
        {},
    ),
    "int4-group-reordered": Case(
        "qwen3_moe",
        quantised.compressed(4, 8, is_shuffled=True),
        compressed("pack-quantized", actorder="group", **INT),
        {},
    ),
    "int8-channel": Case(
        "mixtral",
        quantised.compressed(8, -1),
        compressed("pack-quantized", num_bits=8, strategy="channel"),
        dict(intermediate_size=43, hidden_size=36),
    ),
    "fp8-channel": Case(
        "qwen3_moe",
        quantised.fp8_rows,
        compressed("float-quantized", strategy="channel", **FLOAT),
        dict(moe_intermediate_size=23),
    ),
    "fp8-tensor": Case(
        "mixtral",
        quantised.fp8_tensor,
        compressed("float-quantized", strategy="tensor", **FLOAT),
        {},
    ),
    "gptq": Case("qwen3_moe", quantised.gptq(4, 8), gptq(), {}),
    "gptq-reordered": Case(
        "mixtral", quantised.gptq(4, 8, is_shuffled=True), gptq(desc_act=True), {}
    ),
    "gptq-int8-v2": Case(
        "mixtral",
        quantised.gptq(8, -1, stored_less=0),
        gptq(bits=8, group_size=-1, checkpoint_format="gptq_v2"),
        {},
    ),
    "awq": Case("mixtral", quantised.awq(8), AWQ, {}),
    "int4-fused": Case(  # rows of each head of fused projections
        "qwen3_next",
        quantised.compressed(4, 8),
        compressed("pack-quantized", **INT, ignore=["lm_head", "re:.*gate$"]),
        {},
    ),
    "int8-everything": Case(  # routers, gates and the head too
        "qwen3_next",
        quantised.compressed(8, -1),
        compressed("pack-quantized", num_bits=8, strategy="channel", ignore=[]),
        dict(everything=True),
    ),
    "fp8-everything": Case(
        "qwen3_moe",
        quantised.fp8_tensor,
        compressed("float-quantized", strategy="tensor", ignore=[], **FLOAT),
        dict(everything=True),
    ),
}  # fmt: skip


def compare(case: Case, path: Path, **options: Any) -> tuple[bool, float]:
    """Runs a quantised checkpoint and its dequantised twin: (all tokens equal, largest error)."""
    model = make_quantised(case.family, case.quantiser, case.settings, path, **case.changes)
    texts = prompts(LENGTHS)
    with engine_for(path, max_num_batched_tokens=80, **options) as engine:
        requests = [request(str(i), p, max_tokens=STEPS, logprobs=-1) for i, p in enumerate(texts)]
        results = run_all(engine, requests)
    are_equal, worst = True, 0.0
    for i, prompt in enumerate(texts):
        with torch.inference_mode():
            tokens, rows = _reference(model, prompt)
        are_equal &= list(results[str(i)].outputs[0].token_ids) == tokens
        worst = max(worst, (logprob_rows(results[str(i)]) - rows).abs().max().item())
    return are_equal, worst


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_transformers_on_dequantised_weights(
    name: str, backend: str, tmp_path: Path
) -> None:
    are_equal, worst = compare(CASES[name], tmp_path, moe_backend=backend)
    assert are_equal
    assert worst <= TOLERANCE, f"{name}: {worst:.1e}"


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
    for one in requests:
        with engine_for(tmp_path, moe_backend=backend) as engine:
            alone.update(run_all(engine, [one]))
            slots = engine.plan.host.of(Part.EXPERT).slot_bytes
    options = dict(
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
    settings = dict(moe_intermediate_size=512, hidden_size=256)
    make_quantised(case.family, case.quantiser, case.settings, tmp_path, **settings)
    elements = 3 * 512 * 256
    with engine_for(tmp_path) as engine:
        run_all(engine, [request("a", prompts((9,))[0])])
        slot = engine.plan.host.of(Part.EXPERT).slot_bytes
        stats = engine.stats()
    stored = elements // 2 + 2 * elements // 8  # bf16 scales
    assert stored <= slot <= stored + 6 * 4096
    files = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert stats.bytes_read < 1.2 * files


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

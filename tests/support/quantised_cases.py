"""Quantised checkpoints as programs write them: `quantization_config`, and the tensors it names."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import quantised
from quantised import Quantiser


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


# As GPTQModel 5 writes it into config.json, and GPTQModel 4 with `hyb_act`
GPTQMODEL: dict[str, Any] = {
    "bits": 4, "group_size": 8, "desc_act": False, "lm_head": False, "method": "gptq",
    "quant_method": "gptq", "format": "gptq", "checkpoint_format": "gptq", "pack_dtype": "int32",
    "sym": True, "pack_impl": "cpu", "hyb_act": False, "act_group_aware": True,
    "offload_to_disk": True, "dynamic": {"-:.*mlp\\.gate$": {}, "lm_head": {}},
    "meta": {"quantizer": ["gptqmodel:5.6.12"], "uri": "https://github.com/modelcloud/gptqmodel",
             "damp_percent": 0.05, "static_groups": False, "mse": 0.0, "gptaq": False},
}  # fmt: skip


AWQ_BY_GPTQMODEL = {
    **GPTQMODEL, "method": "awq", "quant_method": "awq", "format": "gemm", "version": "gemm",
    "checkpoint_format": "gemm", "zero_point": True, "modules_to_not_convert": None,
}  # fmt: skip


# As AutoRound 0.12 writes it
AUTO_ROUND: dict[str, Any] = {
    "bits": 4, "data_type": "int", "group_size": 8, "sym": True, "iters": 200, "nsamples": 128,
    "low_gpu_mem_usage": True, "enable_quanted_input": False, "autoround_version": "0.12.3",
    "block_name_to_quantize": "model.layers", "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "extra_config": {"model.layers.0.block_sparse_moe.gate": {"bits": 16, "data_type": "float"},
                     ".*block_sparse_moe\\.gate.*": {"bits": 16, "data_type": "fp"}},
}  # fmt: skip


# One scale for each matrix, as AutoFP8 and vLLM's tools write it
FP8_TENSOR: dict[str, Any] = dict(
    quant_method="fp8", activation_scheme="static", is_checkpoint_fp8_serialized=True,
    ignored_layers=["lm_head", "model.layers.0.block_sparse_moe.gate"],
)  # fmt: skip


AWQ = dict(quant_method="awq", bits=4, group_size=8, zero_point=True, version="gemm",
           modules_to_not_convert=["gate"])  # fmt: skip


FLOAT: dict[str, Any] = dict(num_bits=8, type="float")


INT: dict[str, Any] = dict(strategy="group", group_size=8)


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
    "gptq-symmetric": Case(
        "qwen3_moe", quantised.gptq(4, 8, is_symmetric=True, has_bias=True), GPTQMODEL, {}
    ),
    "auto-round": Case("mixtral", quantised.gptq(4, 8), {**AUTO_ROUND, "sym": False}, {}),
    "fp8-static": Case("mixtral", quantised.fp8_scalar, FP8_TENSOR, {}),
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

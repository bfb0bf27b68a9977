"""quantization_config: what it names, what is refused, and tensors that do not fit it."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import engine_for, prompts, request, run_all
from layouts import expected_tensors
from published import PUBLISHED, SMALL_MIXTRAL
from quantised_cases import (
    AUTO_ROUND,
    AWQ,
    AWQ_BY_GPTQMODEL,
    CASES,
    FLOAT,
    FP8,
    FP8_TENSOR,
    GPTQMODEL,
    INT,
    MXFP4,
    compressed,
    gptq,
)
from windlass.checkpoint import synthetic as synth
from windlass.checkpoint.layout import ITEM_BYTES, build_layout, expected_stored
from windlass.checkpoint.part_reads import slot_bytes
from windlass.errors import CheckpointError, ModelError, UsageError
from windlass.formats import WeightFormat
from windlass.ids import Part, WeightKey
from windlass.models.config import Config
from windlass.models.module_names import hub_modules, listed_modules
from windlass.models.names import NameMap, TensorInfo
from windlass.models.quantization import Quantization, Scheme
from windlass.models.quantization_config import read_quantization
from windlass.models.registry import read_spec
from windlass.models.spec import ModelSpec
from windlass.options import checkpoint_stamp, read_config
from windlass.quantize.convert import QuantizeOptions, quantize
from windlass.quantize.scheme import IntegerScheme

E4M3 = WeightFormat(code="e4m3", rows=0)  # one scale
SYMMETRIC = WeightFormat(code="int4", packing="gptq", columns=8)
BY_LETTER = WeightFormat(code="int4", packing="gptq", columns=8, zero="gptq", zero_add=1)
BY_AWQ = WeightFormat(code="int4", packing="awq", columns=8, zero="awq")
MODELOPT: dict[str, Any] = {
    "producer": {"name": "modelopt", "version": "0.27.1"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "group_size": None,
                     "exclude_modules": ["lm_head", "*.block_sparse_moe.gate"]},
}  # fmt: skip
# The same in config.json
MODELOPT_INSIDE: dict[str, Any] = {
    "quant_method": "modelopt", "quant_algo": "FP8", "producer": MODELOPT["producer"],
    "ignore": MODELOPT["quantization"]["exclude_modules"],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "config_groups": {"group_0": {
        "targets": ["Linear"], "input_activations": {"num_bits": 8, "type": "float"},
        "weights": {"dynamic": False, "num_bits": 8, "type": "float"}}},
}  # fmt: skip
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2"


def parse(settings: dict[str, Any], **outer: Any) -> Quantization:
    found = read_quantization(Config({"quantization_config": settings, **outer}))
    assert found is not None
    return found


def scheme_of(settings: dict[str, Any], module: str) -> tuple[Scheme | None, bool]:
    """And whether that is certain."""
    found = parse(settings)
    scheme = found.find([module], is_expert=".experts." in module)
    return scheme, scheme is None or found.is_certain([module])


def groups(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """compressed-tensors settings with other groups."""
    return {**settings, "config_groups": {**settings["config_groups"], **more}}


def weights(**changes: Any) -> dict[str, Any]:
    """compressed-tensors settings whose only group has other weights."""
    settings = compressed("pack-quantized", **INT)
    settings["config_groups"]["group_0"]["weights"].update(changes)
    return settings


# --- config.json ----------------------------------------------------------------------------------


def test_no_quantization_config_is_none() -> None:
    assert read_quantization(Config({})) is None
    assert read_quantization(Config({"quantization_config": None})) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (FP8, WeightFormat(code="e4m3", rows=128, columns=128)),
        ({**FP8, "fmt": "float8_e4m3fn", "scale_fmt": "ue8m0"},
         WeightFormat(code="e4m3", rows=128, columns=128)),
        (MXFP4, WeightFormat(code="e2m1", columns=32)),
        (compressed("pack-quantized", **INT), WeightFormat(code="int4", columns=8)),
        (compressed("pack-quantized", group_size=32), WeightFormat(code="int4", columns=32)),
        (compressed("pack-quantized", group_size=-1), WeightFormat(code="int4")),
        (compressed("pack-quantized"), WeightFormat(code="int4", rows=0)),
        (compressed("pack-quantized", num_bits=8, symmetric=False, **INT),
         WeightFormat(code="int8", columns=8, zero="rows")),
        (compressed("pack-quantized", actorder="group", **INT),
         WeightFormat(code="int4", columns=8, has_groups=True)),
        (compressed("pack-quantized", actorder="weight", **INT),
         WeightFormat(code="int4", columns=8)),
        (compressed("float-quantized", strategy="tensor", **FLOAT),
         WeightFormat(code="e4m3", rows=0)),
        (compressed("float-quantized", strategy="channel", **FLOAT), WeightFormat(code="e4m3")),
        (compressed("float-quantized", strategy="block", block_structure=[128, 128], **FLOAT),
         WeightFormat(code="e4m3", rows=128, columns=128)),
        (gptq(), WeightFormat(code="int4", packing="gptq", columns=8, zero="gptq", zero_add=1)),
        (gptq(checkpoint_format="gptq_v2", bits=8), WeightFormat(
            code="int8", packing="gptq", columns=8, zero="gptq")),
        (gptq(group_size=-1, desc_act=True, checkpoint_format=None, format="gptq_v2"),
         WeightFormat(code="int4", packing="gptq", zero="gptq")),
        (gptq(desc_act=True), WeightFormat(
            code="int4", packing="gptq", columns=8, zero="gptq", zero_add=1, has_groups=True)),
        (AWQ, WeightFormat(code="int4", packing="awq", columns=8, zero="awq")),
        ({**AWQ, "version": "GEMM", "group_size": 128}, WeightFormat(
            code="int4", packing="awq", columns=128, zero="awq")),
        # symmetric codes: whatever the program calls its zero points
        (gptq(sym=True), SYMMETRIC),
        (gptq(sym=True, checkpoint_format="gptq_v2"), SYMMETRIC),
        (gptq(sym=None), SYMMETRIC),
        (gptq(sym=True, bits=8, desc_act=True),
         replace(SYMMETRIC, code="int8", has_groups=True)),
        # as other programs write them
        (GPTQMODEL, SYMMETRIC),
        ({**GPTQMODEL, "sym": False}, BY_LETTER),
        ({**GPTQMODEL, "sym": False, "format": "gptq_v2", "checkpoint_format": "gptq_v2"},
         replace(BY_LETTER, zero_add=0)),
        ({**GPTQMODEL, "modules_to_not_convert": [], "ignored_layers": [],
          "packed_modules_mapping": {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}}, SYMMETRIC),
        (AWQ_BY_GPTQMODEL, BY_AWQ),
        ({**AWQ, "modules_to_not_convert": [], "pack_dtype": "int32"}, BY_AWQ),
        ({**AWQ, "modules_to_not_convert": None}, BY_AWQ),
        (AUTO_ROUND, SYMMETRIC),
        ({**AUTO_ROUND, "bits": 8, "extra_config": None}, replace(SYMMETRIC, code="int8")),
        ({**AUTO_ROUND, "sym": False}, BY_LETTER),
        ({**AUTO_ROUND, "sym": False, "packing_format": "auto_round:auto_awq"}, BY_AWQ),
        (FP8_TENSOR, E4M3),
        ({**FP8_TENSOR, "activation_scheme": "dynamic", "ignored_layers": []}, E4M3),
        ({**FP8, "weight_block_size": None, "weight_per_tensor": True}, E4M3),
        ({**FP8, "ignored_layers": [], "weight_per_tensor": False, "act_per_tensor": False,
          "packed_modules_mapping": {}}, WeightFormat(code="e4m3", rows=128, columns=128)),
        ({**compressed("pack-quantized", **INT), "run_compressed": False,
          "packed_modules_mapping": {}, "ignored_layers": []},
         WeightFormat(code="int4", columns=8)),
        (MODELOPT_INSIDE, E4M3),
    ],
)  # fmt: skip
def test_formats(settings: dict[str, Any], expected: WeightFormat) -> None:
    scheme, _ = scheme_of(settings, EXPERT)
    assert scheme is not None and scheme.format == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes'"),
        ({"quant_method": "gguf"}, "allowed fp8, mxfp4, compressed-tensors, gptq, awq"),
        ({"bits": 4}, "quant_method is None"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "w4afp8"}, "w4afp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"},
         "quant_algo is 'NVFP4', allowed 'FP8'"),
        ({**FP8, "weight_block_size": [64, 128]}, "weight_block_size is [64, 128]"),
        ({**FP8, "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({**FP8, "activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({**FP8, "weight_per_tensor": True}, "weight_per_tensor is True, allowed False"),
        ({**FP8_TENSOR, "weight_per_tensor": False}, "weight_per_tensor is False, allowed True"),
        ({**FP8_TENSOR, "scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0', allowed 'float'"),
        ({**FP8_TENSOR, "activation_scheme": "row"}, "'row', allowed 'dynamic', 'static'"),
        ({**FP8, "is_checkpoint_fp8_serialized": False},
         "is_checkpoint_fp8_serialized is False, allowed True"),
        ({**MODELOPT_INSIDE, "quant_algo": "FP8_PB_WO"},
         "quant_algo is 'FP8_PB_WO', allowed 'FP8'"),
        ({**MODELOPT_INSIDE, "quant_algo": None}, "quant_algo is None"),
        ({**MODELOPT_INSIDE, "config_groups": {"g": {"weights": {"num_bits": 4}}}},
         "num_bits is 4"),
        ({**MODELOPT_INSIDE, "config_groups": {"g": {"weights": {
            "num_bits": 8, "type": "float", "strategy": "channel"}}}}, "strategy is 'channel'"),
        ({**MODELOPT_INSIDE, "config_groups": {"g": {"weights": {
            "num_bits": 8, "type": "float", "rotation": 1}}}}, "unknown key 'rotation'"),
        ({**MODELOPT_INSIDE, "pre_quant_scale": True}, "unknown key 'pre_quant_scale'"),
        ({**FP8, "expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
        ({**FP8, "modules_to_convert": ["embed_tokens"]}, "modules_to_convert"),
        ({**FP8, "rotation": 3}, "unknown key 'rotation'"),
        ({**FP8, "modules_to_not_convert": ["a(b"]}, "'(?:a(b)"),
        ({**MXFP4, "block": 16}, "unknown key 'block'"),
        (gptq(bits=3), "bits is 3, allowed 4, 8"),
        (gptq(bits=None), "bits is missing"),
        (gptq(group_size=0), "group_size is 0, allowed -1 or a multiple of 8"),
        (gptq(group_size=None), "group_size is missing"),
        (gptq(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
        (gptq(is_marlin_format=True), "is_marlin_format is True"),
        (gptq(dynamic={"+:.*down.*": {"bits": 8}}), "dynamic: +:.*down.* has bits = 8"),
        (gptq(dynamic={".*": {"adapter": "lora"}}), "has adapter"),
        (gptq(dynamic={".*": 3}), "dynamic: .* is 3, allowed an object"),
        (gptq(adapter={"rank": 4}), "unknown key 'adapter'"),
        ({**GPTQMODEL, "format": "gptq_v2"},
         "got checkpoint_format = 'gptq', format = 'gptq_v2', allowed one value for both"),
        ({**GPTQMODEL, "format": "bitblas"}, "format is 'bitblas', allowed 'gptq', 'gptq_v2'"),
        ({**GPTQMODEL, "method": "awq"}, "got quant_method = 'gptq', method = 'awq'"),
        ({**GPTQMODEL, "pack_dtype": "int16"}, "pack_dtype is 'int16', allowed 'int32'"),
        ({**GPTQMODEL, "dynamic": {"+:.*down": {"group_size": 16}}},
         "+:.*down has group_size = 16"),
        ({**GPTQMODEL, "modules_to_not_convert": ["up_proj"]},
         "modules_to_not_convert is ['up_proj'], allowed []"),
        ({**AWQ_BY_GPTQMODEL, "format": "gemv"}, "format is 'gemv', allowed 'gemm', 'GEMM'"),
        ({**AWQ_BY_GPTQMODEL, "checkpoint_format": "gemv_fast"},
         "checkpoint_format is 'gemv_fast'"),
        ({**AWQ_BY_GPTQMODEL, "pack_dtype": "int64"}, "pack_dtype is 'int64'"),
        ({**AWQ_BY_GPTQMODEL, "dynamic": {".*": {"bits": 8}}}, "dynamic: .* has bits = 8"),
        ({**AWQ_BY_GPTQMODEL, "ignored_layers": ["x"]}, "ignored_layers is ['x'], allowed []"),
        ({**AUTO_ROUND, "packing_format": "auto_round"},
         "packing_format is 'auto_round', allowed 'auto_round:auto_gptq', 'auto_round:auto_awq'"),
        ({**AUTO_ROUND, "packing_format": "auto_round:llm_compressor", "data_type": "mx_fp"},
         "data_type is 'mx_fp', allowed 'int'"),
        ({**AUTO_ROUND, "packing_format": "auto_round:auto_awq", "bits": 8},
         "bits is 8, allowed 4"),
        ({**AUTO_ROUND, "extra_config": {"a.b": 3}}, "a.b is 3, allowed an object"),
        ({**AUTO_ROUND, "extra_config": {"a.b": {"bits": 8}}},
         "extra_config: a.b: bits is 8, allowed 4"),
        ({**AUTO_ROUND, "extra_config": {"a.b": {"sym": False}}},
         "a.b: sym is False, allowed True"),
        ({**AUTO_ROUND, "extra_config": {"a.b": {"group_size": 32}}}, "a.b: group_size is 32"),
        ({**AUTO_ROUND, "extra_config": {"a.b": {"data_type": "mx_fp"}}}, "data_type is 'mx_fp'"),
        ({**AUTO_ROUND, "extra_config": {"a.b": {"rotation": 1}}}, "unknown key 'rotation'"),
        ({**AUTO_ROUND, "extra_config": {"a(.*": {"bits": 16}}}, "'.*(?:a(.*)' is no regular"),
        ({**AUTO_ROUND, "hadamard_config": {"n": 1}},
         "unknown key 'hadamard_config' of auto-round"),
        ({**compressed("pack-quantized", **INT), "ignored_layers": ["a"]},
         "ignored_layers is ['a'], allowed []"),
        ({**AWQ, "version": "gemv"}, "version is 'gemv', allowed 'gemm'"),
        ({**AWQ, "version": "marlin"}, "version is 'marlin'"),
        ({**AWQ, "bits": 8}, "bits is 8, allowed 4"),
        ({**AWQ, "zero_point": False}, "zero_point is False"),
        ({**AWQ, "desc_act": True}, "desc_act is True"),
        (compressed("int-quantized", num_bits=8), "format is 'int-quantized', allowed pack-quant"),
        (compressed("nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
        (compressed("marlin-24"), "marlin-24"),
        (weights(num_bits=2), "num_bits is 2, allowed 4, 8"),
        (weights(type="float"), "type is 'float', allowed 'int'"),
        (weights(strategy="block"), "strategy is 'block'"),
        (weights(strategy="tensor_group"), "strategy is 'tensor_group'"),
        (weights(strategy="tensor", symmetric=False), "symmetric is False"),
        (weights(dynamic=True), "dynamic is True"),
        (weights(group_size=12), "group_size is 12"),
        (weights(actorder="sorted"), "actorder is 'sorted'"),
        (weights(rotation="hadamard"), "unknown key 'rotation'"),
        (compressed("float-quantized", num_bits=4, type="float"), "num_bits is 4, allowed 8"),
        (compressed("float-quantized", num_bits=8), "type is 'int', allowed 'float'"),
        (compressed("float-quantized", symmetric=False, **FLOAT), "symmetric is False"),
        (compressed("float-quantized", strategy="block", **FLOAT), "block_structure is None"),
        (compressed("float-quantized", strategy="group", **FLOAT), "strategy is 'group'"),
        ({**compressed("pack-quantized"), "config_groups": {}}, "config_groups is empty"),
        ({**compressed("pack-quantized"), "config_groups": {"W4A16": ["Linear"]}}, "an object"),
        (groups(compressed("pack-quantized"), g={"targets": ["Linear"]}), "weights is missing"),
        ({**compressed("pack-quantized"), "sparsity_config": {"format": "sparse-24-bitmask"}},
         "sparsity_config"),
        ({**compressed("pack-quantized"), "transform_config": {"config_groups": {"u": {}}}},
         "transform_config"),
        ({**compressed("pack-quantized"), "moe_sparsity_config": {"method": "prune"}},
         "unknown key 'moe_sparsity_config'"),
        ({**compressed("pack-quantized"), "ignore": ["re:("]}, "'(' is no regular expression"),
    ],
)  # fmt: skip
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse(settings)
    assert message in str(caught.value) and "quantization_config" in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        {"input_activations": {"num_bits": 8, "type": "float", "dynamic": True}},
        {"input_activations": {"num_bits": 8, "type": "float", "dynamic": False}},
    ],
)
def test_quantised_activations_are_left_to_others(more: dict[str, Any]) -> None:
    settings = compressed("float-quantized", strategy="channel", **FLOAT)
    settings["config_groups"]["group_0"].update(more)
    settings["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    assert parse(settings) == parse(compressed("float-quantized", strategy="channel", **FLOAT))


def test_which_modules() -> None:
    own = compressed("pack-quantized", **INT)
    special = {
        "targets": ["re:.*down_proj", "a.b"],
        "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    }
    settings = {**groups(own, group_1=special), "format": "mixed-precision",
                "ignore": ["lm_head", "re:.*self_attn", "x.down_proj"]}  # fmt: skip
    settings["config_groups"]["group_0"]["format"] = "pack-quantized"

    def naming(module: str) -> str | None:
        scheme, is_certain = scheme_of(settings, module)
        assert is_certain
        return None if scheme is None else scheme.naming

    assert naming("model.layers.3.mlp.experts.7.up_proj") == "packed"
    assert naming("model.layers.3.mlp.experts.7.down_proj") == "float"
    assert naming("a.b") == "float" and naming("a.bc") == "packed"
    assert naming("x.down_proj") is None
    assert naming("model.layers.3.self_attn.q_proj") is None
    assert naming("lm_head") is None and naming("model.lm_head") == "packed"


def test_names_win_over_patterns_and_patterns_over_classes() -> None:
    def group(target: str, size: int) -> dict[str, Any]:
        return {"targets": [target], "weights": {"num_bits": 4, "group_size": size}}

    settings = compressed("pack-quantized")
    settings["config_groups"] = {
        "a": group("Linear", 8), "b": group("re:.*up", 16), "c": group("x.up", 32),
        "d": group("LSTM", 64),
    }  # fmt: skip
    found = [scheme_of(settings, module)[0] for module in ("x.down", "y.up", "x.up")]
    assert [scheme and scheme.format.columns for scheme in found] == [8, 16, 32]


def test_experts_alone_are_mxfp4() -> None:
    assert scheme_of(MXFP4, "model.layers.0.mlp.experts.gate_up_proj")[0] is not None
    assert scheme_of(MXFP4, "model.layers.0.mlp.shared.gate_up_proj") == (None, True)
    settings = {**MXFP4, "modules_to_not_convert": ["model.layers.3.mlp.experts"]}
    assert scheme_of(settings, "model.layers.3.mlp.experts.down_proj") == (None, True)
    assert scheme_of(settings, "model.layers.31.mlp.experts.down_proj")[0] is not None


def test_gptq_is_sure_only_of_lists() -> None:
    up, q = "model.layers.0.mlp.experts.0.up_proj", "model.layers.0.self_attn.q_proj"
    assert scheme_of(gptq(), up)[1] is False
    listed = gptq(modules_in_block_to_quantize=[["self_attn.q_proj"], ["experts.0.up_proj"]])
    assert scheme_of(listed, q)[0] is not None and scheme_of(listed, q)[1]
    assert scheme_of(listed, "model.layers.0.self_attn.o_proj") == (None, True)
    skipped = gptq(dynamic={"-:.*self_attn": {}, "+:.*up": {"bits": 4}})
    assert scheme_of(skipped, q) == (None, True)


def test_auto_round_says_which_modules() -> None:
    gate, up = "model.layers.3.block_sparse_moe.gate", "model.layers.3.mlp.up_proj"
    assert scheme_of(AUTO_ROUND, up) == (Scheme("gptq", SYMMETRIC), False)
    assert scheme_of(AUTO_ROUND, gate)[0] is None
    assert scheme_of({**AUTO_ROUND, "extra_config": {f"{up}": {"bits": 16}}}, up)[0] is None
    assert scheme_of(AUTO_ROUND, "lm_head")[0] is None
    alike = {"bits": 4, "group_size": 8, "sym": True, "data_type": "int", "act_bits": 16}
    unsaid = {**AUTO_ROUND, "sym": None, "data_type": None, "extra_config": {up: alike}}
    assert scheme_of(unsaid, up)[0] == Scheme("gptq", SYMMETRIC)
    listed = {**AUTO_ROUND, "block_name_to_quantize": ["model.layers", "head"]}
    named = {**AUTO_ROUND, "block_name_to_quantize": "model.layers,head"}
    for settings in (listed, named, {**AUTO_ROUND, "extra_config": {"head.a": {"bits": 4}}}):
        assert scheme_of(settings, "head.a")[0] is not None
        assert scheme_of(settings, "model.layers2.b")[0] is None
    open_ended = {**AUTO_ROUND, "block_name_to_quantize": None, "extra_config": {}}
    assert scheme_of(open_ended, "lm_head")[0] is not None


def test_awq_of_gptqmodel_leaves_alone_what_dynamic_says() -> None:
    settings = {**AWQ_BY_GPTQMODEL, "dynamic": {"-:.*shared": {}}, "modules_to_not_convert": ["x"]}
    for module in ("a.x", "model.shared.up_proj"):
        assert scheme_of(settings, module)[0] is None
    assert scheme_of(settings, "model.up_proj")[0] is not None


def test_modelopt_excludes_as_a_shell_matches() -> None:
    settings = {**MODELOPT_INSIDE, "ignore": ["lm_head", "a.layers.1*", "*.gate", "mixer"]}
    for module in ("lm_head", "a.layers.1.up", "a.layers.12.up", "b.gate"):
        assert scheme_of(settings, module)[0] is None
    for module in ("x.lm_head.up", "b.gate.up", "mixer.up"):
        assert scheme_of(settings, module)[0] is not None
    # its older versions meant any part of a name
    assert scheme_of(settings, "a.mixer.up")[1] is False
    assert scheme_of(settings, "b.up")[1] is True


def folder_with(path: Path, beside: dict[str, Any], **config: Any) -> Path:
    (path / "config.json").write_text(json.dumps({**SMALL_MIXTRAL, **config}))
    (path / "hf_quant_config.json").write_text(json.dumps(beside))
    return path


def test_a_format_that_stands_only_beside_config_json(tmp_path: Path) -> None:
    """NVFP4 of NVIDIA's ModelOpt, whose config.json says nothing of it, and its fp8."""
    nvfp4 = {**MODELOPT, "quantization": {**MODELOPT["quantization"], "quant_algo": "NVFP4"}}
    with pytest.raises(ModelError) as caught:
        read_spec(read_config(folder_with(tmp_path, nvfp4)))
    assert str(caught.value).startswith(
        "hf_quant_config.json: quantization: quant_algo is 'NVFP4', allowed 'FP8'"
    )
    stamp = checkpoint_stamp(tmp_path)
    found = read_spec(read_config(folder_with(tmp_path, MODELOPT)))[1].quantization
    assert found is not None and (found.method, found.groups[0][1].format) == ("modelopt", E4M3)
    gate = "model.layers.0.block_sparse_moe.gate"
    assert found.find([gate], is_expert=False) is None
    assert checkpoint_stamp(tmp_path) != stamp
    scheme = IntegerScheme(bits=4, group=32)
    options = QuantizeOptions(model=str(tmp_path), out=tmp_path / "out", scheme=scheme)
    with pytest.raises(UsageError, match="is quantised already .hf_quant_config.json"):
        quantize(options, say=print)
    strange = {**MODELOPT, "quantization": {**MODELOPT["quantization"], "has_zero_point": True}}
    with pytest.raises(ModelError, match="unknown key 'has_zero_point'"):
        read_spec(read_config(folder_with(tmp_path, strange)))


def test_config_json_comes_before_what_lies_beside_it(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, MODELOPT, quantization_config=AWQ)
    assert read_spec(read_config(folder))[1].quantization == parse(AWQ)


@pytest.mark.parametrize(
    ("keys", "module", "is_in"),
    [
        (["lm_head"], "lm_head", True),
        (["mlp.gate"], "model.layers.0.mlp.gate", True),
        (["mlp.gate"], "model.layers.0.mlp.gate_proj", False),
        (["model.layers.0"], "model.layers.0.mlp.gate_proj", True),
        (["model.layers.1"], "model.layers.11.mlp.gate_proj", False),
        (["model.layers.*.self_attn"], "model.layers.7.self_attn.q_proj", True),
        (["model.layers.*.self_attn"], "model.layers.7.self_attn2.q_proj", False),
        (["model.layers.*.mlp.router"], "x.model.layers.7.mlp.router", False),
        (["kv_b_proj"], "model.layers.0.self_attn.kv_b_proj", True),
        ([], "lm_head", False),
        ([""], "lm_head", False),
    ],
)
def test_lists_of_transformers(keys: list[str], module: str, is_in: bool) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert (module in hub_modules(keys, "here")) == is_in
    if keys != [""]:
        assert should_convert_module(module, keys) != is_in


def test_lists_of_compressed_tensors() -> None:
    modules = listed_modules(["lm_head", "re:.*gate$", "re:visual"], "here")
    for name in ("lm_head", "mlp.gate", "visual.block"):
        assert name in modules
    for name in ("model.lm_head", "mlp.gate_proj", "model.visual"):
        assert name not in modules


def test_where_it_is_read() -> None:
    inner = {**SMALL_MIXTRAL, "quantization_config": AWQ}
    own = read_spec(inner)[1].quantization
    assert own == parse(AWQ)
    vl = {"model_type": "some_vl", "text_config": {**SMALL_MIXTRAL}, "quantization_config": AWQ}
    assert read_spec(vl)[1].quantization == own
    assert read_spec({**vl, "text_config": inner})[1].quantization == own
    with pytest.raises(ModelError, match="given twice and differs"):
        read_spec({**vl, "text_config": {**SMALL_MIXTRAL, "quantization_config": MXFP4}})
    old = {**SMALL_MIXTRAL, "compression_config": {**compressed("pack-quantized", **INT)}}
    del old["compression_config"]["quant_method"]
    found = read_spec(old)[1].quantization
    assert found is not None and found.method == "compressed-tensors"


# --- the layout -----------------------------------------------------------------------------------


def mixtral(
    settings: dict[str, Any], **changes: Any
) -> tuple[ModelSpec, NameMap, dict[str, TensorInfo]]:
    """A checkpoint as it should be, with rows and columns that every format can hold."""
    config = {**SMALL_MIXTRAL, "quantization_config": settings, "intermediate_size": 32, **changes}
    spec, names = read_spec({**config, "hidden_size": 64})
    tensors = {}
    for name, expected in expected_stored(spec, names).items():
        dtype = expected.stored.dtypes[0] if expected.stored else "BF16"
        size = ITEM_BYTES[dtype] * prod(expected.shape)
        tensors[name] = TensorInfo(name, "model.safetensors", dtype, expected.shape, 0, size)
    return spec, names, tensors


def error(spec: ModelSpec, names: NameMap, tensors: dict[str, TensorInfo]) -> str:
    with pytest.raises(CheckpointError) as caught:
        build_layout(spec, names, tensors)
    return str(caught.value)


PER_EXPERT = {
    "fp8": (FP8, 3 * (64 * 32 + 4)),
    "int4": (compressed("pack-quantized", **INT), 3 * (64 * 32 // 2 + 4 * 64 * 32 // 8)),
    "float": (compressed("float-quantized", strategy="channel", **FLOAT),
              3 * 64 * 32 + 4 * (32 + 32 + 64)),
    "gptq": (gptq(), 3 * (64 * 32 // 2 + 64 * 32 // 8 * 4 + 64 * 32 // 16)),
    "awq": (AWQ, 3 * (64 * 32 // 2 + 64 * 32 // 8 * 4 + 64 * 32 // 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", PER_EXPERT)
def test_bytes_of_an_expert(name: str) -> None:
    settings, expected = PER_EXPERT[name]
    spec, names, tensors = mixtral(settings)
    layout = build_layout(spec, names, tensors)
    pieces = layout.parts[WeightKey(Part.EXPERT, 1, 2)]
    sizes = [ITEM_BYTES[tensors[p.tensor].dtype] * (p.stop - p.start) for p in pieces]
    assert sum(sizes) == expected
    assert slot_bytes(layout, tensors)[Part.EXPERT] <= expected + 4096 * len(pieces)
    roles = Counter(piece.role for piece in pieces)
    assert roles["codes"] == roles["scales"] == 3 and not roles["whole"]


def w2(tensors: dict[str, TensorInfo], ending: str, **changes: Any) -> None:
    """Changes a tensor of one matrix; removes it if nothing is said."""
    name = f"{EXPERT}.{ending}"
    info = tensors.pop(name, None) or TensorInfo(name, "model.safetensors", "BF16", (64, 32), 0, 0)
    if changes:
        tensors[changes.get("name", name)] = replace(info, **changes)


PACKED = compressed("pack-quantized", symmetric=False, **INT)
Change = Callable[[dict[str, TensorInfo]], None]


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (FP8, lambda t: w2(t, "weight_scale_inv"), f"{EXPERT}.weight_scale_inv is missing: scales"),
        (FP8, lambda t: w2(t, "weight_scale_inv", shape=(1, 2)), "shape [1, 2], allowed [1, 1]"),
        (FP8, lambda t: w2(t, "weight_scale_inv", dtype="I32"), "has type I32, allowed F32, BF16"),
        (FP8, lambda t: w2(t, "weight", dtype="BF16"), "says that it is quantised"),
        (FP8, lambda t: w2(t, "weight", dtype="I32"), "has type I32, allowed F8_E4M3"),
        (FP8, lambda t: w2(t, "weight"), f"tensor {EXPERT}.weight or "),
        (PACKED, lambda t: w2(t, "weight_zero_point"), "weight_zero_point is missing: zeros"),
        (PACKED, lambda t: w2(t, "weight_scale", shape=(64, 5)), "allowed [64, 4]"),
        (PACKED, lambda t: w2(t, "weight_packed", shape=(64, 5)), "allowed [64, 4]"),
        (PACKED, lambda t: w2(t, "weight_zero_point", shape=(64, 4)), "allowed [8, 4]"),
        (PACKED, lambda t: w2(t, "weight_packed", name=f"{EXPERT}.qweight"), "stored as packed"),
        (gptq(desc_act=True), lambda t: w2(t, "g_idx"), "g_idx is missing: groups"),
        (gptq(), lambda t: w2(t, "qzeros"), "qzeros is missing: zeros"),
        (gptq(), lambda t: w2(t, "qweight", dtype="U8"), "has type U8, allowed I32"),
        (AWQ, lambda t: w2(t, "scales", shape=(64, 4)), "allowed [4, 64]"),
        (AWQ, lambda t: w2(t, "weight", dtype="BF16"), "w2.weight is not part of the mixtral"),
        ({**FP8, "modules_to_not_convert": ["experts.1.w2"]},
         lambda t: w2(t, "weight", dtype="F8_E4M3"), "config.json says that it is not quantised"),
        ({**AWQ, "modules_to_not_convert": ["experts.1.w2"]},
         lambda t: w2(t, "weight", name=f"{EXPERT}.qweight"), "config.json says that it is not"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(settings: dict[str, Any], change: Change, message: str) -> None:
    spec, names, tensors = mixtral(settings)
    build_layout(spec, names, tensors)
    change(tensors)
    found = error(spec, names, tensors)
    assert message in found and EXPERT in found


@pytest.mark.parametrize("prefix", ["", "language_model.model."])
def test_lists_in_the_spelling_of_other_code(prefix: str) -> None:
    """The trunk is called otherwise on disk than in the list."""
    plain = "layers.0.block_sparse_moe.experts.3"
    settings = {**AWQ, "modules_to_not_convert": [f"model.{plain}"]}
    spec, names, tensors = mixtral(settings)
    assert f"model.{plain}.w1.weight" in tensors
    renamed = {name.replace("model.", prefix, 1): info for name, info in tensors.items()}
    renamed = {name: replace(info, name=name) for name, info in renamed.items()}
    assert build_layout(spec, names, renamed).is_quantised
    other = {**AWQ, "modules_to_not_convert": ["model.layers.1"]}
    stray = replace(names, quantization=parse(other))
    assert f"{plain}.w1.weight has type BF16" in error(spec, stray, renamed)


def test_tables_and_norms_are_never_packed() -> None:
    spec, names, tensors = mixtral(FP8)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        changed = {**tensors, name: replace(tensors[name], dtype="F8_E4M3")}
        assert f"{name} has type F8_E4M3" in error(spec, names, changed)


@pytest.mark.parametrize("settings", [FP8, gptq(), AWQ, compressed("pack-quantized", **INT)])
def test_nothing_quantised_at_all(settings: dict[str, Any]) -> None:
    plain = read_spec({**SMALL_MIXTRAL})
    spec, names = plain[0], replace(plain[1], quantization=parse(settings))
    tensors = {
        name: TensorInfo(name, "model.safetensors", "BF16", shape, 0, 2 * prod(shape))
        for name, shape in expected_tensors(*plain).items()
    }
    message = error(spec, names, tensors)
    assert "config.json says that" in message and "quantised" in message


def test_what_lies_beside_a_matrix_is_not_read() -> None:
    spec, names, tensors = mixtral(compressed("pack-quantized", **INT))
    beside = [f"{EXPERT}.weight_shape", f"{EXPERT}.input_scale",
              "model.layers.0.self_attn.k_scale"]  # fmt: skip
    for name in beside:
        tensors[name] = TensorInfo(name, "model.safetensors", "I64", (2,), 0, 16)
    assert set(build_layout(spec, names, tensors).unused) == set(beside)
    stray = "model.layers.0.block_sparse_moe.experts.1.w2.weight_zero_point"
    tensors[stray] = TensorInfo(stray, "model.safetensors", "I32", (8, 4), 0, 128)
    assert f"{stray} is not part of" in error(spec, names, tensors)


def test_biases_that_autogptq_wrote_are_read_with_their_matrix() -> None:
    spec, names, tensors = mixtral({**gptq(), "dynamic": {"-:.*self_attn": {}}})
    name = f"{EXPERT}.bias"
    bias = TensorInfo(name, "model.safetensors", "F16", (64,), 0, 128)
    layout = build_layout(spec, names, {**tensors, name: bias})
    last = layout.parts[WeightKey(Part.EXPERT, 0, 1)][-1]
    assert (last.tensor, last.role, last.start, last.stop) == (name, "zero bias", 0, 64)
    assert not layout.unused
    plain = "model.layers.0.self_attn.q_proj.bias"
    for stray in (
        replace(bias, dtype="I32"),
        replace(bias, shape=(8, 8)),
        replace(bias, name=f"{EXPERT}.scale"),
        replace(bias, name=plain),
    ):
        assert f"{stray.name} is not part of" in error(spec, names, {**tensors, stray.name: stray})


def test_a_quantised_head_in_chunks() -> None:
    settings = compressed("pack-quantized", symmetric=False, ignore=[], **INT)
    spec, names, tensors = mixtral(settings)
    head = tensors.pop("lm_head.weight")
    for ending, dtype, shape in (
        ("packed", "I32", (50, 8)), ("scale", "BF16", (50, 8)), ("zero_point", "I32", (7, 8))
    ):  # fmt: skip
        name = f"lm_head.weight_{ending}"
        tensors[name] = replace(head, name=name, dtype=dtype, shape=shape)
    layout = build_layout(spec, names, tensors, head_chunk_bytes=20 * 32)
    keys = layout.keys(Part.HEAD)
    shapes = [layout.parts[key][0].packed for key in keys]
    assert [shape and shape.shape for shape in shapes] == [(16, 64), (16, 64), (16, 64), (2, 64)]
    zeros = layout.parts[keys[3]][2]
    assert (zeros.role, zeros.start, zeros.stop, zeros.shape) == ("zeros", 48, 56, (1, 8))


def test_rows_that_cut_a_block() -> None:
    """128-row scales over heads of 12 + 10 rows."""
    config = dict(PUBLISHED["deepseek_v3"][0], model_type="deepseek_v3", num_hidden_layers=4,
                  first_k_dense_replace=3, n_routed_experts=8, n_group=1, topk_group=1,
                  quantization_config=FP8)  # fmt: skip
    spec, names = read_spec(config)
    expected_stored(spec, names)
    config |= dict(qk_nope_head_dim=12, v_head_dim=10)
    spec, names = read_spec(config)
    tensors = {}
    for name, expected in expected_stored(spec, names).items():
        dtype = expected.stored.dtypes[0] if expected.stored else "BF16"
        tensors[name] = TensorInfo(name, "model.safetensors", dtype, expected.shape, 0, 0)
    assert "an entry stands for 128 rows, but the model needs 12" in error(spec, names, tensors)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_published_models_in_their_published_formats(model_type: str) -> None:
    """Every tensor of the real shapes is found, and an expert has the bytes that it should."""
    settings = {"gpt_oss": MXFP4, "qwen3_moe": {**AWQ, "group_size": 128}}.get(model_type, FP8)
    config = dict(PUBLISHED[model_type][0], model_type=model_type, quantization_config=settings)
    config |= dict(num_hidden_layers=4, layer_types=None)
    spec, names = read_spec(config)
    source = synth.random_source(config)
    layout = build_layout(spec, names, source.tensors)
    assert layout.is_quantised and not layout.unused
    per_element = {"gpt_oss": 0.5 + 1 / 32, "qwen3_moe": 0.5 + 2.5 / 128}.get(model_type, 1)
    expert = layout.parts[layout.keys(Part.EXPERT)[0]]
    elements = sum(prod(p.packed.shape) for p in expert if p.packed and p.role == "codes")
    size = slot_bytes(layout, source.tensors)[Part.EXPERT]
    assert size == pytest.approx(elements * per_element, rel=0.1)


# --- random checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "int4-group-asymmetric", "gptq-reordered", "awq"])
def test_dummy_weights(name: str, tmp_path: Path) -> None:
    """Only a config.json: weights of the right formats, whose logits are finite and differ."""
    family, _, settings, _ = CASES[name]
    config = dict(PUBLISHED[family][0], model_type=family, quantization_config=settings)
    small = dict(vocab_size=300, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, intermediate_size=128, moe_intermediate_size=128,
                 layer_types=None, max_position_embeddings=512)  # fmt: skip
    if family == "deepseek_v3":
        small |= dict(n_routed_experts=16, n_group=4, topk_group=2, first_k_dense_replace=1,
                      num_key_value_heads=4)  # fmt: skip
    folder = tmp_path / "written"
    synth.write_random_checkpoint({**config, **small}, folder, seed=1, shard_bytes=1 << 20)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.glob("*.json"):
        (bare / file.name).write_bytes(file.read_bytes())
    results = []
    drawn: dict[str, Any] = {"load_format": "dummy", "seed": 1}
    for path, options in ((folder, {}), (bare, drawn)):
        with engine_for(path, **options) as engine:
            one = request("a", prompts((20,))[0], max_tokens=6, logprobs=5)
            results.append(run_all(engine, [one])["a"].outputs[0])
    assert results[0].logprobs == results[1].logprobs
    steps = [[value.logprob for value in step.values()] for step in results[0].logprobs or ()]
    spread = torch.tensor(steps)
    assert spread.isfinite().all() and 0.05 < (spread[:, 0] - spread[:, -1]).mean() < 20
    assert read_config(folder)["quantization_config"] == settings


def test_dummy_codes_have_the_spread_of_plain_weights() -> None:
    config = {
        **SMALL_MIXTRAL,
        "hidden_size": 256,
        "intermediate_size": 512,
        "quantization_config": FP8,
    }
    source = synth.random_source(config)
    info = source.tensors[f"{EXPERT}.weight"]
    data = bytearray(info.end - info.begin + 4096)
    source.read(info.file, info.begin, memoryview(data))
    codes = torch.frombuffer(data, dtype=torch.float8_e4m3fn)[: prod(info.shape)].float()
    scale = source.tensors[f"{EXPERT}.weight_scale_inv"]
    source.read(scale.file, scale.begin, memoryview(data))
    weights = codes * torch.frombuffer(data, dtype=torch.float32)[0]
    assert weights.isfinite().all() and 0.9 < weights.std() * 512**0.5 < 1.1

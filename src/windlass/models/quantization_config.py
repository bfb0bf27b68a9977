"""`quantization_config` of a config.json: which modules are stored in which format. Strict: a key
that could change the mathematics and is not known is refused. Knows no tensors, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from windlass.errors import ModelError
from windlass.formats import HF_QUANT_FILE, METHODS, WeightFormat
from windlass.models.compressed_tensors import compressed, float_quantized, group_size, no_others
from windlass.models.config import Config
from windlass.models.module_names import (
    Modules,
    globbed_modules,
    hub_modules,
    listed_modules,
    searched_modules,
)
from windlass.models.quantization import Quantization, Scheme

# Where a checkpoint says how it is stored -> the method, if it does not name one. The last is
# a file beside config.json, which `options.read_config` adds.
_PLACES = {"quantization_config": "", "compression_config": "compressed-tensors",
           HF_QUANT_FILE: "modelopt"}  # fmt: skip


def read_quantization(config: Config) -> Quantization | None:
    """Of a config.json, or of the part of it that describes the text model; None where nothing is
    quantised. Raises ModelError for methods, settings and keys that Windlass does not run."""
    places = [key for key in _PLACES if config.has(key)]
    if not places:
        return None
    place = places[0]
    where = place if place == HF_QUANT_FILE else f"{config.where}: {place}"
    settings = Config(config.require(place, dict), where=where)
    method = settings.first(("quant_method", "method"), str, _PLACES[place])
    if method not in METHODS:
        raise ModelError(
            f"{settings.where}: quant_method is {method or None!r}, allowed {', '.join(METHODS)}"
        )
    quantization = _METHODS[method](settings)
    for key in settings.unread():
        if key in _SAYS_NOTHING:
            settings.one_of(key, (_SAYS_NOTHING[key],), default=None)
    unknown = sorted(set(settings.unread()) - _FOR_PROGRAMS - _HARMLESS.get(method, frozenset()))
    if unknown:
        raise ModelError(
            f"{settings.where}: unknown key {unknown[0]!r} of {method}, whose meaning could change"
            " results"
        )
    return quantization


# --- the methods ----------------------------------------------------------------------------------


def _fp8(config: Config) -> Quantization:
    """Of blocks, or with one scale for each matrix. What activations are rounded to is the business
    of kernels that do it."""
    config.one_of("fmt", ("e4m3", "float8_e4m3fn"), default="e4m3")
    has_blocks = config.one_of("weight_block_size", ([128, 128], None), default=None) is not None
    schemes = ("dynamic",) if has_blocks else ("dynamic", "static")
    config.one_of("activation_scheme", schemes, default="dynamic")
    config.one_of("weight_per_tensor", (not has_blocks,), default=not has_blocks)
    config.one_of("scale_fmt", ("float", "ue8m0") if has_blocks else ("float",), default="float")
    config.one_of("expert_dtype", ("fp8",), default="fp8")
    config.one_of("modules_to_convert", ([],), default=[])
    keys = config.items("modules_to_not_convert", str) + config.items("ignored_layers", str)
    block = WeightFormat(code="e4m3", rows=128, columns=128)
    return _but_for(config, "fp8", Scheme("fp8", block) if has_blocks else _FP8_TENSOR, keys)


def _modelopt(config: Config) -> Quantization:
    """NVIDIA's ModelOpt: what hf_quant_config.json says, or the same in config.json."""
    inner = config.section("quantization") if config.has("quantization") else config
    inner.one_of("quant_algo", ("FP8",), default=None)
    config.has("producer")
    inner.has("kv_cache_quant_algo")
    groups = config.section("config_groups") if config.has("config_groups") else Config({})
    for name in groups.raw:
        weights = groups.section(name).section("weights")
        weights.one_of("dynamic", (False,), default=False)
        weights.one_of("strategy", ("tensor",), default="tensor")
        float_quantized(weights)
        no_others(weights)
    keys = inner.items("exclude_modules", str) + inner.items("ignore", str)
    if inner is not config:
        no_others(inner)
    return Quantization(
        method="modelopt",
        groups=((Modules(everything=True), _FP8_TENSOR),),
        dense=globbed_modules(keys, f"{inner.where}: exclude_modules"),
        unsure=Modules(fragments=keys),  # as its older versions meant them
    )


def _mxfp4(config: Config) -> Quantization:
    scheme = Scheme("mxfp4", WeightFormat(code="e2m1", columns=32))
    keys = config.items("modules_to_not_convert", str)
    return _but_for(config, "mxfp4", scheme, keys, only_experts=True)


def _awq(config: Config) -> Quantization:
    config.one_of("zero_point", (True,), default=True)
    _one_kind(config, ("version", "format", "checkpoint_format"), ("gemm", "GEMM"))
    keys = config.items("modules_to_not_convert", str)
    found = _but_for(config, "awq", _awq_scheme(config), keys)
    return replace(found, dense=found.dense | _skipped(config))


def _awq_scheme(config: Config) -> Scheme:
    config.one_of("bits", (4,), default=4)
    config.one_of("desc_act", (False,), default=False)
    columns = group_size(config)
    return Scheme("awq", WeightFormat(code="int4", packing="awq", columns=columns, zero="awq"))


def _one_kind(config: Config, keys: Sequence[str], allowed: Sequence[str]) -> str:
    """What several keys say, all of them alike."""
    for key in keys:
        config.one_of(key, allowed, default=allowed[0])
    return config.first(keys, str, allowed[0])


def _but_for(
    config: Config, method: str, scheme: Scheme, keys: Sequence[str], *, only_experts: bool = False
) -> Quantization:
    """All linear modules except those of transformers' list. Some tools read its entries as parts
    of names, some as their beginning or end: where that makes a difference, either may be meant."""
    where = f"{config.where}: modules_to_not_convert"
    return Quantization(
        method=method,
        groups=((Modules(everything=True), scheme),),
        dense=hub_modules(keys, where),
        unsure=Modules(fragments=tuple(key for key in keys if key)),
        only_experts=only_experts,
    )


def _gptq(config: Config) -> Quantization:
    """GPTQ's tools do not write down which modules they left alone, unless by
    `modules_in_block_to_quantize` or `dynamic`."""
    kind = _one_kind(config, ("checkpoint_format", "format"), ("gptq", "gptq_v2"))
    config.one_of("is_marlin_format", (False,), default=False)
    listed = [
        name for names in config.items("modules_in_block_to_quantize", list) for name in names
    ]
    some = Modules(endings=tuple(f".{name}" for name in listed))
    scheme = _gptq_scheme(config, zero_add=int(kind == "gptq"))
    return Quantization(
        method="gptq",
        groups=((some if listed else Modules(everything=True), scheme),),
        dense=_skipped(config),
        is_strict=bool(listed),
    )


def _gptq_scheme(config: Config, *, zero_add: int) -> Scheme:
    """`zero_add`: what stored zero points stand for less, where they say anything: those of
    symmetric codes are the middle, whatever is stored."""
    config.require("bits", int)
    bits = config.one_of("bits", (4, 8), default=4)
    columns = group_size(config)
    is_symmetric = config.get("sym", bool, True)
    form = WeightFormat(
        code="int4" if bits == 4 else "int8",
        packing="gptq",
        columns=columns,
        zero="none" if is_symmetric else "gptq",
        zero_add=0 if is_symmetric else zero_add,
        has_groups=config.get("desc_act", bool, False) and columns > 0,
    )
    return Scheme("gptq", form)


def _auto_round(config: Config) -> Quantization:
    """Intel's AutoRound, which packs as GPTQ or AWQ do. Modules outside of its blocks are left
    alone unless `extra_config` names them."""
    config.one_of("data_type", ("int",), default="int")
    packings = ("auto_round:auto_gptq", "auto_round:auto_awq")
    is_gptq = config.one_of("packing_format", packings, default=None) == packings[0]
    scheme = _gptq_scheme(config, zero_add=1) if is_gptq else _awq_scheme(config)
    where = f"{config.where}: extra_config"
    own = {"bits": config.get("bits", int, 4), "group_size": config.get("group_size", int, -1),
           "sym": config.get("sym", bool, True), "data_type": "int"}  # fmt: skip
    alike, dense = [], []
    extra = config.section("extra_config") if config.has("extra_config") else Config({})
    for name in extra.raw:
        entry = extra.section(name)
        if entry.get("bits", int, 0) >= 16:
            dense.append(name)
            continue
        for key, value in own.items():
            entry.one_of(key, (value,), default=value)
        no_others(entry, allowed=_AUTO_ROUND)
        alike.append(name)
    blocks = _names(config, "block_name_to_quantize") + _names(config, "to_quant_block_names")
    inside = Modules(trees=frozenset(blocks)) | searched_modules(alike, where)
    return Quantization(
        method="auto-round",
        groups=((inside if blocks else Modules(everything=True), scheme),),
        dense=searched_modules(dense, where),
        is_strict=False,
    )


def _names(config: Config, key: str) -> tuple[str, ...]:
    """A list, or one string with commas."""
    if config.has(key) and isinstance(config.raw[key], str):
        return tuple(config.raw[key].split(","))
    return config.items(key, str)


def _skipped(config: Config) -> Modules:
    """Modules that GPTQModel's `dynamic` leaves alone ("-:pattern"). Settings of their own, which
    it can also give, are allowed only where they change nothing."""
    if not config.has("dynamic"):
        return Modules()
    dynamic = config.section("dynamic")
    skipped = []
    for pattern in dynamic.raw:
        if pattern.startswith("-:"):
            skipped.append(f"re:{pattern[2:]}")
            continue
        settings: Mapping[str, Any] = dynamic.get(pattern, dict, {})
        for key, value in settings.items():
            if key not in ("bits", "group_size", "sym", "desc_act") or config.raw.get(key) != value:
                raise ModelError(
                    f"{config.where}: dynamic: {pattern} has {key} = {value!r}, allowed only the"
                    f" settings of all modules ({config.raw.get(key)!r}) and patterns after '-:'"
                )
    return listed_modules(skipped, f"{config.where}: dynamic")


_FP8_TENSOR = Scheme("float", WeightFormat(code="e4m3", rows=0))

_METHODS = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": compressed,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "modelopt": _modelopt,
}

# Where a method does not ask for such a key, the value with which it says nothing
_SAYS_NOTHING: Mapping[str, Any] = {
    "modules_to_not_convert": [], "ignored_layers": [], "ignore": [], "dynamic": {},
    "is_checkpoint_fp8_serialized": True, "pack_dtype": "int32",
}  # fmt: skip
# Keys that say which program should run a checkpoint, and how
_FOR_PROGRAMS = frozenset(
    "packed_modules_mapping run_compressed dequantize kv_cache_scheme meta backend provider".split()
)
# Keys that say how a checkpoint was made
_GPTQ_TOOLS = frozenset(
    "dataset tokenizer batch_size block_name_to_quantize module_name_preceding_first_block "
    "cache_block_outputs use_cuda_fp16 use_exllama max_input_length exllama_config disable_exllama "
    "model_seqlen pad_token_id model_name_or_path model_file_base_name true_sequential "
    "static_groups damp_percent damp_auto_increment act_group_aware hyb_act lm_head mse gptaq "
    "gptaq_alpha foem failsafe pack_impl offload_to_disk offload_to_disk_path vram_strategy "
    "gc_mode wait_for_submodule_finalizers auto_forward_data_parallel moe process device "
    "do_fuse fuse_max_seq_len modules_to_fuse sym".split()
)
_AUTO_ROUND = frozenset(
    "autoround_version iters nsamples seqlen lr minmax_lr batch_size gradient_accumulate_steps "
    "low_gpu_mem_usage low_cpu_mem_usage enable_minmax_tuning enable_norm_bias_tuning "
    "enable_quanted_input enable_torch_compile enable_alg_ext not_use_best_mse dynamic_max_gap amp "
    "scale_dtype sampler seed dataset act_bits act_data_type act_group_size act_sym act_dynamic "
    "super_bits super_group_size damp_percent true_sequential sym lm_head quant_lm_head "
    "model_free supported_types quant_block_list static_kv_dtype static_attention_dtype "
    "disable_opt_rtn".split()
)
_HARMLESS: Mapping[str, frozenset[str]] = {
    "fp8": frozenset({"act_per_tensor"}),
    "gptq": _GPTQ_TOOLS,
    "awq": _GPTQ_TOOLS | {"modules_in_block_to_quantize"},
    "auto-round": _AUTO_ROUND,
    "compressed-tensors": frozenset(
        {"quantization_status", "global_compression_ratio", "format", "version"}
    ),
}

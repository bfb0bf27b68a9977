"""`quantization_config` of a config.json: which modules are stored in which format. Strict: a key
that could change the mathematics and is not known is refused. Knows no tensors, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from windlass.errors import ModelError
from windlass.formats import WeightFormat
from windlass.models.config import Config
from windlass.models.module_names import Modules, hub_modules, listed_modules

# How the tensors of a quantised matrix are called: `checkpoint/stored.py` says
Naming = Literal["fp8", "mxfp4", "packed", "float", "gptq", "awq"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the matrices of some modules are stored."""

    naming: Naming
    format: WeightFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What config.json says of a checkpoint's matrices.

    `groups` in order of precedence. `dense` wins over them: such modules are stored as they are.
    Of modules in `unsure`, and of all where not `is_strict`, the tensors on disk decide. Where
    `only_experts`, no other matrix is quantised.
    """

    method: str
    groups: tuple[tuple[Modules, Scheme], ...]
    dense: Modules = Modules()
    unsure: Modules = Modules()
    is_strict: bool = True
    only_experts: bool = False

    def find(self, spellings: Sequence[str], *, is_expert: bool) -> Scheme | None:
        """The scheme of a linear module, whose name may have several spellings; None for a dense
        one."""
        if (self.only_experts and not is_expert) or _any_in(spellings, self.dense):
            return None
        for modules, scheme in self.groups:
            if _any_in(spellings, modules):
                return scheme
        return None

    def is_certain(self, spellings: Sequence[str]) -> bool:
        """Whether a module with a scheme must be stored so."""
        return self.is_strict and not _any_in(spellings, self.unsure)


def _any_in(spellings: Sequence[str], modules: Modules) -> bool:
    return any(name in modules for name in spellings)


def read_quantization(config: Config) -> Quantization | None:
    """Of a config.json, or of the part of it that describes the text model; None where nothing is
    quantised. Raises ModelError for methods, settings and keys that Windlass does not run."""
    found = [key for key in ("quantization_config", "compression_config") if config.has(key)]
    if not found:
        return None
    settings = config.section(found[0])
    default = "compressed-tensors" if found[0] == "compression_config" else None
    method = settings.get("quant_method", str, default or "")
    if method not in _METHODS:
        raise ModelError(
            f"{settings.where}: quant_method is {method or None!r}, allowed {', '.join(_METHODS)}"
        )
    quantization = _METHODS[method](settings)
    unknown = sorted(set(settings.unread()) - _HARMLESS[method])
    if unknown:
        raise ModelError(
            f"{settings.where}: unknown key {unknown[0]!r} of {method}, whose meaning could change"
            " results"
        )
    return quantization


# --- the methods ----------------------------------------------------------------------------------


def _fp8(config: Config) -> Quantization:
    config.one_of("fmt", ("e4m3", "float8_e4m3fn"), default="e4m3")
    config.one_of("activation_scheme", ("dynamic",), default="dynamic")
    config.one_of("weight_block_size", ([128, 128],), default=None)
    config.one_of("scale_fmt", ("float", "ue8m0"), default="float")
    config.one_of("expert_dtype", ("fp8",), default="fp8")
    config.one_of("modules_to_convert", ([],), default=[])
    keys = config.items("modules_to_not_convert", str) + config.items("ignored_layers", str)
    scheme = Scheme("fp8", WeightFormat(code="e4m3", rows=128, columns=128))
    return _but_for(config, "fp8", scheme, keys)


def _mxfp4(config: Config) -> Quantization:
    scheme = Scheme("mxfp4", WeightFormat(code="e2m1", columns=32))
    keys = config.items("modules_to_not_convert", str)
    return _but_for(config, "mxfp4", scheme, keys, only_experts=True)


def _awq(config: Config) -> Quantization:
    config.one_of("bits", (4,), default=4)
    config.one_of("zero_point", (True,), default=True)
    config.one_of("desc_act", (False,), default=False)
    for key in ("version", "format"):
        config.one_of(key, ("gemm", "GEMM"), default="gemm")
    columns = _group_size(config)
    scheme = Scheme("awq", WeightFormat(code="int4", packing="awq", columns=columns, zero="awq"))
    return _but_for(config, "awq", scheme, config.items("modules_to_not_convert", str))


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
    config.require("bits", int)
    bits = config.one_of("bits", (4, 8), default=4)
    kinds = ("gptq", "gptq_v2")
    kind = config.one_of("checkpoint_format", kinds, default="gptq")
    if not config.has("checkpoint_format"):
        kind = config.one_of("format", kinds, default="gptq")
    columns = _group_size(config)
    config.get("sym", bool, True)
    form = WeightFormat(
        code="int4" if bits == 4 else "int8",
        packing="gptq",
        columns=columns,
        zero="gptq",
        zero_add=int(kind == "gptq"),
        has_groups=config.get("desc_act", bool, False) and columns > 0,
    )
    config.one_of("pack_dtype", ("int32",), default="int32")
    config.one_of("is_marlin_format", (False,), default=False)
    listed = [
        name for names in config.items("modules_in_block_to_quantize", list) for name in names
    ]
    some = Modules(endings=tuple(f".{name}" for name in listed))
    return Quantization(
        method="gptq",
        groups=((some if listed else Modules(everything=True), Scheme("gptq", form)),),
        dense=_skipped(config),
        is_strict=bool(listed),
    )


def _group_size(config: Config) -> int:
    """Columns of a group; 0 for all."""
    size = config.require("group_size", int)
    if size != -1 and (size < 8 or size % 8):
        raise ModelError(f"{config.where}: group_size is {size}, allowed -1 or a multiple of 8")
    return max(size, 0)


def _skipped(config: Config) -> Modules:
    """Modules that GPTQModel's `dynamic` leaves alone ("-:pattern"). Settings of their own, which
    it can also give, are allowed only where they change nothing."""
    if not config.has("dynamic"):
        return Modules()
    dynamic: Mapping[str, Any] = config.require("dynamic", dict)
    skipped = []
    for pattern, settings in dynamic.items():
        if pattern.startswith("-:"):
            skipped.append(f"re:{pattern[2:]}")
            continue
        for key, value in (settings or {}).items():
            if key not in ("bits", "group_size", "sym", "desc_act") or config.raw.get(key) != value:
                raise ModelError(
                    f"{config.where}: dynamic: {pattern} has {key} = {value!r}, allowed only the"
                    f" settings of all modules ({config.raw.get(key)!r}) and patterns after '-:'"
                )
    return listed_modules(skipped, f"{config.where}: dynamic")


def _compressed(config: Config) -> Quantization:
    """compressed-tensors. Quantised activations, keys and values are the business of kernels that
    need them: Windlass multiplies the stored weights by activations in full precision."""
    default = config.get("format", str, "")
    groups = config.section("config_groups")
    entries: list[tuple[tuple[str, ...], Scheme]] = []
    for name in groups.raw:
        group = groups.section(name)
        entries.append((group.items("targets", str), _compressed_scheme(group, default)))
        for key in ("input_activations", "output_activations"):
            if group.has(key):
                group.require(key, dict)
        _no_others(group)
    if not entries:
        raise ModelError(f"{groups.where} is empty, allowed at least one group")
    for key, harmless in (("sparsity_config", "dense"), ("transform_config", None)):
        section = config.section(key) if config.has(key) else None
        if section is not None and section.raw and section.raw.get("format", "") != harmless:
            raise ModelError(f"{config.where}: {key} is {section.raw}, allowed null")
    ignored = config.items("ignore", str)
    return Quantization(
        method="compressed-tensors",
        groups=_by_precedence(entries, groups.where),
        dense=Modules(everything=True)
        if "Linear" in ignored
        else listed_modules(ignored, f"{config.where}: ignore"),
    )


def _by_precedence(
    entries: Sequence[tuple[tuple[str, ...], Scheme]], where: str
) -> tuple[tuple[Modules, Scheme], ...]:
    """Names before patterns before classes. The class of all matrices is Linear."""
    split = [
        (
            [t for t in targets if not t.startswith("re:")],
            [t for t in targets if t.startswith("re:")],
            scheme,
        )
        for targets, scheme in entries
    ]
    names = [(listed_modules(plain, where), scheme) for plain, _, scheme in split if plain]
    patterns = [(listed_modules(res, where), scheme) for _, res, scheme in split if res]
    classes = [(Modules(everything=True), s) for plain, _, s in split if "Linear" in plain]
    return (*names, *patterns, *classes)


def _compressed_scheme(group: Config, default: str) -> Scheme:
    name = group.get("format", str, default)
    weights = group.section("weights")
    # what calibration did, and types that the tensors themselves tell
    for key in ("observer", "observer_kwargs", "zp_dtype", "scale_dtype"):
        weights.has(key)
    weights.one_of("dynamic", (False,), default=False)
    match name:
        case "pack-quantized":
            scheme = Scheme("packed", _pack_quantized(weights))
        case "float-quantized" | "naive-quantized":
            scheme = Scheme("float", _float_quantized(weights))
        case _:
            raise ModelError(
                f"{group.where}: format is {name!r}, allowed pack-quantized, float-quantized"
            )
    _no_others(weights)
    return scheme


def _pack_quantized(weights: Config) -> WeightFormat:
    weights.require("num_bits", int)
    bits = weights.one_of("num_bits", (4, 8), default=4)
    weights.one_of("type", ("int",), default="int")
    weights.optional("group_size", int)
    strategy = weights.one_of(
        "strategy", ("group", "channel", "tensor"), default=_strategy(weights)
    )
    order = weights.one_of(
        "actorder", (False, "weight", "static", "group", "dynamic"), default=False
    )
    weights.one_of("block_structure", (None,), default=None)
    symmetric = weights.get("symmetric", bool, True)
    if strategy == "tensor" and not symmetric:
        raise ModelError(
            f"{weights.where}: symmetric is False, allowed True for one scale per tensor"
        )
    columns = _group_size(weights) if strategy == "group" else 0
    return WeightFormat(
        code="int4" if bits == 4 else "int8",
        rows=0 if strategy == "tensor" else 1,
        columns=columns,
        zero="none" if symmetric else "rows",
        has_groups=order in ("group", "dynamic") and columns > 0,
    )


def _strategy(weights: Config) -> str:
    """Where none is given, the group size tells."""
    size = weights.get("group_size", int, 0)
    return "tensor" if not size else "channel" if size == -1 else "group"


def _float_quantized(weights: Config) -> WeightFormat:
    weights.require("num_bits", int)
    weights.one_of("num_bits", (8,), default=8)
    weights.one_of("type", ("float",), default="int")
    weights.one_of("symmetric", (True,), default=True)
    weights.one_of("actorder", (False,), default=False)
    weights.one_of("group_size", (-1,), default=-1)
    strategy = weights.one_of("strategy", ("tensor", "channel", "block"), default="tensor")
    if strategy == "block":
        weights.one_of("block_structure", ([128, 128], "128x128"), default=None)
        return WeightFormat(code="e4m3", rows=128, columns=128)
    weights.one_of("block_structure", (None,), default=None)
    return WeightFormat(code="e4m3", rows=0 if strategy == "tensor" else 1)


def _no_others(config: Config) -> None:
    unknown = config.unread()
    if unknown:
        raise ModelError(
            f"{config.where}: unknown key {unknown[0]!r}, whose meaning could change results"
        )


_METHODS = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
}

# Keys that say how a checkpoint was made or which program should run it
_TOOLS = frozenset(
    "dataset tokenizer batch_size backend block_name_to_quantize module_name_preceding_first_block "
    "cache_block_outputs use_cuda_fp16 use_exllama max_input_length exllama_config disable_exllama "
    "meta model_seqlen pad_token_id model_name_or_path model_file_base_name true_sequential "
    "static_groups damp_percent damp_auto_increment act_group_aware lm_head mse quant_method "
    "do_fuse fuse_max_seq_len modules_to_fuse sym method".split()
)
_HARMLESS: Mapping[str, frozenset[str]] = {
    "fp8": frozenset({"dequantize", "quant_method", "weight_per_tensor", "act_per_tensor"}),
    "mxfp4": frozenset({"dequantize", "quant_method"}),
    "gptq": _TOOLS,
    "awq": _TOOLS | {"modules_in_block_to_quantize", "checkpoint_format"},
    "compressed-tensors": frozenset(
        {"quant_method", "quantization_status", "global_compression_ratio", "kv_cache_scheme",
         "version", "format"}
    ),
}  # fmt: skip

"""compressed-tensors' `quantization_config`: groups of modules, and how each is stored."""

from collections.abc import Container, Sequence

from windlass.errors import ModelError
from windlass.formats import WeightFormat
from windlass.models.config import Config
from windlass.models.module_names import Modules, listed_modules
from windlass.models.quantization import Quantization, Scheme


def compressed(config: Config) -> Quantization:
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
        no_others(group)
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
            scheme = Scheme("float", float_quantized(weights))
        case _:
            raise ModelError(
                f"{group.where}: format is {name!r}, allowed pack-quantized, float-quantized"
            )
    no_others(weights)
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
    columns = group_size(weights) if strategy == "group" else 0
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


def float_quantized(weights: Config) -> WeightFormat:
    """Of fp8; one scale for each matrix where nothing else is said."""
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


def no_others(config: Config, *, allowed: Container[str] = ()) -> None:
    """ModelError where a key is left that nobody asked for."""
    unknown = [key for key in config.unread() if key not in allowed]
    if unknown:
        raise ModelError(
            f"{config.where}: unknown key {unknown[0]!r}, whose meaning could change results"
        )


def group_size(config: Config) -> int:
    """Columns of a group; 0 for all."""
    size = config.require("group_size", int)
    if size != -1 and (size < 8 or size % 8):
        raise ModelError(f"{config.where}: group_size is {size}, allowed -1 or a multiple of 8")
    return max(size, 0)

"""Under which name, and packed or not, a canonical tensor lies in a checkpoint. Knows names and
what config.json says of quantisation, no shapes."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from windlass.checkpoint.stored import module_of, packed_names, tensor_name
from windlass.checkpoint.wanted import WantedTensor
from windlass.errors import CheckpointError
from windlass.ids import Part, WeightKey
from windlass.models.names import NameMap, TensorInfo, TensorSource
from windlass.models.quantization import Scheme

PLAIN_TYPES = ("BF16", "F16", "F32")

# Quantised where config.json says so of linear modules. Of the others here (routers and gates are
# linear modules in some programs only, the head by its own setting), the tensors on disk decide.
_LINEAR = re.compile(r"(.*_proj|[kv]_up|shared\.(gate|up|down))\.weight|gate|up|down")
_PERHAPS_LINEAR = re.compile(r"(router|shared\.mix|join|[ab]_proj)\.weight")


def trunk_prefix(names: NameMap, tensors: Mapping[str, TensorInfo]) -> str:
    """The prefix with which the embedding table exists; the usual one if there is none."""
    for prefix in names.prefixes:
        if any(source.name.format(model=prefix) in tensors for source in names.embed["weight"]):
            return prefix
    return names.prefixes[0]


def name_of(source: TensorSource, prefix: str, key: WeightKey) -> str:
    """Of the plain tensor of one part."""
    return source.name.format(model=prefix, layer=key.layer, expert=key.index)


class Found(NamedTuple):
    """Where a canonical tensor lies. `name`: of the plain tensor, which is not there where a
    `scheme` says how a matrix is packed."""

    name: str
    source: TensorSource
    scheme: Scheme | None


def find(
    wanted: WantedTensor, names: NameMap, prefix: str, tensors: Mapping[str, TensorInfo]
) -> Found:
    """The first source whose tensor exists. Raises CheckpointError where there is none, and where
    it is packed and config.json says that it is not, or the other way."""
    candidates = [(name_of(source, prefix, wanted.key), source) for source in wanted.sources]
    place = f"{wanted.name} of {wanted.key}"
    for name, source in candidates:
        scheme = _as_spelled(scheme_of(wanted, names, prefix, name), name, tensors)
        codes = tensor_name(scheme.naming, "codes", name) if scheme is not None else name
        if scheme is not None and _is_packed(tensors.get(codes)):
            return Found(name, source, scheme)
        if name in tensors:
            if scheme is not None and _is_certain(wanted, names, prefix, name):
                raise CheckpointError(
                    f"{tensors[name].file}: tensor {name} has type {tensors[name].dtype}, but"
                    f" config.json says that it is quantised (expected {codes} as {scheme.naming};"
                    f" {place})"
                )
            if names.quantization is not None and _is_packed(tensors[name]):
                raise CheckpointError(
                    f"{tensors[name].file}: tensor {name} has type {tensors[name].dtype}, but"
                    f" {_expected(wanted, names, prefix, name)} ({place})"
                )
            return Found(name, source, None)
    for name, _ in candidates:
        for packed in packed_names(name):
            if packed in tensors:
                raise CheckpointError(
                    f"{tensors[packed].file}: {name} is stored packed, as {packed}, but"
                    f" {_expected(wanted, names, prefix, name)} ({place})"
                )
    spellings = " or ".join(name for name, _ in candidates)
    files = sorted({info.file for info in tensors.values()})
    looked = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
    raise CheckpointError(
        f"tensor {spellings} is missing ({place}); looked in {looked or 'no files'}"
    )


def _as_spelled(
    scheme: Scheme | None, name: str, tensors: Mapping[str, TensorInfo]
) -> Scheme | None:
    """One scale of a whole fp8 matrix is called as those of blocks by some programs."""
    if scheme is None or scheme.naming != "float" or scheme.format.rows:
        return scheme
    by_block = replace(scheme, naming="fp8")
    return by_block if tensor_name("fp8", "scales", name) in tensors else scheme


def _is_packed(codes: TensorInfo | None) -> bool:
    return codes is not None and codes.dtype not in PLAIN_TYPES


def scheme_of(wanted: WantedTensor, names: NameMap, prefix: str, name: str) -> Scheme | None:
    """How config.json says that a tensor is packed, if it is."""
    if names.quantization is None or wanted.key.part in (Part.EMBED, Part.FINAL):
        return None
    is_head = wanted.key.part == Part.HEAD
    if not is_head and not is_linear(wanted) and not _PERHAPS_LINEAR.fullmatch(wanted.name):
        return None
    spellings = _spellings(names, prefix, name)
    return names.quantization.find(spellings, is_expert=wanted.key.part == Part.EXPERT)


def _is_certain(wanted: WantedTensor, names: NameMap, prefix: str, name: str) -> bool:
    """Whether a tensor that has a scheme must be packed."""
    assert names.quantization is not None
    return is_linear(wanted) and names.quantization.is_certain(_spellings(names, prefix, name))


def _spellings(names: NameMap, prefix: str, name: str) -> list[str]:
    """Of a module: lists may have the trunk's name as in another version of the model's code."""
    module = module_of(name)
    if not module.startswith(prefix):
        return [module]
    rest = module.removeprefix(prefix)
    return [module, *(other + rest for other in names.prefixes if other != prefix)]


def is_linear(wanted: WantedTensor) -> bool:
    """Whether every program has it as a linear module, which quantisation then means."""
    return (
        wanted.key.part in (Part.BLOCK, Part.FFN, Part.EXPERT)
        and _LINEAR.fullmatch(wanted.name) is not None
        and not _PERHAPS_LINEAR.fullmatch(wanted.name)
    )


def _expected(wanted: WantedTensor, names: NameMap, prefix: str, name: str) -> str:
    scheme = scheme_of(wanted, names, prefix, name)
    if scheme is not None:
        return f"config.json says that it is stored as {scheme.naming}"
    if names.quantization is None:
        return "config.json has no quantization_config"
    return f"config.json says that it is not quantised, allowed {', '.join(PLAIN_TYPES)}"

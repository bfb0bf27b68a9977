"""Under which name, and packed or not, a canonical tensor lies in a checkpoint. Knows names and
what config.json says of quantisation, no shapes."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from windlass.errors import CheckpointError
from windlass.ids import Part, WeightKey
from windlass.spec.names import NameMap, Source, TensorInfo
from windlass.spec.quantization import Scheme
from windlass.spec.stored import module_of, packed_names, tensor_name
from windlass.spec.wanted import Wanted

PLAIN_TYPES = ("BF16", "F16", "F32")

# Quantised where config.json says so of linear modules. Of the others here (routers and gates are
# linear modules in some programs only, the head by its own setting), the tensors on disk decide.
_LINEAR = re.compile(r"(.*_proj|[kv]_up|shared\.(gate|up|down))\.weight|gate|up|down")
_PERHAPS_LINEAR = re.compile(r"(router|shared\.mix|[ab]_proj)\.weight")


def trunk_prefix(names: NameMap, tensors: Mapping[str, TensorInfo]) -> str:
    """The prefix with which the embedding table exists; the usual one if there is none."""
    for prefix in names.prefixes:
        if any(source.name.format(model=prefix) in tensors for source in names.embed["weight"]):
            return prefix
    return names.prefixes[0]


def name_of(source: Source, prefix: str, key: WeightKey) -> str:
    """Of the plain tensor of one part."""
    return source.name.format(model=prefix, layer=key.layer, expert=key.index)


class Found(NamedTuple):
    """Where a canonical tensor lies. `name`: of the plain tensor, which is not there where a
    `scheme` says how a matrix is packed."""

    name: str
    source: Source
    scheme: Scheme | None


def find(wanted: Wanted, names: NameMap, prefix: str, tensors: Mapping[str, TensorInfo]) -> Found:
    """The first source whose tensor exists. Raises CheckpointError where there is none, and where
    it is packed and config.json says that it is not, or the other way."""
    candidates = [(name_of(source, prefix, wanted.key), source) for source in wanted.sources]
    place = f"{wanted.name} of {wanted.key}"
    for name, source in candidates:
        scheme, is_certain = scheme_of(wanted, names, prefix, name)
        codes = tensor_name(scheme.naming, "codes", name) if scheme is not None else name
        if scheme is not None and _is_packed(tensors.get(codes)):
            return Found(name, source, scheme)
        if name in tensors:
            if scheme is not None and is_certain:
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


def _is_packed(codes: TensorInfo | None) -> bool:
    return codes is not None and codes.dtype not in PLAIN_TYPES


def scheme_of(wanted: Wanted, names: NameMap, prefix: str, name: str) -> tuple[Scheme | None, bool]:
    """How config.json says that a tensor is stored, and whether that is certain."""
    if names.quantization is None or wanted.key.part in (Part.EMBED, Part.FINAL):
        return None, True
    is_head = wanted.key.part == Part.HEAD
    if is_head and wanted.sources == names.embed["weight"]:
        return None, True
    linear = is_linear(wanted)
    if not linear and not is_head and not _PERHAPS_LINEAR.fullmatch(wanted.name):
        return None, True
    module = module_of(name)
    is_expert = wanted.key.part == Part.EXPERT
    # lists may spell the trunk's name as another version of the model's code
    rest = module.removeprefix(prefix)
    spellings = [module]
    if prefix and rest != module:
        spellings += [other + rest for other in names.prefixes if other not in (prefix, "")]
    scheme, is_certain = names.quantization.find(spellings, is_expert=is_expert)
    return scheme, is_certain and linear


def is_linear(wanted: Wanted) -> bool:
    """Whether every program has it as a linear module, which quantisation then means."""
    return (
        wanted.key.part in (Part.BLOCK, Part.FFN, Part.EXPERT)
        and _LINEAR.fullmatch(wanted.name) is not None
        and not _PERHAPS_LINEAR.fullmatch(wanted.name)
    )


def _expected(wanted: Wanted, names: NameMap, prefix: str, name: str) -> str:
    scheme, _ = scheme_of(wanted, names, prefix, name)
    if scheme is not None:
        return f"config.json says that it is stored as {scheme.naming}"
    if names.quantization is None:
        return "config.json has no quantization_config"
    return f"config.json says that it is not quantised, allowed {', '.join(PLAIN_TYPES)}"

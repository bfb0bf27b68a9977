"""Where every tensor of the new checkpoint lies: weight files laid out before anything is written.
Knows sizes, writes nothing, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from windlass.checkpoint.safetensors import encode_header, shard_name
from windlass.models.names import TensorInfo
from windlass.quantize.scheme import IntegerScheme, tensors_of
from windlass.quantize.targets import Target, TargetMatrix
from windlass.units import GIB

SHARD_BYTES = 4 * GIB
_ITEM_BYTES = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file: its first bytes, and its size."""

    file: str
    header: bytes
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TensorPlaces:
    """All weight files, and the tensors of each target in them (`begin` and `end` in the file):
    codes, scales, shape of a matrix, or the one that is copied."""

    shards: tuple[Shard, ...]
    tensors: tuple[tuple[TensorInfo, ...], ...]  # of each target

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)


def place(
    targets: Sequence[Target], scheme: IntegerScheme, *, shard_bytes: int = SHARD_BYTES
) -> TensorPlaces:
    """Cuts the targets into files of about `shard_bytes`. The tensors of a target lie side by side,
    and so do targets, so that an expert is one range of a file."""
    groups: list[list[int]] = [[]]
    sizes = [_tensors(target, scheme) for target in targets]
    filled = 0
    for index, tensors in enumerate(sizes):
        size = sum(info.end for info in tensors)
        if filled and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += size
    placed: dict[str, TensorInfo] = {}
    shards = []
    for number, group in enumerate(groups):
        file = shard_name(number, len(groups))
        infos = _in_a_row([sizes[index] for index in group])
        header = encode_header(infos)
        placed |= {info.name: _moved(info, len(header), file) for info in infos}
        shards.append(Shard(file, header, len(header) + infos[-1].end))
    return TensorPlaces(
        tuple(shards), tuple(tuple(placed[info.name] for info in tensors) for tensors in sizes)
    )


def _tensors(target: Target, scheme: IntegerScheme) -> tuple[TensorInfo, ...]:
    """What a target becomes; every `begin` is 0."""
    source = target.source
    if not isinstance(target, TargetMatrix):
        return (replace(source, begin=0, end=source.end - source.begin),)
    return tuple(
        TensorInfo(name, "", dtype, shape, 0, prod(shape) * _ITEM_BYTES[dtype])
        for name, dtype, shape in tensors_of(scheme, target.module, target.shape, source.dtype)
    )


def _in_a_row(groups: list[tuple[TensorInfo, ...]]) -> list[TensorInfo]:
    """Tensors one after the other, without holes, each at a multiple of its elements' size, as
    readers of safetensors expect: those whose size would misplace the next go to the end, the
    largest elements first."""
    aligned: list[TensorInfo] = []
    odd: list[TensorInfo] = []
    for group in groups:
        (aligned if all(info.end % 8 == 0 for info in group) else odd).extend(group)
    odd.sort(key=lambda info: -_element_bytes(info))
    result: list[TensorInfo] = []
    at = 0
    for info in [*aligned, *odd]:
        result.append(_moved(info, at, ""))
        at += info.end
    return result


def _element_bytes(info: TensorInfo) -> int:
    elements = prod(info.shape)
    return info.end // elements if elements else 1


def _moved(info: TensorInfo, by: int, file: str) -> TensorInfo:
    return replace(info, file=file, begin=info.begin + by, end=info.end + by)

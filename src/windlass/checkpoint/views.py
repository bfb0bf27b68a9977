"""Canonical tensors and packed matrices over the bytes of a slot. Pure functions; the only place
where stored bytes get a type."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from windlass.checkpoint.layout import ITEM_BYTES
from windlass.checkpoint.part_reads import PartReads, Placement
from windlass.device.streams import HostStreams, Streams
from windlass.errors import CheckpointError
from windlass.models.names import (
    Layout,
    PackedShape,
    Reshape,
    Role,
    Take,
    TensorInfo,
    Transpose,
    ViewOp,
)
from windlass.tensors import Packed, PackedStack, StoredTensors, Weight

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,  # exponents
    "U8": torch.uint8,
    "I32": torch.int32,
}


_HOST = HostStreams()


class Views(NamedTuple):
    """Tensors and packed matrices by canonical name. `has_copies`: some of them own memory outside
    the slot."""

    tensors: StoredTensors
    has_copies: bool


def dtype_of(name: str) -> torch.dtype:
    """The torch type of a safetensors type that Windlass runs."""
    return _DTYPES[name]


def copied_bytes(layout: Layout, tensors: Mapping[str, TensorInfo]) -> int:
    """The most that the views of one part copy to memory outside the slots; a pass leases one part
    at a time. 0 unless a file's data begin at an odd place, as safetensors itself never writes."""
    most = 0
    for pieces in layout.parts.values():
        items = [(ITEM_BYTES[tensors[piece.tensor].dtype], piece) for piece in pieces]
        odd = (
            (piece.stop - piece.start) * item
            for item, piece in items
            if tensors[piece.tensor].begin % item
        )
        most = max(most, sum(odd))
    return most


def make_views(
    part_reads: PartReads,
    memory: torch.Tensor,
    *,
    is_known: bool = False,
    streams: Streams = _HOST,
) -> Views:
    """All tensors of a part whose bytes are in `memory` (uint8) of the device of `streams`. Only a
    tensor that begins at a place where torch cannot view its type (odd, in effect) is copied.
    CheckpointError where one that should say nothing does, or numbers of groups are none; they are
    not looked at again where the part `is_known`."""
    tensors = StoredTensors()
    parts: dict[str, dict[Role, torch.Tensor]] = {}
    shapes: dict[str, PackedShape] = {}
    has_copies = False
    for place, tensor_name in zip(part_reads.placements, part_reads.tensors, strict=True):
        at = part_reads.begin + place.at
        stored = memory[at : at + place.num_bytes]
        if _says_nothing(place):
            if not is_known:
                (stored,) = streams.on_host(stored)
                _check_nothing(place, tensor_name, _canonical(stored.clone(), place))
            continue
        if stored.storage_offset() % ITEM_BYTES[place.dtype]:
            stored = stored.clone()
            has_copies = True
        tensor = _canonical(stored, place)
        if place.packed is None:
            tensors[place.name] = tensor
        else:
            shapes[place.name] = place.packed
            parts.setdefault(place.name, {})[place.role] = tensor
    for name, shape in shapes.items():
        if not is_known and "groups" in parts[name]:
            (groups,) = streams.on_host(parts[name]["groups"])
            _check_groups(name, shape, groups, parts[name]["scales"].shape)
        tensors[name] = _packed(shape, parts[name])
    return Views(tensors, has_copies)


def _packed(shape: PackedShape, tensors: dict[Role, torch.Tensor]) -> Weight:
    """One matrix, or one for each head, over the views of its tensors."""
    if len(shape.shape) == 2:
        return _matrix(shape, tensors)
    by_rows = shape.format.packing == "rows"
    # tensors without heads belong to all of them
    heads = {
        role: t.unbind(0 if by_rows else 1) if t.dim() == 3 else (t,) * shape.shape[0]
        for role, t in tensors.items()
    }
    return PackedStack(
        tuple(
            _matrix(shape, {role: views[i] for role, views in heads.items()})
            for i in range(shape.shape[0])
        )
    )


def _matrix(shape: PackedShape, tensors: dict[Role, torch.Tensor]) -> Packed:
    codes, scales = tensors["codes"], tensors["scales"]
    if shape.format.packing != "rows":
        scales = scales.t()
    elif codes.dtype == torch.int32:
        codes = codes.view(torch.uint8)
    return Packed(
        format=shape.format,
        shape=(shape.shape[-2], shape.shape[-1]),
        codes=codes,
        scales=scales,
        zeros=tensors.get("zeros"),
        groups=tensors.get("groups"),
    )


def _says_nothing(place: Placement) -> bool:
    """Whether a tensor beside a matrix is read only to be checked: zeros of symmetric codes, and a
    bias of a model without."""
    has_no_zeros = place.packed is not None and place.packed.format.zero == "none"
    return place.role == "zero bias" or (place.role == "zeros" and has_no_zeros)


def _check_nothing(place: Placement, name: str, tensor: torch.Tensor) -> None:
    if place.packed is None:
        if tensor.any():
            raise CheckpointError(
                f"tensor {name}: got a bias with {int(tensor.count_nonzero())} numbers that"
                " are not 0, allowed all 0 in a model without biases"
            )
        return
    bits = 4 if place.packed.format.code == "int4" else 8
    middle = 2 ** (bits - 1)
    least, most = (int(x) for x in tensor.aminmax())
    if least != most or least not in (_word(middle - 1, bits), _word(middle, bits)):
        bytes_of = tensor.contiguous().view(torch.uint8)
        found = torch.cat((bytes_of & 15, bytes_of >> 4)) if bits == 4 else bytes_of
        codes = sorted(set(found.flatten().tolist()))
        raise CheckpointError(
            f"tensor {name}: got zero points of {_listed(codes)}, allowed all"
            f" {middle - 1} or all {middle} where config.json says sym = true"
        )


def _word(code: int, bits: int) -> int:
    """An int32 of nothing but this code."""
    word = sum(code << at for at in range(0, 32, bits))
    return word - 2**32 if word >> 31 else word


def _listed(codes: list[int]) -> str:
    return ", ".join(map(str, codes[:6])) + (", ..." if len(codes) > 6 else "")


def _check_groups(
    name: str, shape: PackedShape, groups: torch.Tensor, scales: Sequence[int]
) -> None:
    """Kernels trust the numbers of groups."""
    num_groups = scales[-1] if shape.format.packing == "rows" else scales[0]
    least, most = int(groups.min()), int(groups.max())
    if least < 0 or most >= num_groups:
        raise CheckpointError(
            f"groups of {name}: found {least} to {most}, allowed 0 to {num_groups - 1}"
        )


def _canonical(stored: torch.Tensor, place: Placement) -> torch.Tensor:
    x = stored.view(_DTYPES[place.dtype]).view(place.shape)
    for op in place.ops:
        x = _apply(op, x)
    return x


def _apply(op: ViewOp, x: torch.Tensor) -> torch.Tensor:
    match op:
        case Take(dim, start, stop, step):
            index: list[slice] = [slice(None)] * x.dim()
            index[dim] = slice(start, stop, step)
            return x[tuple(index)]
        case Reshape(shape):
            return x.view(shape)
        case Transpose():
            return x.transpose(-1, -2)

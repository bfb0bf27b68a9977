"""Canonical tensors over the bytes of a slot. Pure functions; the only place where stored bytes get
a type."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from windlass.memory.recipe import Placement, Recipe
from windlass.packed import StoredTensors
from windlass.spec.layout import ITEM_BYTES
from windlass.spec.names import Layout, Reshape, Take, TensorInfo, Transpose, ViewOp

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Views(NamedTuple):
    """Tensors by canonical name. `has_copies`: some of them own memory outside the slot."""

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


def make_views(recipe: Recipe, memory: torch.Tensor) -> Views:
    """All tensors of a part whose bytes are in `memory` (uint8). Only a tensor that begins at a
    place where torch cannot view its type (odd, in effect) is copied."""
    tensors = StoredTensors()
    has_copies = False
    for place in recipe.placements:
        stored = memory[place.at : place.at + place.num_bytes]
        if stored.storage_offset() % ITEM_BYTES[place.dtype]:
            stored = stored.clone()
            has_copies = True
        tensors[place.name] = _canonical(stored, place)
    return Views(tensors, has_copies)


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

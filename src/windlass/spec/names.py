"""Where the tensors of a part lie on disk, as data. Knows names, shapes and ranges, no files."""

from collections.abc import Mapping
from dataclasses import dataclass

from windlass.ids import WeightKey


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a safetensors header says of one tensor. `dtype` in its spelling: BF16, F16, F32."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # absolute byte offset in the file
    end: int


@dataclass(frozen=True, slots=True)
class Take:
    """View op: `x.narrow`-like slice of one dimension, `x[..., start:stop:step, ...]`."""

    dim: int
    start: int
    stop: int
    step: int = 1


@dataclass(frozen=True, slots=True)
class Reshape:
    """View op: `x.view(shape)`; only on contiguous views."""

    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Transpose:
    """View op: swaps the last two dimensions."""


ViewOp = Take | Reshape | Transpose


@dataclass(frozen=True, slots=True)
class Piece:
    """One canonical tensor of a part: a contiguous range of a checkpoint tensor, then views.

    The elements `start:stop` (row-major, of the tensor `tensor`) are viewed as `shape`; `ops` then
    give the canonical tensor, in general a strided view. Several pieces may share one range.
    """

    name: str
    tensor: str
    start: int
    stop: int
    shape: tuple[int, ...]
    ops: tuple[ViewOp, ...] = ()


@dataclass(frozen=True)
class Layout:
    """All parts of one checkpoint. Complete: every tensor the model needs is in exactly one part
    (the embedding table of a tied model is also the head)."""

    parts: Mapping[WeightKey, tuple[Piece, ...]]
    unused: tuple[
        str, ...
    ]  # names on disk that no part reads (multi-token prediction, vision, ...)

    def keys(self, part: str) -> list[WeightKey]:
        """Keys of one kind, in (layer, index) order."""
        return sorted(key for key in self.parts if key.part == part)

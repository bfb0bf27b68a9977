"""Where the tensors of a part lie on disk, as data. Knows names, shapes and ranges, no files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from windlass.formats import WeightFormat
from windlass.ids import WeightKey
from windlass.models.quantization import Quantization


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a safetensors header says of one tensor. `dtype` in its spelling: BF16, F8_E4M3, I32."""

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
class TensorSource:
    """A checkpoint tensor that holds one canonical tensor, perhaps together with others.

    `name` may contain `{model}` (the trunk's prefix in this checkpoint), `{layer}` and `{expert}`.
    `shape` is None where the tensor on disk has the canonical shape; `ops` lead from `shape` to the
    canonical tensor, except that several leading dimensions may stay split (`linear` takes
    matrices as (g, n, D)). `stacked`: one tensor holds all experts, each of them a `shape`:
    "experts" as (E, *shape), "rows" as (E * shape[0], ...).
    """

    name: str
    shape: tuple[int, ...] | None = None
    ops: tuple[ViewOp, ...] = ()
    stacked: Literal["no", "experts", "rows"] = "no"


# Canonical name -> where it may lie. The first source whose tensor exists is read; the first of all
# is how the hub's checkpoints of the family look.
TensorSources = Mapping[str, tuple[TensorSource, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NameMap:
    """TensorSources of every canonical tensor that a spec can ask for. Entries that the spec does
    not need (a bias of a model without biases) are not looked at."""

    embed: TensorSources
    block: TensorSources  # norms
    attention: TensorSources  # of Gqa and Mla
    recurrent: TensorSources = field(default_factory=dict)  # of attention that has a state
    moe: TensorSources  # router and shared expert
    expert: TensorSources
    ffn: TensorSources = field(default_factory=dict)
    join: TensorSources = field(default_factory=dict)  # of a layer that drafts
    final: TensorSources
    head: TensorSources
    quantization: Quantization | None = None
    unused: tuple[str, ...] = ()  # patterns of tensors that are known, and not needed
    prefixes: tuple[str, ...] = ("model.", "model.language_model.", "language_model.model.",
                                 "language_model.", "")  # fmt: skip


# "zero bias": of no use beside packed codes, but it must be all zero
Role = Literal["whole", "codes", "scales", "zeros", "groups", "zero bias"]


@dataclass(frozen=True, slots=True)
class PackedShape:
    """What the codes, scales, ... of one name are together: a quantised matrix (N, K), or a stack
    of them (g, N, K)."""

    format: WeightFormat
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One canonical tensor of a part: a contiguous range of a checkpoint tensor, then views.

    The elements `start:stop` (row-major, of the tensor `tensor`) are viewed as `shape`; `ops` then
    give the canonical tensor, in general a strided view. Several pieces may share one range. A
    quantised matrix has one piece for each of its tensors, all with its name and `packed`; `role`
    tells them apart.
    """

    name: str
    tensor: str
    start: int
    stop: int
    shape: tuple[int, ...]
    ops: tuple[ViewOp, ...] = ()
    role: Role = "whole"
    packed: PackedShape | None = None


@dataclass(frozen=True)
class Layout:
    """All parts of one checkpoint. Complete: every tensor the model needs is in exactly one part
    (the embedding table of a tied model is also the head)."""

    parts: Mapping[WeightKey, tuple[Piece, ...]]
    unused: tuple[
        str, ...
    ]  # names on disk that no part reads (multi-token prediction, vision, ...)
    notes: tuple[str, ...] = ()  # what of them might have been meant, in words

    @property
    def is_quantised(self) -> bool:
        """Whether any matrix is packed."""
        return any(piece.packed is not None for pieces in self.parts.values() for piece in pieces)

    def keys(self, part: str) -> list[WeightKey]:
        """Keys of one kind, in (layer, index) order."""
        return sorted(key for key in self.parts if key.part == part)

"""What is stored in fewer bits than it is computed in: a matrix as a quantised checkpoint stores it
(a format and views of its tensors), keys and values as their store keeps them."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Protocol, Self, TypeVar

import torch

from windlass.formats import WeightFormat

INT8_ZERO = 128  # the code of 0 in a byte


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The matrix (N, K) of `format`. All tensors are views of stored bytes, possibly strided.

    codes: "rows": (N, bytes of a row) uint8 (or float8_e4m3fn for e4m3); "gptq": (K / c, N) int32;
    "awq": (K, N / 8) int32. `is_transposed`: the stored matrix is (K, N), and this one is its
    transpose; `shape` is that of this one, format and tensors are those of the stored one.
    """

    format: WeightFormat
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor  # (blocks of n, blocks of k): fp32, bf16, fp16, or uint8 (E8M0)
    zeros: torch.Tensor | None = None  # int32 words as stored
    groups: torch.Tensor | None = None  # (K,) int32: group of each k
    is_transposed: bool = False

    def t(self) -> "Packed":
        """The transpose, of the same stored bytes."""
        return replace(self, shape=self.shape[::-1], is_transposed=not self.is_transposed)


@dataclass(frozen=True, slots=True, eq=False)
class PackedStack:
    """Matrices of one format and shape, in place of a tensor (g, N, K): one for each head."""

    matrices: tuple[Packed, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.matrices), *self.matrices[0].shape

    def transpose(self, dim0: int, dim1: int) -> "PackedStack":
        """As of a tensor (g, N, K); only of its last two dimensions."""
        assert {dim0 % 3, dim1 % 3} == {1, 2}, f"transpose of {dim0} and {dim1}"
        return PackedStack(tuple(matrix.t() for matrix in self.matrices))


# What a part is made of. Norms, biases, the embedding's table and everything else that is no matrix
# of a linear map are always plain tensors.
Weight = torch.Tensor | Packed | PackedStack
Tensors = Mapping[str, Weight]


def plain(tensors: Tensors, name: str) -> torch.Tensor:
    """A tensor that no format packs."""
    tensor = tensors[name]
    assert isinstance(tensor, torch.Tensor), f"{name} is packed"
    return tensor


def plain_or_none(tensors: Tensors, name: str) -> torch.Tensor | None:
    """The same, where the part has it."""
    return plain(tensors, name) if name in tensors else None


def floats_or_none(tensors: Tensors, name: str, *, multiplier: float = 1.0) -> torch.Tensor | None:
    """`multiplier` times a vector, in fp32 and contiguous, made once where it is stored otherwise;
    None where the part has none."""
    if name not in tensors:
        return None
    kept = tensors.prepared if isinstance(tensors, StoredTensors) else {}
    found = kept.get((name, multiplier))
    if found is None:
        found = plain(tensors, name).float().contiguous()
        found = kept[name, multiplier] = found if multiplier == 1 else found * multiplier
    assert isinstance(found, torch.Tensor), f"{name}: kept as something else"
    return found


@dataclass(frozen=True, slots=True, eq=False)
class PagedRows:
    """Keys or values of a layer: a row for each page (P), head (K) and token (B). Rows are of a
    floating type or, with `scales_PKB` (fp32), uint8: (code - INT8_ZERO) * scale of the row."""

    rows_PKBd: torch.Tensor
    scales_PKB: torch.Tensor | None = None


class Pointers(Protocol):
    """What a kernel backend derives from a part's tensors: perhaps of where they lie alone."""

    @property
    def is_plain(self) -> bool:
        """Whether it knows nothing but where tensors lie, and holds no memory."""
        ...

    def moved(self, num_bytes: int) -> Self:
        """The same of tensors that lie as these, each `num_bytes` further on. Of plain ones."""
        ...


P = TypeVar("P", bound=Pointers)


class StoredTensors(MutableMapping[str, Weight]):
    """Tensors of one part by canonical name, views of its slot. `prepared` is where a kernel
    backend keeps what it derived from them; it lives as long as they do."""

    __slots__ = ("prepared", "_tensors", "_first", "_derived", "_at")

    def __init__(self) -> None:
        self.prepared: dict[object, object] = {}
        self._first: dict[str, Weight] = {}  # tensors of the first of the parts laid out alike
        self._derived: dict[object, tuple[Pointers, int]] = {}  # of one of those parts, and its at
        self._at = 0  # bytes from the first to this one
        self._tensors: dict[str, Weight] | None = self._first  # None: not made yet

    def moved(self, num_bytes: int) -> "StoredTensors":
        """The tensors of a part that is laid out alike, `num_bytes` further on in memory that is of
        one piece with this one's. They are made when the first is asked for."""
        new = StoredTensors.__new__(StoredTensors)
        new.prepared, new._tensors = {}, None
        new._first, new._derived, new._at = self._first, self._derived, self._at + num_bytes
        return new

    def pointers(self, key: object, make: Callable[[], P]) -> P:
        """What `make` derives, made for the first of the parts that are laid out alike."""
        known = self._derived.get(key)
        if known is not None:
            made: P = known[0].moved(self._at - known[1])  # type: ignore[assignment]  # of this key
            return made
        made = make()
        if made.is_plain:
            self._derived[key] = made, self._at
        return made

    def __getitem__(self, name: str) -> Weight:
        return self._all()[name]

    def __setitem__(self, name: str, weight: Weight) -> None:
        self._all()[name] = weight

    def __delitem__(self, name: str) -> None:
        del self._all()[name]

    def __contains__(self, name: object) -> bool:
        return name in (self._tensors or self._first)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors or self._first)

    def __len__(self) -> int:
        return len(self._tensors or self._first)

    def _all(self) -> dict[str, Weight]:
        if self._tensors is None:
            self._tensors = {name: _moved(w, self._at) for name, w in self._first.items()}
        return self._tensors


def _moved(w: Weight, num_bytes: int) -> Weight:
    if isinstance(w, torch.Tensor):
        return _moved_tensor(w, num_bytes)
    if isinstance(w, PackedStack):
        return PackedStack(tuple(_moved_matrix(one, num_bytes) for one in w.matrices))
    return _moved_matrix(w, num_bytes)


def _moved_matrix(w: Packed, num_bytes: int) -> Packed:
    return replace(
        w,
        codes=_moved_tensor(w.codes, num_bytes),
        scales=_moved_tensor(w.scales, num_bytes),
        zeros=None if w.zeros is None else _moved_tensor(w.zeros, num_bytes),
        groups=None if w.groups is None else _moved_tensor(w.groups, num_bytes),
    )


def _moved_tensor(x: torch.Tensor, num_bytes: int) -> torch.Tensor:
    return x.as_strided(x.shape, x.stride(), x.storage_offset() + num_bytes // x.itemsize)

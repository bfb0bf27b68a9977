"""What is stored in fewer bits than it is computed in: a matrix as a quantised checkpoint stores it
(a format and views of its tensors), keys and values as their store keeps them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

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


def number(tensors: Tensors, name: str) -> float:
    """The only element of a tensor, looked up once."""
    kept = tensors.prepared if isinstance(tensors, StoredTensors) else {}
    found = kept.get(name)
    if found is None:
        found = kept[name] = plain(tensors, name).item()
    assert isinstance(found, float), f"{name}: kept as something else"
    return found


@dataclass(frozen=True, slots=True, eq=False)
class PagedRows:
    """Keys or values of a layer: a row for each page (P), head (K) and token (B). Rows are of a
    floating type or, with `scales_PKB` (fp32), uint8: (code - INT8_ZERO) * scale of the row."""

    rows_PKBd: torch.Tensor
    scales_PKB: torch.Tensor | None = None


class StoredTensors(dict[str, Weight]):
    """Tensors of one part by canonical name, views of its slot. `prepared` is where a kernel
    backend keeps what it derived from them; it lives as long as they do."""

    __slots__ = ("prepared",)

    def __init__(self) -> None:
        super().__init__()
        self.prepared: dict[object, object] = {}

"""A matrix as a quantised checkpoint stores it: a format and views of its tensors."""

from dataclasses import dataclass

import torch

from windlass.spec.formats import WeightFormat


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


class StoredTensors(dict[str, torch.Tensor | Packed]):
    """Tensors of one part by canonical name, views of its slot. `prepared` is where a kernel
    backend keeps what it derived from them; it lives as long as they do."""

    __slots__ = ("prepared",)

    def __init__(self) -> None:
        super().__init__()
        self.prepared: dict[str, object] = {}

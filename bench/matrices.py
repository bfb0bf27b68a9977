"""Random matrices as checkpoints store them, in pages as a run has them, to time kernels on."""

from collections.abc import Callable
from typing import Any

import torch

from windlass.device.host_memory import HostAllocator
from windlass.formats import WeightFormat
from windlass.tensors import Packed, Tensors
from windlass.units import MIB, round_up

Matrix = Callable[[int, int], torch.Tensor | Packed]


class _Arena:
    """Memory in huge pages that parts of matrices are cut from, as from slots in a run."""

    _BYTES = 64 * MIB
    _ALIGNMENT = 64

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def place(self, part: torch.Tensor) -> torch.Tensor:
        """A copy of a contiguous tensor."""
        size = part.numel() * part.itemsize
        if size > self._left.numel():
            self._left = HostAllocator().empty(max(size, self._BYTES), dtype=torch.uint8)
        here = self._left[:size]
        self._left = self._left[round_up(size, self._ALIGNMENT) :]
        return here.view(part.dtype).view(part.shape).copy_(part)


_place = _Arena().place


def bf16(n: int, k: int) -> torch.Tensor:
    return _place((torch.randn(n, k) / k**0.5).to(torch.bfloat16))


def _rows_of(code: Any, columns: int, rows: int = 1) -> Matrix:
    """A matrix whose codes lie row by row, with a scale for each `rows` x `columns`."""
    per_byte = 2 if code in ("int4", "e2m1") else 1

    def make(n: int, k: int) -> Packed:
        # no code of fp8 is NaN, none is large
        codes = torch.randint(0, 0x70, (n, k // per_byte), dtype=torch.uint8)
        scale_type = torch.uint8 if code == "e2m1" else torch.bfloat16
        scales = torch.full((-(-n // rows), k // columns), 0.01).to(torch.bfloat16)
        if scale_type is torch.uint8:
            scales = torch.full((n, k // columns), 120, dtype=torch.uint8)
        form = WeightFormat(code=code, rows=rows, columns=columns)
        return Packed(form, (n, k), _place(codes), _place(scales))

    return make


def _gptq(n: int, k: int) -> Packed:
    codes = torch.randint(-(2**31), 2**31, (k // 8, n)).int()
    zeros = torch.randint(-(2**31), 2**31, (k // 128, n // 8)).int()
    form = WeightFormat(code="int4", packing="gptq", columns=128, zero="gptq", zero_add=1)
    scales = _place(torch.full((k // 128, n), 0.01).half()).t()
    return Packed(form, (n, k), _place(codes), scales, _place(zeros))


def _awq(n: int, k: int) -> Packed:
    codes = torch.randint(-(2**31), 2**31, (k, n // 8)).int()
    zeros = torch.randint(-(2**31), 2**31, (k // 128, n // 8)).int()
    form = WeightFormat(code="int4", packing="awq", columns=128, zero="awq")
    scales = _place(torch.full((k // 128, n), 0.01).half()).t()
    return Packed(form, (n, k), _place(codes), scales, _place(zeros))


FORMATS: dict[str, Matrix] = {
    "int8 g32": _rows_of("int8", 32),
    "int4 g32": _rows_of("int4", 32),
    "int4 g128": _rows_of("int4", 128),
    "fp8 128x128": _rows_of("e4m3", 128, 128),
    "mxfp4": _rows_of("e2m1", 32),
    "gptq int4 g128": _gptq,
    "awq int4 g128": _awq,
}


def num_bytes(w: Tensors) -> int:
    """Stored, scales and zero points included."""
    total = 0
    for matrix in w.values():
        if isinstance(matrix, torch.Tensor):
            total += matrix.numel() * matrix.itemsize
        elif isinstance(matrix, Packed):
            parts = (matrix.codes, matrix.scales, matrix.zeros)
            total += sum(t.numel() * t.itemsize for t in parts if t is not None)
    return total

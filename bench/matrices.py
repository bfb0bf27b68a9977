"""Random matrices as checkpoints store them, in pages as a run has them, to time kernels on."""

from collections.abc import Callable
from typing import Any

import torch

from windlass.device.host import empty
from windlass.packed import Packed, Tensors
from windlass.spec.formats import WeightFormat

Matrix = Callable[[int, int], torch.Tensor | Packed]


def bf16(n: int, k: int) -> torch.Tensor:
    return empty(n, k, dtype=torch.bfloat16).copy_(torch.randn(n, k) / k**0.5)


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
        return Packed(form, (n, k), empty(*codes.shape, dtype=torch.uint8).copy_(codes), scales)

    return make


def _gptq(n: int, k: int) -> Packed:
    codes = torch.randint(-(2**31), 2**31, (k // 8, n)).int()
    zeros = torch.randint(-(2**31), 2**31, (k // 128, n // 8)).int()
    form = WeightFormat(code="int4", packing="gptq", columns=128, zero="gptq", zero_add=1)
    scales = torch.full((k // 128, n), 0.01).half().t()
    return Packed(form, (n, k), empty(*codes.shape, dtype=torch.int32).copy_(codes), scales, zeros)


def _awq(n: int, k: int) -> Packed:
    codes = torch.randint(-(2**31), 2**31, (k, n // 8)).int()
    zeros = torch.randint(-(2**31), 2**31, (k // 128, n // 8)).int()
    form = WeightFormat(code="int4", packing="awq", columns=128, zero="awq")
    scales = torch.full((k // 128, n), 0.01).half().t()
    return Packed(form, (n, k), empty(*codes.shape, dtype=torch.int32).copy_(codes), scales, zeros)


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

"""What the kernel table compiles: every kernel, at the shapes of real models, by name."""

from collections.abc import Callable, Iterator
from functools import cache

import torch

from gpu.expert_slots import FORMATS, Layer, Sizes, make_layer
from windlass.kernels.reference import TorchKernels
from windlass.kernels.triton.launch import combine, run_experts, run_experts_few
from windlass.kernels.triton.tiles import expert_tile, few_tile

HIDDEN, INNER, EXPERTS, TOP_K = 2048, 768, 128, 8  # Qwen3-30B-A3B
TWO_SIZES = ("bf16", "int4 g128")  # formats whose tiles of 32 rows are compiled too
ALL_FORMATS = (80, 90)  # others differ from them in registers of a block, not in instructions
SOME_FORMATS = TWO_SIZES


def launches(capability: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Names, and what launches on an architecture of such a capability."""
    for name in FORMATS if capability in ALL_FORMATS else SOME_FORMATS:
        if capability >= 80:
            for rows in (16, 32) if name in TWO_SIZES else (16,):
                launch = _experts(name, torch.bfloat16, rows)
                yield f"experts {name} by 16 bits, {rows} rows", launch
        yield f"experts {name} by fp32, 32 rows", _experts(name, torch.float32, 32)
        for dtype in (torch.bfloat16, torch.float32) if capability >= 80 else (torch.float32,):
            words = "fp32" if dtype is torch.float32 else "16 bits"
            yield f"experts {name} by {words}, few", _few(name, dtype)
    yield "combine", _combine


@cache
def _layer(name: str) -> Layer:
    """One expert of that shape: the arena of a layer would differ in its size alone."""
    return make_layer(FORMATS[name], Sizes(1, HIDDEN, INNER, spare=0))


def _experts(name: str, dtype: torch.dtype, rows: int) -> Callable[[], None]:
    def launch() -> None:
        layer, x_TD = _layer(name), torch.empty(16, HIDDEN, dtype=dtype)
        ids_TA = torch.zeros(16, TOP_K, dtype=torch.int64)
        run_experts(
            x_TD, TorchKernels().group(ids_TA, EXPERTS), torch.zeros(EXPERTS, dtype=torch.int32),
            experts := layer.experts_for(dtype), torch.empty(16 * TOP_K, HIDDEN),
            expert_tile(experts, dtype, rows=rows),
        )  # fmt: skip

    return launch


def _few(name: str, dtype: torch.dtype) -> Callable[[], None]:
    def launch() -> None:
        experts = _layer(name).experts_for(torch.float32)
        run_experts_few(
            torch.empty(1, HIDDEN, dtype=dtype), torch.zeros(1, TOP_K, dtype=torch.int64),
            torch.zeros(EXPERTS, dtype=torch.int32), experts, torch.empty(TOP_K, HIDDEN),
            few_tile(),
        )  # fmt: skip

    return launch


def _combine() -> None:
    hidden_TD = torch.empty(16, HIDDEN)
    combine(torch.empty(16 * TOP_K, HIDDEN), torch.empty(16, TOP_K), None, hidden_TD, 1.0)

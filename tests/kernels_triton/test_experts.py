"""Experts over slots against fp64: formats, activations, ragged shapes, and the bits of a row."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu.expert_slots import FORMATS, Layer, Make, Sizes, make_layer, packed, plain
from gpu.tolerances import TOLERANCES, error

from windlass.formats import WeightFormat
from windlass.kernels.dequantise import dequantise
from windlass.kernels.interface import ExpertGroups
from windlass.kernels.reference import TorchKernels
from windlass.kernels.triton.launch import Tile, combine, run_experts, run_experts_few
from windlass.models.spec import ClampedSwiGlu, GeGlu, ReluSquared
from windlass.tensors import Packed

EXPERTS, TOP_K, ROWS = 3, 2, 2
TILE = Tile(features=128, columns=64)
FEW = Tile(features=128, columns=128)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# hidden sizes are no multiples of a tile, nor of each other
MORE: dict[str, Make] = {
    "fp16": plain(FP16),
    "fp32": plain(FP32),
    "bf16 transposed": plain(BF16, is_transposed=True),
    "bf16 of a fused matrix": plain(BF16, is_transposed=True, every=2),
    "int4 rows": packed(WeightFormat(code="int4", columns=0)),
    "int4 g8": packed(WeightFormat(code="int4", columns=8)),
    "int4 groups": packed(WeightFormat(code="int4", columns=8, zero="rows", has_groups=True)),
    "int8 g32 zeros": packed(WeightFormat(code="int8", columns=32, zero="rows")),
    "fp8 rows": packed(WeightFormat(code="e4m3")),
    "fp8 tensor": packed(WeightFormat(code="e4m3", rows=0), FP32),
    "fp8 powers": packed(WeightFormat(code="e4m3", rows=128, columns=128), torch.uint8),
    "gptq g16": packed(
        WeightFormat(code="int4", packing="gptq", columns=16, zero="gptq", zero_add=1), FP16
    ),
    "gptq int8": packed(WeightFormat(code="int8", packing="gptq", columns=64, zero="gptq"), FP16),
    "gptq symmetric": packed(WeightFormat(code="int4", packing="gptq", columns=64), FP16),
    "gptq groups": packed(
        WeightFormat(code="int4", packing="gptq", columns=16, zero="gptq", has_groups=True), FP16
    ),
    "awq g32": packed(WeightFormat(code="int4", packing="awq", columns=32, zero="awq"), FP16),
}
CASES = FORMATS | MORE


def _layer(
    make: Make, *, hidden: int = 144, inner: int = 48, spare: int = 3, **options: Any
) -> Layer:
    torch.manual_seed(1)
    return make_layer(make, Sizes(EXPERTS, hidden, inner, spare), **options)


def _routed(layer: Layer, rows: int, dtype: torch.dtype):
    torch.manual_seed(2)
    width = next(iter(layer.experts[0].values())).shape[-1]
    x_TD = torch.randn(rows, width).to(dtype)
    ids_TA = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(rows)])
    return x_TD, ids_TA, TorchKernels().group(ids_TA, EXPERTS)


def _run(layer: Layer, x_TD: torch.Tensor, groups: ExpertGroups, tile: Tile = TILE):
    out_PD = torch.full((len(groups.order), x_TD.shape[1]), float("nan"))
    run_experts(x_TD, groups, layer.slots_E, layer.experts_for(x_TD.dtype), out_PD, tile)
    return out_PD


def _run_few(layer: Layer, x_TD: torch.Tensor, ids_TA: torch.Tensor):
    out_PD = torch.full((ids_TA.numel(), x_TD.shape[1]), float("nan"))
    run_experts_few(x_TD, ids_TA, layer.slots_E, layer.experts_for(FP32), out_PD, FEW)
    return out_PD


@pytest.mark.parametrize("name", CASES)
def test_a_format_means_what_it_does_elsewhere(name: str) -> None:
    """With rows in fp32 nothing is rounded but sums."""
    layer = _layer(CASES[name])
    x_TD, ids_TA, groups = _routed(layer, ROWS, FP32)
    want = layer.reference(x_TD, groups)
    assert error(_run(layer, x_TD, groups), want) < TOLERANCES[FP32]
    assert error(_run_few(layer, x_TD, ids_TA), want) < TOLERANCES[FP32]


ROUNDED = [(name, BF16) for name in FORMATS] + [
    ("int4 groups", BF16), ("fp16", FP16), ("mxfp4", FP16), ("int4 groups", FP16),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), ROUNDED)
def test_rows_of_16_bits(name: str, dtype: torch.dtype) -> None:
    """Hidden states are rounded to the rows' type; weights lose nothing."""
    layer = _layer(CASES[name])
    x_TD, _, groups = _routed(layer, ROWS, dtype)
    assert error(_run(layer, x_TD, groups), layer.reference(x_TD, groups)) < TOLERANCES[dtype]


def test_few_rows_of_bf16_round_nothing() -> None:
    layer = _layer(CASES["int4 g128"])
    x_TD, ids_TA, groups = _routed(layer, ROWS, BF16)
    assert error(_run_few(layer, x_TD, ids_TA), layer.reference(x_TD, groups)) < TOLERANCES[FP32]


def test_weights_are_never_rounded() -> None:
    with pytest.raises(AssertionError, match=r"got torch.float32 for products in torch.bfloat16"):
        _layer(CASES["fp32"]).experts_for(BF16)


@pytest.mark.parametrize(
    "activation", [ClampedSwiGlu(alpha=1.702, limit=0.5), GeGlu(), ReluSquared()]
)
@pytest.mark.parametrize("has_biases", [False, True])
def test_activations_and_biases(activation, has_biases: bool) -> None:
    layer = _layer(CASES["fp32"], hidden=64, activation=activation, has_biases=has_biases)
    x_TD, ids_TA, groups = _routed(layer, ROWS, FP32)
    want = layer.reference(x_TD, groups)
    assert error(_run(layer, x_TD, groups), want) < TOLERANCES[FP32]
    assert error(_run_few(layer, x_TD, ids_TA), want) < TOLERANCES[FP32]


@pytest.mark.parametrize("name", ["bf16", "int4 g128"])
def test_the_bits_of_a_row_are_its_own(name: str) -> None:
    """Whatever the other rows, the rows of a tile, and the slots."""
    layer = _layer(CASES[name], hidden=64)
    x_TD, ids_TA, groups = _routed(layer, 36, BF16)  # an expert has more rows than a tile
    assert groups.counts_E.max() > 16
    want = _run(layer, x_TD, groups)
    assert error(want, layer.reference(x_TD, groups)) < TOLERANCES[BF16]
    assert torch.equal(_run(layer, x_TD, groups, replace(TILE, rows=32)), want)
    alone = TorchKernels().group(ids_TA[:1], EXPERTS)
    assert torch.equal(_run(layer, x_TD[:1], alone), want[:TOP_K])
    elsewhere = _layer(CASES[name], hidden=64, spare=7)
    assert not torch.equal(elsewhere.slots_E, layer.slots_E)
    assert torch.equal(_run(elsewhere, x_TD[:1], alone), want[:TOP_K])


@pytest.mark.parametrize("is_few", [False, True])
def test_experts_without_a_slot_are_left_to_another_launch(is_few: bool) -> None:
    layer = _layer(CASES["fp32"], hidden=64)
    x_TD, ids_TA, groups = _routed(layer, ROWS, FP32)
    out_PD, whole = torch.full((ROWS * TOP_K, 64), float("nan")), layer.slots_E
    held = layer.experts_for(FP32)
    for present in (whole.new_tensor([True, False, True]), whole.new_tensor([0, 1, 0])):
        slots_E = torch.where(present.bool(), whole, -1)
        if is_few:
            run_experts_few(x_TD, ids_TA, slots_E, held, out_PD, FEW)
        else:
            run_experts(x_TD, groups, slots_E, held, out_PD, TILE)
        is_done = present.bool()[ids_TA.flatten()] | ~out_PD.isnan().any(1)
        assert torch.equal(~out_PD.isnan().any(1), is_done)
    assert error(out_PD, layer.reference(x_TD, groups)) < TOLERANCES[FP32]


@pytest.mark.parametrize("has_shared", [False, True])
def test_combine_is_in_routing_order(has_shared: bool) -> None:
    torch.manual_seed(3)
    out_PD, weights_TA = torch.randn(4 * 3, 70), torch.rand(4, 3)
    shared_TD = torch.randn(4, 70) if has_shared else None
    hidden_TD = torch.randn(4, 70)
    want = hidden_TD.clone()
    TorchKernels().combine(weights_TA, out_PD.view(4, 3, 70), shared_TD, want, 1.5)
    combine(out_PD, weights_TA, shared_TD, hidden_TD, 1.5)
    assert torch.equal(hidden_TD, want)  # no fused multiply-add in the interpreter


def test_odd_codes() -> None:
    """Every fp8 number, the smallest power of two, and words whose highest bit is set."""
    form = WeightFormat(code="e4m3", columns=32)
    codes = torch.arange(256, dtype=torch.uint8).repeat(144, 1)[:, :128]
    codes = torch.where(codes & 0x7F == 0x7F, 0, codes)
    codes[::2] |= 0x80
    codes[codes & 0x7F == 0x7F] = 0x80
    scales = torch.full((144, 4), 120, dtype=torch.uint8)
    scales[::3] = 0
    w = Packed(form, (144, 128), codes, scales)
    assert dequantise(w, 0, 144).isfinite().all()
    layer = _layer(lambda n, k: w if (n, k) == (144, 128) else torch.randn(n, k), inner=128)
    x_TD, ids_TA, groups = _routed(layer, ROWS, FP32)
    want = layer.reference(x_TD, groups)
    assert error(_run(layer, x_TD, groups), want) < TOLERANCES[FP32]
    assert error(_run_few(layer, x_TD, ids_TA), want) < TOLERANCES[FP32]

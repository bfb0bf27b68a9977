"""Products with plain and packed matrices against products with what they mean."""

from dataclasses import replace

import pytest
import torch
from gpu.expert_slots import FORMATS, Sizes, make_layer, packed
from gpu.tolerances import TOLERANCES, error

from windlass.formats import WeightFormat
from windlass.kernels.dequantise import dequantise
from windlass.kernels.triton.launch import Tile
from windlass.kernels.triton.linear import Linear, run_linear
from windlass.kernels.triton.tiles import linear_tile
from windlass.tensors import Packed

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TILE = Tile(rows=16, features=32, columns=32)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_plain(dtype: torch.dtype, *, few: bool) -> None:
    x, w, bias = normal(5, 72).to(dtype), normal(40, 72, seed=1).to(dtype), normal(40, seed=2)
    got = run_linear(x, Linear.of(w, dtype), bias, TILE, few=few)[:, 0]
    assert error(got, x.float() @ w.float().t() + bias) < TOLERANCES[dtype]


def test_a_matrix_for_each_head() -> None:
    """(T, G, K) x (G, N, K), of transposed views, into columns of a wider result."""
    x, w = normal(5, 3, 24), normal(3, 24, 40, seed=1).transpose(1, 2)
    wide = torch.zeros(5, 3, 50)
    run_linear(x, Linear.of(w, FP32), None, TILE, out=wide[..., :40])
    assert error(wide[..., :40], torch.einsum("tgk,gnk->tgn", x, w)) < TOLERANCES[FP32]
    assert wide[..., 40:].eq(0).all()


def test_groups_of_features() -> None:
    """The same rows times (G, N, K), whose groups lie apart."""
    x, w, bias = normal(3, 24), normal(3, 10, 24, seed=1)[:, 4:], normal(18, seed=2)
    got = run_linear(x, Linear.of(w, FP32), bias, TILE).flatten(1)
    assert error(got, x @ w.reshape(18, 24).t() + bias) < TOLERANCES[FP32]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "bf16"])
def test_packed(name: str) -> None:
    """One matrix among others, by rows in fp32, with and without a dot, and in 16 bits."""
    torch.manual_seed(1)
    w = make_layer(FORMATS[name], Sizes(1, 144, 40)).experts[0]["up"]
    assert isinstance(w, Packed)
    tile = replace(TILE, columns=128)
    narrow = FP16 if name.startswith(("gptq", "awq")) else BF16
    for dtype, few in ((FP32, False), (FP32, True), (narrow, False)):
        x = normal(2, 144).to(dtype)
        got = run_linear(x, Linear.of(w, dtype), None, tile, few=few)[:, 0]
        want = x.double() @ dequantise(w, 0, 40).double().t()
        assert error(got, want) < TOLERANCES[dtype]


TRANSPOSED = FORMATS | {
    "int4 groups": packed(WeightFormat(code="int4", columns=8, zero="rows", has_groups=True)),
    "fp8 tensor": packed(WeightFormat(code="e4m3", rows=0), FP32),
}


@pytest.mark.parametrize("name", [name for name in TRANSPOSED if name != "bf16"])
def test_the_transpose_of_a_packed_matrix(name: str) -> None:
    """Rows times what is stored, instead of its transpose."""
    torch.manual_seed(1)
    w = make_layer(TRANSPOSED[name], Sizes(1, 144, 40)).experts[0]["up"]
    assert isinstance(w, Packed)
    narrow = FP16 if name.startswith(("gptq", "awq")) else BF16
    for dtype, few in ((FP32, False), (FP32, True), (narrow, False)):
        x = normal(2, 40).to(dtype)
        got = run_linear(x, Linear.of(w.t(), dtype), None, TILE, few=few)[:, 0]
        want = x.double() @ dequantise(w, 0, 40).double()
        assert error(got, want) < TOLERANCES[dtype]


@pytest.mark.parametrize("few", [False, True])
def test_bits_of_a_row_are_its_own(*, few: bool) -> None:
    x, w = normal(5 if few else 40, 72).to(BF16), normal(40, 72, seed=1).to(BF16)
    linear = Linear.of(w, BF16)

    together = run_linear(x, linear, None, TILE, few=few)
    for rows in (slice(0, 1), slice(3, 5), slice(33, 40), slice(0, 17)):
        assert torch.equal(run_linear(x[rows], linear, None, TILE, few=few), together[rows])


def test_rows_alone_decide_nothing_but_the_rows_of_a_tile() -> None:
    """The order of sums is the rest of it; that tiles of 16 and 32 rows give equal bits is for a
    GPU to show: the interpreter's own products differ."""
    for compute, weights in ((FP32, FP32), (FP32, BF16), (BF16, BF16)):
        linear = Linear.of(normal(40, 72).to(weights), compute)
        few, many = (linear_tile(linear.matrix, compute, rows=rows) for rows in (16, 17))
        assert few == replace(many, rows=16) and many.rows == 32

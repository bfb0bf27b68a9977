"""The guard finds what is planted, and rounds as a GPU does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError

from triton_guard import narrow, widen

SIZE = 16


@triton.jit
def _copy(x, y, first, step, N: tl.constexpr):
    at = first + tl.program_id(0) * step + tl.arange(0, N)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def _masked_copy(x, y, size, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at, mask=at < size, other=0.0), mask=at < size)


@triton.jit
def _shift(x, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + at, tl.load(x + at + N))


@triton.jit
def _halves(x, y, N: tl.constexpr):
    """Program 0 writes fp32, program 1 the upper half of the first as 16 bits."""
    if tl.program_id(0) == 0:
        tl.store(x + tl.arange(0, N), tl.zeros((N,), tl.float32))
    else:
        tl.store(y + 1, tl.load(y + 1) * 0)


@triton.jit
def _add(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at) + tl.load(x + at))


@triton.jit
def _sum(x, y, N: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, N)), 0))


@triton.jit
def _atomic(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.atomic_add(y + at, tl.load(x + at))


@triton.jit
def _to_fp8(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(tl.float8e4nv))


@triton.jit
def _dot(x, w, y, PRECISION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(y + at, tl.dot(tl.load(x + at), tl.load(w + at), input_precision=PRECISION))


@triton.jit
def _cast(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4 * SIZE, generator=torch.Generator().manual_seed(0))


def test_lanes_outside_every_tensor_are_found(x: torch.Tensor) -> None:
    y = torch.empty_like(x)
    _copy[(2,)](x, y, 0, SIZE, N=SIZE)
    assert torch.equal(y[: 2 * SIZE], x[: 2 * SIZE])
    with pytest.raises(InterpreterError, match="load: 1 lanes outside"):
        _copy[(1,)](x, y, 3 * SIZE + 1, SIZE, N=SIZE)
    with pytest.raises(InterpreterError, match=r"store: \d+ lanes outside"):
        _copy[(1,)](x, y[:SIZE], 2, SIZE, N=SIZE)


def test_a_view_ends_where_its_last_element_does(x: torch.Tensor) -> None:
    y = torch.empty_like(x)
    _masked_copy[(1,)](x[:5], y[:5], 5, N=SIZE)
    assert torch.equal(y[:5], x[:5])
    with pytest.raises(InterpreterError, match="load: 1 lanes outside"):
        _masked_copy[(1,)](x[:5], y, 6, N=SIZE)


def test_two_programs_that_write_one_byte_are_found(x: torch.Tensor) -> None:
    with pytest.raises(InterpreterError, match="race: another program writes"):
        _copy[(2,)](x, torch.empty_like(x), 0, SIZE - 1, N=SIZE)


def test_a_program_that_reads_what_another_writes_is_found(x: torch.Tensor) -> None:
    with pytest.raises(InterpreterError, match="race: another program reads"):
        _shift[(2,)](x, N=SIZE)


def test_bytes_are_compared_whatever_the_type(x: torch.Tensor) -> None:
    with pytest.raises(InterpreterError, match="race: another program writes"):
        _halves[(2,)](x, x.view(torch.float16), N=SIZE)
    _halves[(1,)](x, x.view(torch.float16), N=SIZE)


@pytest.mark.parametrize("kernel", [_add, _sum])
def test_arithmetic_on_bf16_raises(kernel: Any, x: torch.Tensor) -> None:
    kernel[(1,)](x, torch.empty_like(x), N=SIZE)
    with pytest.raises(InterpreterError, match="widen first"):
        kernel[(1,)](x.bfloat16(), torch.empty_like(x).bfloat16(), N=SIZE)


def test_atomics_and_casts_to_fp8_raise(x: torch.Tensor) -> None:
    with pytest.raises(InterpreterError, match="atomic"):
        _atomic[(1,)](x, torch.zeros_like(x), N=SIZE)
    with pytest.raises(InterpreterError, match="cast to fp8"):
        _to_fp8[(1,)](x, torch.zeros_like(x).to(torch.float8_e4m3fn), N=SIZE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dots_are_those_of_wide_numbers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(SIZE, SIZE, generator=generator).to(dtype) for _ in range(2))
    y = torch.empty(SIZE, SIZE)
    _dot[(1,)](x, w, y, PRECISION="ieee", N=SIZE)
    torch.testing.assert_close(y.double(), x.double() @ w.double(), rtol=1e-5, atol=1e-5)


def test_a_dot_of_fp32_that_may_be_tf32_raises(x: torch.Tensor) -> None:
    x = torch.randn(SIZE, SIZE)
    with pytest.raises(InterpreterError, match="ieee"):
        _dot[(1,)](x, x, torch.empty_like(x), PRECISION="tf32", N=SIZE)


@pytest.mark.parametrize("make", [
    lambda: np.arange(0x3F800000, 0x3F800000 + 3 * 2**16, 2**12, dtype=np.uint32),  # ties too
    lambda: np.random.default_rng(2).integers(0, 2**32, 4096, dtype=np.uint32),  # NaN, inf too
])  # fmt: skip
def test_casts_to_bf16_round_to_even(make: Callable[[], np.ndarray]) -> None:
    bits = make()
    x = torch.from_numpy(bits.view(np.float32))
    want = x.bfloat16()
    got = torch.from_numpy(narrow(bits.view(np.float32))).view(torch.bfloat16)
    assert torch.equal(got.isnan(), want.isnan())
    is_number = ~want.isnan()
    assert torch.equal(got[is_number].view(torch.int16), want[is_number].view(torch.int16))
    wide = torch.from_numpy(widen(want.view(torch.int16).numpy().view(np.uint16)))
    assert torch.equal(wide[is_number], want.float()[is_number])


def test_a_kernel_casts_to_bf16_and_back(x: torch.Tensor) -> None:
    x = x[:SIZE]
    y, z = torch.empty(SIZE, dtype=torch.bfloat16), torch.empty(SIZE)
    _cast[(1,)](x, y, N=SIZE)
    assert torch.equal(y, x.bfloat16())
    _cast[(1,)](y, z, N=SIZE)
    assert torch.equal(z, y.float())

"""Decode attention over pages against the reference, and what its rows do not depend on."""

from dataclasses import dataclass

import pytest
import torch
from gpu.tolerances import TOLERANCES, error

from attention import attention_work
from windlass.kernels.interface import AttentionOptions
from windlass.kernels.rowwise import write_rows
from windlass.kernels.torch_attention import paged_attention
from windlass.kernels.triton.decode import DecodeRows, decode_blocks, paged_decode
from windlass.tensors import INT8_ZERO, PagedRows
from windlass.units import round_up

FP32, BF16, FP16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
PAGE = 32
PAGES = 13
NOWHERE = 1 << 20  # no page: whoever looks it up reads outside the cache


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    products: torch.dtype
    stored: torch.dtype
    window: int | None = None
    has_sinks: bool = False
    is_latent: bool = False
    lengths: tuple[int, ...] = (33, 5, 50)


CASES = {
    "grouped": Case(4, 2, 32, 32, FP32, FP32),
    "bf16": Case(6, 2, 64, 64, BF16, BF16),
    "fp16, window, sinks": Case(4, 2, 32, 32, FP16, FP16, window=20, has_sinks=True),
    "one head, odd dimensions": Case(3, 1, 24, 20, FP32, FP32, has_sinks=True),
    "three quarters of a power": Case(2, 2, 96, 96, BF16, BF16),
    "latent": Case(20, 1, 48, 32, BF16, BF16, is_latent=True),
    "latent, odd dimensions": Case(2, 1, 12, 8, FP32, FP32, is_latent=True),
    "latent, 512": Case(2, 1, 576, 512, FP16, FP16, is_latent=True, lengths=(40,)),
    "many heads, latent": Case(64, 1, 288, 256, BF16, BF16, is_latent=True, lengths=(40,)),
    "bf16 keys, fp32 products": Case(4, 2, 32, 32, FP32, BF16),
    "int8": Case(4, 2, 32, 32, FP32, INT8),
    "int8, bf16 products, window": Case(4, 2, 32, 32, BF16, INT8, window=40),
    "int8, latent": Case(2, 1, 24, 16, FP32, INT8, is_latent=True),
    "splits": Case(1, 1, 16, 16, BF16, BF16, has_sinks=True, lengths=(300, 257)),
    "splits, window": Case(1, 1, 16, 16, BF16, BF16, window=100, lengths=(600, 300)),
}


class Attention:
    """Keys and values of some sequences, and their queries."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(len(case.lengths) + case.key_dim)
        per_row = -(-max(case.lengths) // PAGE)
        pages = per_row * len(case.lengths) + 1
        self.keys = self._rows(case.key_dim, pages, generator)
        self.values = (
            PagedRows(self.keys.rows_PKBd[..., : case.value_dim], self.keys.scales_PKB)
            if case.is_latent
            else self._rows(case.value_dim, pages, generator)
        )
        shape = (len(case.lengths), case.heads, case.key_dim)
        self.q = torch.randn(shape, generator=generator).to(case.products)
        self.pages = torch.randperm(pages, generator=generator)[:-1].reshape(-1, per_row).int()
        sinks = torch.randn(case.heads, generator=generator) if case.has_sinks else None
        self.options = AttentionOptions(
            scale=case.key_dim**-0.5, value_dim=case.value_dim, window=case.window, sinks_H=sinks
        )

    def _rows(self, width: int, pages: int, generator: torch.Generator) -> PagedRows:
        case = self.case
        shape = (pages, case.kv_heads, PAGE, round_up(width, 16))
        if case.stored is INT8:
            scales = torch.zeros(shape[:3])
            store = PagedRows(torch.full(shape, INT8_ZERO, dtype=torch.uint8), scales)
        else:
            store = PagedRows(torch.zeros(shape, dtype=case.stored))
        rows = torch.randn(pages * PAGE, case.kv_heads, width, generator=generator)
        of_page = torch.arange(pages).repeat_interleave(PAGE)
        write_rows(store, of_page, torch.arange(PAGE).repeat(pages), rows)
        return store

    def run(self, lengths: list[int], rows: list[int] | None = None, longest: int = 0):
        """Of some rows; pages that none may look at lead nowhere."""
        chosen = list(range(len(lengths))) if rows is None else rows
        pages = self.pages[chosen].clone()
        for own, row in zip(pages, chosen, strict=True):
            own[-(-lengths[row] // PAGE) :] = NOWHERE
            if self.case.window is not None:
                own[: max(0, lengths[row] - self.case.window) // PAGE] = NOWHERE
        sizes = torch.tensor([lengths[row] for row in chosen], dtype=torch.int32)
        decode = DecodeRows(pages, sizes, max(longest, int(sizes.max())))
        return paged_decode(self.q[chosen], self.keys, self.values, decode, self.options)

    def reference(self) -> torch.Tensor:
        lengths = self.case.lengths
        work = attention_work(
            [(length - 1, 1, False) for length in lengths],
            [
                tuple(own[: -(-n // PAGE)])
                for own, n in zip(self.pages.tolist(), lengths, strict=True)
            ],
        )
        q = self.q.float()
        return paged_attention(lambda f, x: f(x), q, self.keys, self.values, work, self.options)


@pytest.mark.parametrize("name", CASES)
def test_as_the_reference(name: str) -> None:
    attention = Attention(CASES[name])
    got = attention.run(list(attention.case.lengths))
    assert error(got, attention.reference()) < TOLERANCES[attention.case.products]


@pytest.mark.parametrize("name", ["fp16, window, sinks", "splits", "int8, latent"])
def test_bits_of_a_row_are_its_own(name: str) -> None:
    attention = Attention(CASES[name])
    lengths = list(attention.case.lengths)
    together = attention.run(lengths)
    for row in range(len(lengths)):
        assert torch.equal(attention.run(lengths, [row])[0], together[row])
    # beside a longer row, as a pass of which it is a part would be launched
    assert torch.equal(attention.run(lengths, [1, 0], longest=300)[1], together[0])


def test_a_row_of_no_positions_is_zero() -> None:
    attention = Attention(CASES["grouped"])
    got = attention.run([33, 0, 50])
    assert got[1].eq(0).all() and got[2].ne(0).all()


def test_what_is_masked_may_be_anything() -> None:
    attention = Attention(CASES["fp16, window, sinks"])
    want = attention.run(list(attention.case.lengths))
    last = 33 % PAGE  # of the first row's second page
    for store in (attention.keys, attention.values):
        store.rows_PKBd[attention.pages[0, 1], :, last:] = torch.nan
        store.rows_PKBd[attention.pages[0, 0], :, : 33 - 20] = torch.nan
    assert torch.equal(attention.run(list(attention.case.lengths)), want)


@pytest.mark.parametrize("products", [FP32, BF16])
@pytest.mark.parametrize("key_dim", [64, 128, 256, 512, 576])
def test_blocks_lie_within_splits(products: torch.dtype, key_dim: int) -> None:
    for group in (1, 8, 128):
        blocks = decode_blocks(group, key_dim, products, BF16)
        assert blocks.split % blocks.tokens == 0

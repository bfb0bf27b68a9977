"""Attention over pages against the reference, and what its rows do not depend on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from gpu.tolerances import TOLERANCES, error

from attention import attention_work
from windlass.kernels import torch_attention
from windlass.kernels.interface import AttentionOptions, AttentionWork, RowTiles
from windlass.kernels.rowwise import write_rows
from windlass.kernels.triton import attention as module
from windlass.kernels.triton.attention import attention_blocks, attention_tiles, paged_attention
from windlass.tensors import INT8_ZERO, PagedRows
from windlass.units import round_up

FP32, BF16, FP16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
PAGE = 32
PAGES = 13
TABLE = partial(torch.tensor, dtype=torch.int32)
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
    rows: int = 1  # of each sequence, its last
    is_prompt: bool = False


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
    "drafts": Case(4, 2, 32, 32, BF16, BF16, window=20, rows=5),
    "prompts": Case(6, 2, 32, 32, BF16, BF16, rows=5, has_sinks=True, is_prompt=True),
    "prompts, fp32, window": Case(8, 1, 32, 32, FP32, BF16, window=7, rows=4, is_prompt=True),
    "prompts, int8": Case(2, 2, 16, 16, BF16, INT8, rows=5, is_prompt=True),
    "prompts, latent": Case(
        20, 1, 288, 256, BF16, BF16, is_latent=True, lengths=(40,), rows=3, is_prompt=True
    ),
    "prompts, splits": Case(1, 1, 16, 16, BF16, BF16, lengths=(300, 257), rows=50, is_prompt=True),
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
        shape = (case.rows * len(case.lengths), case.heads, case.key_dim)
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

    def work(self, lengths: Sequence[int], rows: int, *, is_hidden: bool = True) -> AttentionWork:
        """The last `rows` rows of each sequence. `is_hidden`: pages that none of them may look at
        lead nowhere."""
        pages = []
        for own, length in zip(self.pages.tolist(), lengths, strict=True):
            last = -(-length // PAGE)
            window = self.case.window or length
            hidden = max(0, length - rows + 1 - window) // PAGE
            pages.append(tuple([NOWHERE] * hidden + own[hidden:last] + [NOWHERE]))
            if not is_hidden:
                pages[-1] = tuple(own[:last])
        sequences = [(length - rows, rows, self.case.is_prompt) for length in lengths]
        return attention_work(sequences, pages)

    def run(self, work: AttentionWork, first: int = 0, longest: int = 0) -> torch.Tensor:
        """Of rows from `first` on."""
        case = self.case
        group, stored = case.heads // case.kv_heads, self.keys.rows_PKBd.dtype
        blocks = attention_blocks(
            group, case.key_dim, case.products, stored, is_prompt=case.is_prompt
        )
        rows = blocks.rows(group)
        tiles = attention_tiles(work, RowTiles(case.is_prompt, rows), TABLE)
        tiles = tiles._replace(longest=max(tiles.longest, longest))
        out = torch.full((sum(work.num_rows), case.heads, case.value_dim), torch.nan)
        q = self.q[first : first + len(out)]
        paged_attention(q, self.keys, self.values, tiles, blocks, self.options, out)
        return out

    def all(self) -> torch.Tensor:
        return self.run(self.work(self.case.lengths, self.case.rows))

    def reference(self) -> torch.Tensor:
        work = self.work(self.case.lengths, self.case.rows, is_hidden=False)
        args = self.q.float(), self.keys, self.values, work, self.options
        return torch_attention.paged_attention(lambda f, x: f(x), *args)


@pytest.mark.parametrize("name", CASES)
def test_as_the_reference(name: str) -> None:
    attention = Attention(CASES[name])
    assert error(attention.all(), attention.reference()) < TOLERANCES[attention.case.products]


@pytest.mark.parametrize("name", ["fp16, window, sinks", "splits", "int8, latent"])
def test_bits_of_a_row_are_its_own(name: str) -> None:
    attention = Attention(CASES[name])
    lengths = attention.case.lengths
    together = attention.all()
    for row, (length, pages) in enumerate(zip(lengths, attention.pages.tolist(), strict=True)):
        alone = attention_work([(length - 1, 1, False)], [tuple(pages)])
        assert torch.equal(attention.run(alone, row)[0], together[row])
        # beside a longer row, as a pass of which it is a part would be launched
        assert torch.equal(attention.run(alone, row, longest=600)[0], together[row])


@pytest.mark.parametrize("name", ["drafts", "prompts", "prompts, fp32, window", "prompts, splits"])
def test_bits_of_a_row_do_not_depend_on_its_tile(name: str, monkeypatch) -> None:
    """Cut elsewhere, and with what splits leave behind in several launches."""
    attention = Attention(CASES[name])
    case = attention.case
    together = attention.all()
    monkeypatch.setattr(module, "_PART_BYTES", 1)
    for i, length in enumerate(case.lengths):
        for first, count in ((0, 1), (1, 2), (case.rows - 1, 1)):
            position = length - case.rows + first
            pages = tuple(attention.pages[i].tolist())
            alone = attention_work([(position, count, case.is_prompt)], [pages])
            row = i * case.rows + first
            assert torch.equal(attention.run(alone, row), together[row : row + count])


def test_both_kinds_of_rows_in_one_call() -> None:
    """Tiles of the one leave the rows of the other as they are."""
    attention = Attention(CASES["drafts"])
    work = attention.work(attention.case.lengths, 5)
    work = replace(work, is_prompt=(True, False, True))
    assert attention.run(work).isnan().any((1, 2)).tolist() == [True] * 5 + [False] * 5 + [True] * 5


def test_a_row_of_no_positions_is_zero() -> None:
    attention = Attention(CASES["grouped"])
    got = attention.run(attention.work([33, 0, 50], 1))
    assert got[1].eq(0).all() and got[2].ne(0).all()


def test_what_is_masked_may_be_anything() -> None:
    attention = Attention(CASES["fp16, window, sinks"])
    want = attention.all()
    last = 33 % PAGE  # of the first row's second page
    for store in (attention.keys, attention.values):
        store.rows_PKBd[attention.pages[0, 1], :, last:] = torch.nan
        store.rows_PKBd[attention.pages[0, 0], :, : 33 - 20] = torch.nan
    assert torch.equal(attention.all(), want)


@pytest.mark.parametrize("is_prompt", [False, True])
@pytest.mark.parametrize("products", [FP32, BF16])
@pytest.mark.parametrize("key_dim", [64, 128, 256, 512, 576])
def test_blocks_lie_within_splits(products: torch.dtype, key_dim: int, *, is_prompt: bool) -> None:
    for group in (1, 8, 128):
        blocks = attention_blocks(group, key_dim, products, BF16, is_prompt=is_prompt)
        assert blocks.split % blocks.tokens == 0

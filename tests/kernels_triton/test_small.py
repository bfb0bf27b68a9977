"""Norms, rotary positions, rows of the cache and of the embedding against the reference."""

import pytest
import torch
from gpu.tolerances import TOLERANCES, error

from windlass.kernels import rowwise
from windlass.kernels.triton import small
from windlass.models.spec import LayerNorm, Norm, RmsNorm, Rope
from windlass.tensors import INT8_ZERO, PagedRows

NORMS: dict[str, Norm] = {
    "rms": RmsNorm(eps=1e-5),
    "one more": RmsNorm(eps=1e-6, plus_one=True),
    "layer": LayerNorm(eps=1e-5, bias=True),
}
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("width", [40, 2100])
def test_norm(norm: Norm, width: int) -> None:
    x, weight = normal(3, width) + 0.5, normal(width, seed=1).to(BF16)
    bias = normal(width, seed=2) if isinstance(norm, LayerNorm) else None
    want = rowwise.normalise(norm, weight, bias, x)
    assert error(small.normalise(norm, weight, bias, x), want) < TOLERANCES[FP32]
    narrow = small.normalise(norm, weight, bias, x, dtype=BF16)
    assert narrow.dtype is BF16 and error(narrow, want) < TOLERANCES[BF16]
    alone = small.normalise(norm, weight, bias, x[1:2])
    assert torch.equal(alone[0], small.normalise(norm, weight, bias, x)[1])


def test_norm_of_heads_and_of_a_part_of_rows() -> None:
    norm = NORMS["rms"]
    heads = normal(3, 4, 16)
    assert error(small.normalise(norm, None, None, heads),
                    rowwise.normalise(norm, None, None, heads)) < TOLERANCES[FP32]  # fmt: skip
    latent, _ = torch.split(normal(3, 40), [24, 16], dim=-1)
    weight = normal(24, seed=1)
    want = rowwise.normalise(norm, weight, None, latent)
    assert error(small.normalise(norm, weight, None, latent), want) < TOLERANCES[FP32]


def test_norm_after_a_sum() -> None:
    norm, weight = NORMS["one more"], normal(40, seed=1)
    hidden, more = normal(3, 40), normal(3, 40, seed=2)
    want = hidden + 0.3 * more
    got = small.normalise(norm, weight, None, hidden, added=(more, 0.3))
    assert error(hidden, want) < TOLERANCES[FP32]
    assert error(got, rowwise.normalise(norm, weight, None, want)) < TOLERANCES[FP32]


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("dim", [12, 32])
def test_rotation(*, dim: int, is_interleaved: bool) -> None:
    rope = Rope(dim=dim, theta=1e4, interleaved=is_interleaved)
    both = normal(3, 2, dim // 2, seed=1)  # as a table's rows lie
    cos, sin = both[:, 0], both[:, 1]
    whole = normal(3, 5, 48)
    got, want = whole.clone(), whole.clone()
    rowwise.rotate(want[..., 8:], cos, sin, rope)
    small.rotate(got[..., 8:], cos, sin, rope)
    assert error(got, want) < TOLERANCES[FP32]
    assert torch.equal(got[..., :8], whole[..., :8])
    assert torch.equal(got[..., 8 + dim :], whole[..., 8 + dim :])
    alone = whole[1:2].clone()
    small.rotate(alone[..., 8:], cos[1:2], sin[1:2], rope)
    assert torch.equal(alone[0], got[1])


PAGES, HEADS, TOKENS = 4, 3, 8
PLACES = torch.tensor([2, 0, 2]), torch.tensor([7, 0, 1])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_rows_of_the_cache(dtype: torch.dtype) -> None:
    got, want = (PagedRows(torch.zeros(PAGES, HEADS, TOKENS, 32, dtype=dtype)) for _ in "gw")
    rows = normal(3, HEADS, 50)[..., 10:30]  # heads lie apart
    rowwise.write_rows(want, *PLACES, rows)
    small.write_rows(got, *PLACES, rows)
    assert torch.equal(got.rows_PKBd, want.rows_PKBd)


def test_rows_of_the_cache_in_int8() -> None:
    def store() -> PagedRows:
        codes = torch.full((PAGES, HEADS, TOKENS, 32), INT8_ZERO, dtype=torch.uint8)
        return PagedRows(codes, torch.zeros(PAGES, HEADS, TOKENS))

    got, want = store(), store()
    rows = normal(3, HEADS, 20)
    rows[0, 0] = 0
    rows[0, 1, 3] = torch.inf
    rows[1, 2, 5] = torch.nan
    rows[2, 0] = torch.arange(20) + 0.5
    rows[2, 0, 0] = 127  # a scale of 1, so that all others are halves
    rowwise.write_rows(want, *PLACES, rows)
    small.write_rows(got, *PLACES, rows)
    assert torch.equal(got.rows_PKBd, want.rows_PKBd)
    assert got.scales_PKB is not None and want.scales_PKB is not None
    assert torch.equal(got.scales_PKB.nan_to_num(-1), want.scales_PKB.nan_to_num(-1))


def test_rows_of_the_embedding() -> None:
    table = normal(20, 2100).to(BF16)
    ids = torch.tensor([3, 19, 3])
    want = table[ids].float() * 1.5
    assert torch.equal(small.embed(table, ids, 1.5), want)

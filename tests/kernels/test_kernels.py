"""Kernels against plain formulas, and the promise that a row's bits depend on that row alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import attention_work
from windlass.kernels.interface import AttentionOptions
from windlass.kernels.reference import gelu
from windlass.kernels.row_counts import RowLadder
from windlass.models.spec import ClampedSwiGlu, GeGlu, ReluSquared, SwiGlu
from windlass.tensors import PagedRows

PAGE = 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "features"), [(64, 24), (33, 57), (7, 5), (512, 1030), (96, 1)])
def test_linear_is_right_and_row_independent(kernels, dtype, width, features):
    w = torch.randn(features, width).to(dtype)
    bias = torch.randn(features).to(dtype)
    x = torch.randn(700, width)
    whole = kernels.linear(x, w, bias)
    torch.testing.assert_close(whole, x @ w.float().T + bias.float(), atol=1e-4, rtol=1e-4)
    for first, last in ((0, 1), (1, 2), (699, 700), (5, 18), (100, 413), (13, 700)):
        assert torch.equal(kernels.linear(x[first:last], w, bias), whole[first:last])


def test_linear_takes_strided_and_grouped_weights(kernels):
    fused = torch.randn(2 * 6, 16).bfloat16()
    x = torch.randn(9, 16)
    even = kernels.linear(x, fused[::2])
    assert torch.equal(even, kernels.linear(x, fused[::2].contiguous()))
    grouped = fused.view(3, 4, 16)[:, 1:3]
    assert torch.equal(
        kernels.linear(x, grouped), kernels.linear(x, grouped.reshape(6, 16).contiguous())
    )


def test_linear_larger_than_a_tile(kernels):
    w = torch.randn(3000, 1024).bfloat16()  # 12 MiB widened
    x = torch.randn(5, 1024)
    torch.testing.assert_close(kernels.linear(x, w), x @ w.float().T, atol=1e-3, rtol=1e-4)


def test_batched_linear_is_right_and_row_independent(kernels):
    w = torch.randn(3, 10, 12).bfloat16()
    x = torch.randn(600, 3, 12)
    whole = kernels.batched_linear(x, w)
    expected = torch.einsum("tha,hba->thb", x, w.float())
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    for first, last in ((0, 1), (3, 8), (590, 600)):
        assert torch.equal(kernels.batched_linear(x[first:last], w), whole[first:last])


@pytest.mark.parametrize(
    "activation", [SwiGlu(), ClampedSwiGlu(alpha=1.702, limit=7.0), GeGlu(), ReluSquared()]
)
def test_expert_ffn_is_right_and_row_independent(kernels, activation):
    w = {
        "gate": torch.randn(24, 40).bfloat16(),
        "up": torch.randn(24, 40).bfloat16(),
        "down": torch.randn(40, 24).bfloat16(),
        "gate_bias": torch.randn(24),
        "up_bias": torch.randn(24),
        "down_bias": torch.randn(40),
    }
    x = torch.randn(300, 40)
    gate = x @ w["gate"].float().T + w["gate_bias"]
    up = x @ w["up"].float().T + w["up_bias"]
    if isinstance(activation, SwiGlu):
        hidden = torch.nn.functional.silu(gate) * up
    elif isinstance(activation, GeGlu):
        inner = 0.7978845608028654 * (gate + 0.044715 * gate**3)
        hidden = gate / 2 * (1 + torch.tanh(inner)) * up
    elif isinstance(activation, ReluSquared):
        del w["gate"]
        hidden = up.relu() ** 2
    else:
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    expected = hidden @ w["down"].float().T + w["down_bias"]
    whole = kernels.expert_ffn(x, w, activation)
    torch.testing.assert_close(whole, expected, atol=1e-3, rtol=1e-4)
    for first, last in ((0, 1), (17, 30), (299, 300)):
        assert torch.equal(kernels.expert_ffn(x[first:last], w, activation), whole[first:last])


@pytest.mark.parametrize("function", [torch.exp, torch.sigmoid, torch.nn.functional.silu, gelu,
                                      torch.tanh, torch.nn.functional.softplus])  # fmt: skip
def test_pointwise_bits_do_not_depend_on_the_place(kernels, function):
    x = torch.randn(70_001) * 5
    whole = kernels.pointwise(function, x)
    torch.testing.assert_close(whole, function(x))
    for first, size in ((0, 1), (1, 1), (3, 17), (11, 33_000), (7, 66_666), (69_990, 11)):
        part = kernels.pointwise(function, x[first : first + size])
        assert torch.equal(part, whole[first : first + size])


def test_row_counts_that_change_bits_are_not_admitted():
    def moody(x, w):  # every row count sums in its own order, but for 48 and 96
        return torch.mm(x, w.T) + (0 if len(x) in (8, 48, 96) else 1e-3 * len(x))

    ladder = RowLadder(moody)
    assert ladder.counts((6, 16)) == (48, 96)
    assert ladder.blocks(130, (6, 16)) == [(0, 96, 96), (96, 130, 48)]


def test_a_product_that_always_depends_on_the_row_count_runs_in_one_size():
    ladder = RowLadder(lambda x, w: torch.mm(x, w.T) + 1e-3 * len(x))
    assert ladder.counts((6, 16)) == (32,)
    assert [cut[:2] for cut in ladder.blocks(70, (6, 16))] == [(0, 32), (32, 64), (64, 70)]


# --- attention ------------------------------------------------------------------------------------


def _store(lengths, groups, key_dim, value_dim):
    """Pages in shuffled order for sequences of the given lengths; unused places hold garbage."""
    counts = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(counts)).tolist()
    pages = [tuple(order.pop() for _ in range(count)) for count in counts]
    shape = (sum(counts), groups, PAGE)
    key, value = torch.zeros(*shape, 16), torch.zeros(*shape, 16)  # wider, as the real store is
    key[..., :key_dim] = torch.randn(*shape, key_dim) * 3
    value[..., :value_dim] = torch.randn(*shape, value_dim)
    return key, value, pages


def _naive(q_THd, key, value, pages, position, scale, window, sinks):
    """One sequence, plain softmax in float64; rows at `position`."""
    k = torch.cat([key[p] for p in pages], 1).double()[..., : q_THd.shape[2]]  # (K, tokens, d)
    v = torch.cat([value[p] for p in pages], 1).double()
    repeat = q_THd.shape[1] // k.shape[0]
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    scores = torch.einsum("thd,hsd->hts", q_THd.double(), k) * scale
    rows = position + torch.arange(len(q_THd))
    distance = rows[:, None] - torch.arange(k.shape[1])[None]
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, len(q_THd), 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : k.shape[1]]
    return torch.einsum("hts,hsv->thv", weights, v).float()  # as wide as the store


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 90), st.integers(1, 70), st.booleans()), min_size=1, max_size=5
    ),
    st.sampled_from([(4, 2, 8, 8), (3, 3, 5, 7), (8, 1, 12, 4)]),
    st.sampled_from([None, 1, 6, 50]),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_attention_is_right_for_ragged_rows(kernels, sequences, shape, window, has_sinks, seed):
    heads, groups, key_dim, value_dim = shape
    torch.manual_seed(seed)
    key, value, pages = _store([a + b for a, b, _ in sequences], groups, key_dim, value_dim)
    q = torch.randn(sum(rows for _, rows, _ in sequences), heads, key_dim)
    sinks = torch.randn(heads) if has_sinks else None
    work = attention_work(sequences, pages)
    options = AttentionOptions(scale=0.3, value_dim=value_dim, window=window, sinks_H=sinks)
    out = kernels.attention(q, PagedRows(key), PagedRows(value), work, options)
    for i, (position, rows, _) in enumerate(sequences):
        part = slice(work.first_row[i], work.first_row[i] + rows)
        expected = _naive(q[part], key, value, pages[i], position, 0.3, window, sinks)
        expected = expected[..., :value_dim]
        torch.testing.assert_close(out[part], expected, atol=2e-5, rtol=2e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 120), st.booleans()), min_size=1, max_size=6),
    st.sampled_from([None, 7]),
    st.integers(0, 10_000),
)
def test_attention_bits_do_not_depend_on_chunks_or_company(kernels, lengths, window, seed):
    torch.manual_seed(seed)
    sequences = [(0, length, kind) for length, kind in lengths]
    key, value, pages = _store([length for length, _ in lengths], 2, 7, 5)
    store = PagedRows(key), PagedRows(value)
    q = torch.randn(sum(length for length, _ in lengths), 4, 7)
    work = attention_work(sequences, pages)
    options = AttentionOptions(scale=0.3, value_dim=5, window=window, sinks_H=torch.randn(4))
    together = kernels.attention(q, *store, work, options)
    for i, (length, kind) in enumerate(lengths):
        start, begin = work.first_row[i], 0
        while begin < length:
            rows = min(int(torch.randint(1, 50, ())), length - begin)
            alone = attention_work([(begin, rows, kind)], [pages[i]])
            part = slice(start + begin, start + begin + rows)
            assert torch.equal(kernels.attention(q[part], *store, alone, options), together[part])
            begin += rows


def test_attention_stays_finite_with_large_logits(kernels):
    key, value, pages = _store([40], 1, 8, 8)
    q = torch.randn(40, 2, 8) * 1e4
    options = AttentionOptions(scale=1.0, value_dim=8)
    work = attention_work([(0, 40, True)], pages)
    out = kernels.attention(q, PagedRows(key), PagedRows(value), work, options)
    assert torch.isfinite(out).all()

"""The native kernels against torch's, with each instruction set of this machine, and against
themselves: a row's bits depend on that row alone. Every C function over every stored type:
native/tests (`make test-native`)."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import LIBRARY, NATIVE, kernels_of
from windlass.kernels.cpu.native import NativeKernels
from windlass.kernels.interface import AttentionOptions, AttentionWork, ExpertGroups
from windlass.kernels.reference import TorchKernels
from windlass.models.spec import (
    ClampedSwiGlu,
    GeGlu,
    LayerNorm,
    NoScaling,
    ReluSquared,
    RmsNorm,
    Rope,
    SwiGlu,
)
from windlass.tensors import INT8_ZERO, PagedRows, StoredTensors, plain
from windlass.units import round_up

TORCH = TorchKernels()
THREADS = (1, 2, 3)
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.one_of(st.sampled_from([1, 7, 8, 16, 17, 31, 33, 64, 65, 255, 257]), st.integers(1, 300))
SEEDS = st.integers(0, 10_000)
ACTIVATIONS = st.sampled_from(
    [SwiGlu(), ClampedSwiGlu(alpha=1.702, limit=7.0), GeGlu(), ReluSquared()]
)


@pytest.fixture(scope="module", params=NATIVE)
def native(request: pytest.FixtureRequest) -> Iterator[TorchKernels]:
    with kernels_of(request.param) as found:
        yield found


def few(count: int) -> settings:
    return settings(max_examples=count, deadline=None)


def threads_of(kernels: TorchKernels, threads: int) -> None:
    assert isinstance(kernels, NativeKernels) and not isinstance(LIBRARY, str)
    LIBRARY.wl_set_threads(threads)


def close(got: torch.Tensor, expected: torch.Tensor, *, size: float = 1.0) -> None:
    """`size`: of the largest partial sum, where it is more than that of the results."""
    torch.testing.assert_close(got, expected, atol=2e-5 * max(1.0, size), rtol=2e-5, equal_nan=True)


def cuts(rows: int, seed: int) -> Iterator[slice]:
    """Slices that cover all rows."""
    generator = torch.Generator().manual_seed(seed)
    first = 0
    while first < rows:
        last = min(rows, first + int(torch.randint(1, rows + 1, (), generator=generator)))
        yield slice(first, last)
        first = last


def stored(rows: int, width: int, dtype: torch.dtype, layout: int) -> torch.Tensor:
    """(rows, width) as checkpoints have it: rows, transposed, every second row, one of two halves
    beside each other."""
    wide = torch.randn(2 * rows, width).to(dtype)
    return (
        wide[:rows],
        torch.randn(width, rows).to(dtype).t(),
        wide[1::2],
        torch.randn(rows, 2 * width).to(dtype)[:, width:],
        torch.randn(width, 2 * rows).to(dtype).t()[::2],
    )[layout]


LAYOUTS = st.integers(0, 4)


@few(60)
@given(SIZES, SIZES, SIZES, TYPES, LAYOUTS, st.booleans(), SEEDS)
def test_linear(native, rows, width, features, dtype, layout, has_bias, seed):
    torch.manual_seed(seed)
    w = stored(features, width, dtype, layout)
    bias = torch.randn(features).to(dtype) if has_bias else None
    x = torch.randn(rows, width + seed % 3)[:, :width]
    whole = native.linear(x, w, bias)
    close(whole, TORCH.linear(x, w, bias), size=width**0.5)
    for threads, part in zip(THREADS * rows, cuts(rows, seed), strict=False):
        threads_of(native, threads)
        assert torch.equal(native.linear(x[part], w, bias), whole[part])
    threads_of(native, 1)


@few(20)
@given(st.integers(1, 40), st.integers(1, 5), SIZES, st.integers(1, 40), TYPES, SEEDS)
def test_batched_linear_and_grouped_weights(native, rows, heads, width, features, dtype, seed):
    torch.manual_seed(seed)
    w = torch.randn(heads, features + 2, width).to(dtype)[:, 1 : features + 1]
    x = torch.randn(rows, heads, width)
    got = native.batched_linear(x, w)
    close(got, TORCH.batched_linear(x, w), size=width**0.5)
    assert torch.equal(native.batched_linear(x[-1:], w), got[-1:])
    back = w.transpose(1, 2)
    close(native.batched_linear(got, back), TORCH.batched_linear(got, back), size=width + features)
    flat = native.linear(x[:, 0], w)
    assert torch.equal(flat, torch.cat([native.linear(x[:, 0], one) for one in w], dim=1))


def network(
    width: int, inner: int, dtype: torch.dtype, layout: int, has_bias: bool
) -> StoredTensors:
    w = StoredTensors()
    w["gate"], w["up"] = (stored(inner, width, dtype, layout) / width**0.5 for _ in range(2))
    w["down"] = stored(width, inner, dtype, layout) / inner**0.5
    if has_bias:
        w["gate_bias"], w["up_bias"] = torch.randn(inner).to(dtype), torch.randn(inner).to(dtype)
        w["down_bias"] = torch.randn(width).to(dtype)
    return w


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_network_is_found_where_its_tensors_lie(native, has_bias):
    """Structures of a part that is laid out alike are moved, unless they hold copies."""
    whole = network(24, 40, torch.bfloat16, 0, has_bias)
    made = {name: plain(whole, name) for name in whole}
    size = round_up(sum(t.nbytes for t in made.values()), 64)
    memory = torch.zeros(3 * size, dtype=torch.uint8)
    slots = []
    for slot in range(3):
        at, own = slot * size, StoredTensors()
        for name, t in made.items():
            own[name] = here = memory[at : at + t.nbytes].view(t.dtype).view(t.shape)
            here.copy_(t + slot)
            at += t.nbytes
        slots.append(own)
    first = slots[0]
    x = torch.randn(3, 24)
    for order in ((1, 0, 2), (2, 1)):
        for slot in order:
            moved = first.moved(slot * size)
            got = native.expert_ffn(x, moved, SwiGlu())
            assert torch.equal(got, native.expert_ffn(x, slots[slot], SwiGlu()))
            assert torch.equal(got, native.expert_ffn(x, moved, SwiGlu()))
    assert bool(first.moved(0)._derived) == (not has_bias)


@few(40)
@given(st.integers(1, 5), st.integers(1, 90), SIZES, SIZES, TYPES, LAYOUTS, ACTIVATIONS, SEEDS)
def test_experts(native, count, rows, width, inner, dtype, layout, activation, seed):
    torch.manual_seed(seed)
    networks = [network(width, inner, dtype, layout, seed % 2 == 0) for _ in range(count)]
    if isinstance(activation, ReluSquared):
        for w in networks:
            del w["gate"]
    x = torch.randn(rows, width)
    chosen = [torch.randperm(rows)[: int(torch.randint(0, rows + 1, ()))] for _ in networks]
    counts = torch.tensor([len(one) for one in chosen])
    groups = ExpertGroups(torch.randperm(int(counts.sum())), torch.cat(chosen), counts)
    got, expected = (torch.zeros(len(groups.order), width) for _ in range(2))
    native.experts(x, dict(enumerate(networks)), groups, activation, got)
    TORCH.experts(x, dict(enumerate(networks)), groups, activation, expected)
    close(got, expected, size=4)
    parts = zip(networks, chosen, groups.order.split(counts.tolist()), strict=True)
    for i, (threads, (w, picked, places)) in enumerate(zip(THREADS * count, parts, strict=False)):
        threads_of(native, threads)
        assert torch.equal(native.expert_ffn(x[picked], w, activation), got[places])
        alone = torch.zeros_like(got)
        native.experts(x, {i: w}, groups, activation, alone)
        assert torch.equal(alone[places], got[places])
        assert alone.count_nonzero() == alone[places].count_nonzero(), "rows of others"
        for part in cuts(len(picked), seed):
            some = ExpertGroups(places[part], picked[part], torch.tensor([len(picked[part])]))
            alone = torch.zeros_like(got)
            native.experts(x, {0: w}, some, activation, alone)
            assert torch.equal(alone[places[part]], got[places[part]])
    threads_of(native, 1)


@few(30)
@given(st.sampled_from([float("inf"), -float("inf"), float("nan"), 1e38, 1e-41, -0.0]), SEEDS)
def test_extreme_values_stay_in_their_row(native, value, seed):
    torch.manual_seed(seed)
    rows, width, features = 1 + seed % 40, 1 + seed % 70, 1 + seed % 90
    w = torch.randn(features, width).bfloat16()
    x = torch.randn(rows, width)
    before = native.linear(x, w)
    bad = seed % rows
    x[bad, seed % width] = value
    after = native.linear(x, w)
    others = torch.arange(rows) != bad
    assert torch.equal(before[others], after[others])
    torch.testing.assert_close(
        after[bad], (x[bad].double() @ w.double().T).float(), atol=1e-4, rtol=1e-4, equal_nan=True
    )
    tensors = network(width, features, torch.bfloat16, 0, has_bias=False)
    good = x.clone()
    good[bad, seed % width] = 0.5
    got, plain = (native.expert_ffn(one, tensors, SwiGlu()) for one in (x, good))
    assert torch.equal(got[others], plain[others])
    if value != value:
        assert got[bad].isnan().all()


@pytest.mark.parametrize("name", NATIVE)
def test_bf16_activations(name):
    w, x = torch.randn(70, 130).bfloat16(), torch.randn(33, 130)
    tensors = network(130, 70, torch.bfloat16, 0, has_bias=True)
    torch_bf16 = TorchKernels(bf16_activations=True)
    with kernels_of(name, bf16_activations=True) as native:
        whole = native.linear(x, w)
        close(whole, torch_bf16.linear(x, w), size=130**0.5)
        assert not torch.equal(whole, TORCH.linear(x, w))
        assert torch.equal(native.linear(x[3:5], w), whole[3:5])
        got = native.expert_ffn(x, tensors, SwiGlu())
        expected = torch_bf16.expert_ffn(x, tensors, SwiGlu())
        # hidden values next to a tie may be rounded the other way
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=1e-2)
        assert torch.equal(native.expert_ffn(x[7:9], tensors, SwiGlu()), got[7:9])


# --- attention ------------------------------------------------------------------------------------

PAGE = 4
SHAPES = st.sampled_from([
    (4, 2, 8, 8), (3, 3, 5, 7), (8, 1, 12, 4), (16, 2, 64, 64), (5, 1, 33, 31), (2, 1, 300, 20)
])  # fmt: skip
CACHE_TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8])
LENGTHS = st.lists(
    st.tuples(st.integers(0, 150), st.integers(1, 70), st.booleans()), min_size=1, max_size=5
)


def attention_work(sequences) -> tuple[AttentionWork, int]:
    """Rows of sequences of (rows before, rows now, is prompt), over pages in random order."""
    counts = [-(-(before + rows) // PAGE) for before, rows, _ in sequences]
    order = torch.randperm(sum(counts)).tolist()
    firsts = [sum(rows for _, rows, _ in sequences[:i]) for i in range(len(sequences))]
    work = AttentionWork(
        first_row=tuple(firsts),
        num_rows=tuple(rows for _, rows, _ in sequences),
        first_position=tuple(before for before, _, _ in sequences),
        pages=tuple(tuple(order.pop() for _ in range(count)) for count in counts),
        is_prompt=tuple(kind for _, _, kind in sequences),
    )
    return work, sum(counts)


def rows_of(x: torch.Tensor, dtype: torch.dtype) -> PagedRows:
    """Rows of a cache; int8 ones with scales of their own."""
    if dtype is not torch.int8:
        return PagedRows(x.to(dtype))
    scales = x.abs().amax(-1) / 127
    codes = (x / scales[..., None]).round() + INT8_ZERO
    return PagedRows(codes.to(torch.uint8), scales)


def alone(work: AttentionWork, i: int, first: int, last: int) -> AttentionWork:
    """Rows `first` to `last` of one sequence."""
    return AttentionWork(
        first_row=(0,), num_rows=(last - first,), first_position=(work.first_position[i] + first,),
        pages=(work.pages[i],), is_prompt=(work.is_prompt[i],),
    )  # fmt: skip


@few(50)
@given(
    LENGTHS, SHAPES, TYPES, st.sampled_from([None, 1, 7, 64]), st.booleans(), st.booleans(), SEEDS
)
def test_attention(native, sequences, shape, dtype, window, has_sinks, is_latent, seed):
    heads, groups, key_dim, value_dim = shape
    torch.manual_seed(seed)
    work, pages = attention_work(sequences)
    width = -(-max(key_dim, value_dim) // 32) * 32 + 32 * (seed % 2)
    keys = rows_of(torch.randn(pages, groups, PAGE, width), dtype)
    values = rows_of(torch.randn(pages, groups, PAGE, width), dtype)
    if is_latent:  # values are the first columns of the keys
        values = replace(keys, rows_PKBd=keys.rows_PKBd[..., :value_dim])
    q = torch.randn(sum(work.num_rows), heads, key_dim)
    options = AttentionOptions(
        scale=key_dim**-0.5, value_dim=value_dim, window=window,
        sinks_H=torch.randn(heads) if has_sinks else None,
    )  # fmt: skip
    whole = native.attention(q, keys, values, work, options)
    close(whole, TORCH.attention(q, keys, values, work, options))
    for i, rows in enumerate(work.num_rows):
        for threads, part in zip(THREADS * rows, cuts(rows, seed + i), strict=False):
            threads_of(native, threads)
            mine = slice(work.first_row[i] + part.start, work.first_row[i] + part.stop)
            one = alone(work, i, part.start, part.stop)
            assert torch.equal(native.attention(q[mine], keys, values, one, options), whole[mine])
    threads_of(native, 1)


# --- row-wise operations --------------------------------------------------------------------------


@few(40)
@given(st.integers(1, 60), SIZES, TYPES, st.booleans(), SEEDS)
def test_normalise(native, rows, width, dtype, plus_one, seed):
    torch.manual_seed(seed)
    norm, weight = RmsNorm(eps=1e-6, plus_one=plus_one), torch.randn(width).to(dtype)
    x = torch.randn(rows, 2, width + seed % 2)[..., :width] * 10 ** (seed % 5 - 2)
    got = native.normalise(norm, weight, None, x)
    close(got, TORCH.normalise(norm, weight, None, x))
    assert torch.equal(native.normalise(norm, weight, None, x[-1:]), got[-1:])
    bare = native.normalise(norm, None, None, x)
    close(bare, TORCH.normalise(norm, None, None, x))
    assert torch.equal(
        bare, native.normalise(replace(norm, plus_one=False), torch.ones(width), None, x)
    )
    bias = torch.randn(width).to(dtype)
    plain = LayerNorm(eps=1e-5, bias=True)
    close(native.normalise(plain, weight, bias, x), TORCH.normalise(plain, weight, bias, x))


@few(40)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 40), st.booleans(), SEEDS)
def test_rotate(native, rows, heads, pairs, interleaved, seed):
    torch.manual_seed(seed)
    rope = Rope(dim=2 * pairs, theta=1e4, scaling=NoScaling(), interleaved=interleaved)
    x = torch.randn(rows, heads + 1, 2 * pairs + seed % 3)[:, 1:]
    cos, sin = torch.randn(2, rows, pairs)
    whole = x.clone()
    got, expected, alone = (whole.clone()[:, 1:] for _ in range(3))
    native.rotate(got, cos, sin, rope)
    TORCH.rotate(expected, cos, sin, rope)
    close(got, expected)
    native.rotate(alone[-1:], cos[-1:], sin[-1:], rope)
    assert torch.equal(alone[-1:], got[-1:])


@few(60)
@given(st.integers(1, 90), st.integers(1, 5), SIZES, TYPES, SEEDS)
def test_write_rows(native, rows, heads, width, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(rows, heads + 1, width + 3)[:, 1:, :width] * 10.0 ** (seed % 5)
    x[0, 0, 0] = (float("inf"), 3.4e38, 1e-41, -0.0, 70000.0)[seed % 5]
    pages = torch.randperm(rows)
    offsets = torch.randint(0, 4, (rows,))
    got, expected = (
        PagedRows(torch.ones(rows, heads, 4, width + 5).to(dtype)[..., : width + 2]) for _ in "12"
    )
    for threads in THREADS:
        threads_of(native, threads)
        native.write_rows(got, pages, offsets, x)
        TORCH.write_rows(expected, pages, offsets, x)
        assert torch.equal(got.rows_PKBd, expected.rows_PKBd)
    threads_of(native, 1)
    nothing = torch.full((1, heads, width), float("nan"))
    native.write_rows(got, pages[:1], offsets[:1], nothing)
    assert got.rows_PKBd[pages[0], :, offsets[0], :width].isnan().all()


@few(60)
@given(st.integers(1, 90), st.integers(1, 5), SIZES, SEEDS)
def test_int8_rows_are_written_with_the_same_codes_and_scales(native, rows, heads, width, seed):
    torch.manual_seed(seed)
    x = torch.randn(rows, heads + 1, width)[:, 1:] * 10.0 ** (seed % 5)
    special = (float("inf"), float("nan"), 3.4e38, 1e-41, 0.0)[seed % 5]
    x[0, 0, :: max(1, width - 1)] = special
    x[-1, -1] = 0.0
    pages, offsets = torch.randperm(rows), torch.randint(0, 4, (rows,))
    got, expected = (
        PagedRows(
            torch.full((rows, heads, 4, width + 2), 7, dtype=torch.uint8),
            torch.ones(rows, heads, 4),
        )
        for _ in "12"
    )
    native.write_rows(got, pages, offsets, x)
    TORCH.write_rows(expected, pages, offsets, x)
    assert torch.equal(got.rows_PKBd, expected.rows_PKBd)
    assert got.scales_PKB is not None and expected.scales_PKB is not None
    torch.testing.assert_close(got.scales_PKB, expected.scales_PKB, rtol=0, atol=0, equal_nan=True)


@few(40)
@given(st.integers(1, 60), st.integers(1, 5), SIZES, SIZES, SEEDS)
def test_join_and_gate(native, rows, heads, first, second, seed):
    torch.manual_seed(seed)
    both = torch.randn(rows, heads, first + second)
    parts = (torch.randn(rows, 2 * heads, first)[:, ::2], both[..., first:])
    got = native.join(parts)
    assert torch.equal(got, TORCH.join(parts))
    for gate in (torch.randn(rows, heads, first + second), torch.randn(rows, 1, 1)):
        expected, last = got.clone(), got[-1:].clone()
        native.gate(got, gate)
        TORCH.gate(expected, gate)
        close(got, expected)
        native.gate(last, gate[-1:])
        assert torch.equal(last, got[-1:])


@few(60)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40), SEEDS)
def test_group(native, rows, per_row, num_experts, seed):
    torch.manual_seed(seed)
    ids = torch.randint(0, num_experts, (rows, per_row))
    got, expected = (kernels.group(ids, num_experts) for kernels in (native, TORCH))
    assert torch.equal(got.order, expected.order) and torch.equal(got.rows, expected.rows)
    assert torch.equal(got.counts_E, expected.counts_E)


@few(40)
@given(st.integers(1, 60), SIZES, SEEDS)
def test_accumulate(native, rows, width, seed):
    torch.manual_seed(seed)
    y, start = torch.randn(rows, width), torch.randn(rows, width)
    got, expected, last = start.clone(), start.clone(), start[-1:].clone()
    native.accumulate(got, y, 1.5)
    TORCH.accumulate(expected, y, 1.5)
    close(got, expected)
    native.accumulate(last, y[-1:], 1.5)
    assert torch.equal(last, got[-1:])


@few(40)
@given(st.integers(1, 40), SIZES, SIZES, TYPES, LAYOUTS, st.booleans(), SEEDS)
def test_linears(native, rows, width, features, dtype, layout, has_bias, seed):
    torch.manual_seed(seed)
    w = StoredTensors()
    for i, name in enumerate("ab"):
        w[f"{name}.weight"] = stored(features + i, width, dtype, layout)
    if has_bias:
        w["b.bias"] = torch.randn(features + 1).to(dtype)
    x = torch.randn(rows, width)
    for _ in range(2):  # made, then kept
        a, b = native.linears(x, w, ("a", "b"))
        assert torch.equal(a, native.linear(x, w["a.weight"]))
        assert torch.equal(b, native.linear(x, w["b.weight"], w.get("b.bias")))
    (alone,) = native.linears(x, w, ("b",))
    assert torch.equal(alone, b)


@few(40)
@given(st.integers(1, 60), st.integers(1, 9), SIZES, st.booleans(), SEEDS)
def test_combine(native, rows, per_row, width, has_shared, seed):
    torch.manual_seed(seed)
    weights, outputs = torch.randn(rows, per_row), torch.randn(rows, per_row, width)
    shared = torch.randn(rows, width) if has_shared else None
    start = torch.randn(rows, width)
    got, expected, last = start.clone(), start.clone(), start[-1:].clone()
    native.combine(weights, outputs, shared, got, 1.5)
    TORCH.combine(weights, outputs, shared, expected, 1.5)
    close(got, expected, size=per_row)
    native.combine(weights[-1:], outputs[-1:], None if shared is None else shared[-1:], last, 1.5)
    assert torch.equal(last, got[-1:])
    alone = native.weighted_sum(weights, outputs, shared)
    close(alone, TORCH.weighted_sum(weights, outputs, shared), size=per_row)
    start.zero_()
    native.combine(weights, outputs, shared, start, 1.0)
    assert torch.equal(alone, start)
    native.scale(alone, torch.tensor(0.3))
    assert torch.equal(alone, start * 0.3)

"""Keys and values in pages: what is stored, what kernels make of it, and what int8 rows cost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import attention_work
from engines import engine_for, make_model, prompts, request, run_all
from fake_cuda import FakeCuda
from windlass.device.host_memory import HostAllocator
from windlass.errors import UsageError
from windlass.kernels import rowwise
from windlass.kernels.cpu import library
from windlass.kernels.cpu.native import NativeKernels
from windlass.kernels.interface import AttentionOptions
from windlass.kernels.reference import TorchKernels
from windlass.kernels.rowwise import rounded
from windlass.kernels.torch_attention import _gather
from windlass.kvcache.kv_cache import KvCache, PagedShape, bytes_per_token
from windlass.options import EngineOptions
from windlass.tensors import INT8_ZERO, PagedRows

PAGE = 4
LIBRARY = library.load()
KERNELS = [TorchKernels()] + (
    [] if isinstance(LIBRARY, str) else [NativeKernels(LIBRARY, threads=1)]
)


def _store(shape, *, dtype=torch.int8, pages=9):
    return KvCache([shape], HostAllocator(), dtype=dtype, num_pages=pages, page_tokens=PAGE)


def _fill(store, key, value):
    """Hands out all pages in some order and writes the rows from position 0."""
    order = store.take_pages(store.num_free_pages)
    pages = [order[i] for i in torch.randperm(len(order)).tolist()]
    positions = torch.arange(len(key))
    for rows, x in zip(store.stored(0), (key, value), strict=False):
        KERNELS[-1].write_rows(rows, torch.tensor(pages)[positions // PAGE], positions % PAGE, x)
    return tuple(pages)


def _widened(store):
    """The same store in fp32, with what int8 rows mean."""
    if store.scales_PKB is None:
        return store
    rows = (store.rows_PKBd.float() - INT8_ZERO) * store.scales_PKB[..., None]
    return PagedRows(rows)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(-30, 30), st.integers(0, 10_000))
def test_a_row_is_rounded_by_itself_to_half_a_step(width, power, seed):
    torch.manual_seed(seed)
    x = torch.randn(6, 2, width) * 10.0**power
    x[2] = 0
    x[3, 1] *= 1e-3
    codes, scales = rounded(x)
    assert codes.dtype is torch.uint8 and scales.dtype is torch.float32
    back = (codes.float() - INT8_ZERO) * scales[..., None]
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((back - x).abs() <= 0.5001 * step).all()
    assert (back[2] == 0).all()
    for row in range(len(x)):  # alone, and in a tensor of another layout
        alone = rounded(x[row : row + 1])
        assert torch.equal(alone[0][0], codes[row]) and torch.equal(alone[1][0], scales[row])
    turned = rounded(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(turned[0], codes) and torch.equal(turned[1], scales)


@pytest.mark.parametrize("tiny", [1e-45, 1e-44, 1e-38])
def test_rows_too_small_for_a_scale_are_not_nan(tiny):
    codes, scales = rounded(torch.full((1, 1, 5), tiny))
    back = (codes.float() - INT8_ZERO) * scales[..., None]
    assert (back >= 0).all() and (back <= 2 * tiny).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad):
    x = torch.ones(2, 1, 5)
    x[1, 0, 2] = bad
    codes, scales = rounded(x)
    back = (codes.float() - INT8_ZERO) * scales[..., None]
    assert torch.equal(back[0], x[0]) and back[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("shape", [PagedShape(2, 7, 5), PagedShape(1, 20, 12, value_in_key=True)])
def test_pages_are_cleared_when_they_are_handed_out(shape, dtype):
    store = _store(shape, dtype=dtype)
    key = torch.full((9 * PAGE, shape.num_heads, shape.key_dim), float("nan"))
    pages = _fill(store, key, key[..., : shape.value_dim])
    assert _widened(store.paged(0)[0]).rows_PKBd.isnan().any()
    store.give_pages(pages)
    store.take_pages(9)
    for rows in store.paged(0):
        assert (_widened(rows).rows_PKBd == 0).all()
    store.give_pages(pages)
    store.check({})


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_a_device_is_told_once_what_to_clear(dtype):
    """Pages of several sequences, without a copy for any."""
    device = FakeCuda(seed=2)
    with device.watched(), device.streams.on(device.streams.compute):
        store = KvCache(
            [PagedShape(2, 7, 5), PagedShape(1, 20, 12, value_in_key=True)], device,
            dtype=dtype, num_pages=9, page_tokens=PAGE,
        )  # fmt: skip
        stored = [one for layer in (0, 1) for one in store.stored(layer)]
        for one in stored:
            one.rows_PKBd.fill_(7)
            if one.scales_PKB is not None:
                one.scales_PKB.fill_(torch.nan)
        taken = store.take_pages(3) + store.take_pages(2)
        assert device.num_uploads == 0
        assert store.uncleared() == taken and store.uncleared() == []
        store.clear_all(device.tensor(taken, dtype=torch.int64))
    device.synchronize()
    others = sorted(set(range(9)) - set(taken))
    for one in stored:
        assert (_widened(one).rows_PKBd[taken] == 0).all()
        assert (one.rows_PKBd[others] == 7).all()


def test_bytes_of_a_token_count_the_scales():
    shapes = [PagedShape(4, 64, 64), PagedShape(1, 576, 512, value_in_key=True)]
    assert bytes_per_token(shapes, torch.bfloat16) == 2 * (4 * 128 + 576)
    assert bytes_per_token(shapes, torch.int8) == 4 * 128 + 8 * 4 + 576 + 4
    for dtype in (torch.bfloat16, torch.int8):
        store = KvCache(shapes, HostAllocator(), dtype=dtype, num_pages=3, page_tokens=PAGE)
        held = {}
        for layer in range(2):
            for rows in store.paged(layer):
                for tensor in (rows.rows_PKBd, rows.scales_PKB):
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        held[storage.data_ptr()] = storage.nbytes()
        (num_bytes,) = held.values()
        gaps = num_bytes - 3 * PAGE * bytes_per_token(shapes, dtype)
        assert gaps == 2 * 4 * 256  # one allocation, whose tensors begin at multiples of 256


# --- kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)
@pytest.mark.parametrize(
    ("heads", "shape"),
    [(4, PagedShape(2, 7, 5)), (3, PagedShape(3, 16, 16)), (8, PagedShape(2, 64, 64)),
     (5, PagedShape(1, 20, 12, value_in_key=True)),
     (4, PagedShape(1, 300, 260, value_in_key=True))],
)  # fmt: skip
@pytest.mark.parametrize("window", [None, 6])
def test_attention_over_int8_rows_is_that_over_what_they_mean(kernels, heads, shape, window):
    """The same bits: widening is part of reading."""
    torch.manual_seed(0)
    num_rows = 9 * PAGE - 2
    store = _store(shape)
    key = torch.randn(num_rows, shape.num_heads, shape.key_dim)
    key *= torch.logspace(-2, 1, num_rows)[:, None, None]  # scales that differ by row and head
    value = torch.randn(num_rows, shape.num_heads, shape.value_dim) * key[..., :1]
    if shape.value_in_key:
        value = key[..., : shape.value_dim]
    pages = _fill(store, key, value)
    q = torch.randn(num_rows, heads, shape.key_dim)
    options = AttentionOptions(
        scale=0.3, value_dim=shape.value_dim, window=window, sinks_H=torch.randn(heads)
    )
    keys, values = store.paged(0)
    wide = _widened(keys), _widened(values)
    if shape.value_in_key:  # a view here too: native kernels read whole vectors
        wide = wide[0], PagedRows(wide[0].rows_PKBd[..., : shape.value_dim])
    for kind in (True, False):
        work = attention_work([(0, num_rows, kind)], [pages])
        got = kernels.attention(q, keys, values, work, options)
        expected = kernels.attention(q, *wide, work, options)
        assert torch.equal(got, expected)
        torch.testing.assert_close(
            got, KERNELS[0].attention(q, keys, values, work, options), atol=2e-5, rtol=2e-5
        )
        for first, last in ((0, 1), (5, 20), (num_rows - 1, num_rows)):
            part = attention_work([(first, last - first, kind)], [pages])
            alone = kernels.attention(q[first:last], keys, values, part, options)
            assert torch.equal(alone, got[first:last])


def test_gathered_blocks_are_what_was_written():
    shape = PagedShape(2, 7, 5)
    store = _store(shape)
    key, value = torch.randn(9 * PAGE, 2, 7), torch.randn(9 * PAGE, 2, 5)
    pages = torch.tensor(_fill(store, key, value))[None]
    for rows, x in zip(store.paged(0), (key, value), strict=True):
        got = _gather(rows, pages)[..., : x.shape[2]].transpose(0, 1)
        assert ((got - x).abs() <= x.abs().amax(-1, keepdim=True) / 253).all()


# --- the price ------------------------------------------------------------------------------------

LENGTHS = (70, 9, 240, 200)  # longer than windows and than a chunk; ragged
# Mean error of a prompt token's log-probability against keys and values in fp32, on random
# checkpoints: twice what was measured. Scales that are 2 % wrong cost more.
BOUNDS = {"qwen3_moe": 0.008, "deepseek_v3": 0.016, "gpt_oss": 0.013}


def _scores(path, **options):
    """Log-probabilities of all prompt tokens but each first, and bytes of a page."""
    wanted = [
        request(str(i), prompt, max_tokens=1, prompt_logprobs=0)
        for i, prompt in enumerate(prompts(LENGTHS))
    ]
    with engine_for(path, **options) as engine:
        results = run_all(engine, wanted)
        page_bytes = engine.plan.host.kv_page_bytes
    found = [
        step[token].logprob
        for output in (results[str(i)] for i in range(len(LENGTHS)))
        for token, step in zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
        if step is not None
    ]
    return torch.tensor(found, dtype=torch.float64), page_bytes


@pytest.mark.parametrize("family", BOUNDS)
def test_int8_costs_little_and_a_wrong_scale_is_noticed(family, tmp_path, monkeypatch):
    make_model(family, tmp_path)
    exact, exact_bytes = _scores(tmp_path)
    scores, page_bytes = _scores(tmp_path, kv_cache_dtype="int8")
    assert page_bytes < 0.32 * exact_bytes  # rows of 16 or 48: a byte for four, and a scale
    error = (scores - exact).abs()
    assert 0 < error.mean() <= BOUNDS[family], f"{family}: mean {error.mean():.1e}"
    assert error.median() <= BOUNDS[family] / 2

    def slightly_wrong(x_TKd):
        codes, scales = rounded(x_TKd)
        return codes, scales * 1.02

    def of_the_neighbour(x_TKd):
        codes, scales = rounded(x_TKd)
        return codes, scales.roll(1, 0)

    for broken, least in ((slightly_wrong, 1), (of_the_neighbour, 10)):
        monkeypatch.setattr(rowwise, "rounded", broken)
        wrong, _ = _scores(tmp_path, kv_cache_dtype="int8", moe_backend="torch")
        assert (wrong - exact).abs().mean() > least * BOUNDS[family], broken.__name__


def test_an_explicit_type_of_the_checkpoint_changes_nothing(tmp_path):
    make_model("qwen3_moe", tmp_path)
    exact, exact_bytes = _scores(tmp_path)
    scores, page_bytes = _scores(tmp_path, kv_cache_dtype="float32")
    assert torch.equal(scores, exact) and page_bytes == exact_bytes
    for dtype, largest in (("float16", 0.002), ("bfloat16", 0.005)):
        scores, page_bytes = _scores(tmp_path, kv_cache_dtype=dtype)
        assert 0 < (scores - exact).abs().mean() < largest
        assert 2 * page_bytes == exact_bytes


def test_the_type_is_part_of_what_results_depend_on(tmp_path):
    make_model("qwen3_moe", tmp_path, dtype=torch.bfloat16)
    found = {}
    for dtype in ("auto", "bfloat16", "int8"):
        with engine_for(tmp_path, kv_cache_dtype=dtype) as engine:
            found[dtype] = engine.fingerprint
            assert f"in {engine.plan.kv_cache_dtype})" in engine.plan.lines()[0]
    assert found["auto"] == found["bfloat16"] != found["int8"]


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3", "q8_0", "int4"])
def test_other_types_are_refused(dtype):
    with pytest.raises(UsageError, match="allowed auto, bfloat16, float16, float32, int8"):
        EngineOptions(kv_cache_dtype=dtype)

"""The kernels of a CUDA device behind their protocol: as torch's, bits of a row its own, nothing
read of what tensors contain."""

from typing import Any

import pytest
import torch
from gpu.expert_slots import FORMATS, Layer, Make, Sizes, make_layer, packed, plain
from gpu.tolerances import TOLERANCES, error

from attention import attention_work
from windlass.errors import UsageError
from windlass.formats import WeightFormat
from windlass.kernels import row_counts
from windlass.kernels.cuda import CudaKernels
from windlass.kernels.interface import AttentionOptions, Kernels, RoutedIds
from windlass.kernels.reference import TorchKernels
from windlass.kernels.select_device import choose_device_kernels
from windlass.kernels.triton import dense, expert_table, launch
from windlass.models.spec import (
    ClampedSwiGlu,
    GeGlu,
    LayerNorm,
    ReluSquared,
    RmsNorm,
    SoftmaxTopK,
    SwiGlu,
)
from windlass.tensors import Packed, PackedStack, PagedRows, StoredTensors, Tensors

FP32, BF16 = torch.float32, torch.bfloat16
EXPERTS, TOP_K = 3, 2
EXACT, NARROW = CudaKernels(80), CudaKernels(80, bf16_activations=True)
TORCH = TorchKernels()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [FP32, BF16, torch.float16])
@pytest.mark.parametrize("features", [48, 41])  # the second is none of the BLAS
def test_linear(weights: torch.dtype, features: int) -> None:
    x, w, bias = normal(40, 64), normal(features, 64, seed=1).to(weights), normal(features, seed=2)
    for kernels in (EXACT, NARROW):
        got = kernels.linear(x, w, bias)
        rows = x if kernels is EXACT else x.to(weights if weights is not FP32 else BF16).float()
        assert error(got, rows @ w.float().t() + bias) < TOLERANCES[FP32]
        for part in (slice(0, 1), slice(3, 20), slice(39, 40)):
            assert torch.equal(kernels.linear(x[part], w, bias), got[part])


def test_linear_into_columns_of_a_wider_result() -> None:
    x, out = normal(3, 64), torch.zeros(3, 100)
    for features, w in ((32, normal(32, 64, seed=1)), (20, normal(20, 64, seed=1))):
        part = out[:, 50 : 50 + features]
        assert EXACT.linear(x, w, out=part) is part
        assert error(part, x @ w.t()) < TOLERANCES[FP32]
    assert out[:, :50].eq(0).all() and out[:, 82:].eq(0).all()


def test_linear_takes_strided_and_grouped_weights() -> None:
    fused, x = normal(2 * 16, 64).bfloat16(), normal(9, 64)
    assert torch.equal(EXACT.linear(x, fused[::2]), EXACT.linear(x, fused[::2].contiguous()))
    grouped = fused.view(4, 8, 64)[:, 1:5]
    want = x @ grouped.reshape(16, 64).float().t()
    assert error(EXACT.linear(x, grouped), want) < TOLERANCES[FP32]


def test_linears_are_those_of_each() -> None:
    w: Tensors = {"a.weight": normal(16, 64), "b.weight": normal(9, 64).bfloat16(),
                  "b.bias": normal(9)}  # fmt: skip
    x = normal(5, 64, seed=3)
    for kernels in (EXACT, NARROW):
        a, b = kernels.linears(x, w, ("a", "b"))
        assert torch.equal(a, kernels.linear(x, w["a.weight"]))
        assert torch.equal(b, kernels.linear(x, w["b.weight"], normal(9)))


def test_the_blas_is_asked_where_its_bits_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else never: neither for many rows nor for few."""
    x, w = normal(40, 64), normal(48, 64, seed=1)
    assert dense.DenseProducts().linear(x, w) is not None
    asked = []

    def moody(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return torch.mm(x, w.t()) + 1e-3 * (len(x) > 16)

    monkeypatch.setattr(dense, "_product", moody)
    products = dense.DenseProducts()
    assert products.linear(x, w) is not None and asked[-1] == 64
    monkeypatch.setattr(dense, "_product", lambda x, w: torch.mm(x, w.t()) + 1e-3 * len(x))
    products = dense.DenseProducts()
    assert products.linear(x, w) is None and products.linear(x[:1], w) is None


def test_row_counts_agree_with_the_smallest_block_that_has_enough() -> None:
    steps = row_counts.Steps((16, 32, 64, 128), (16, 64), 128, 1 << 20)

    def moody(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, w.t()) + 1e-3 * (len(x) > 32)

    assert row_counts.RowLadder(moody, steps=steps).counts((16, 16)) == (64, 128)
    few = steps._replace(least=32)
    assert row_counts.RowLadder(moody, steps=few).counts((16, 16)) == (16, 32)


def test_a_matrix_for_each_head() -> None:
    x, w = normal(5, 3, 24), normal(3, 24, 40, seed=1).transpose(1, 2).bfloat16()
    for kernels in (EXACT, NARROW):
        rows = x if kernels is EXACT else x.bfloat16().float()
        want = torch.einsum("tha,hba->thb", rows, w.float())
        got = kernels.batched_linear(x, w)
        assert error(got, want) < TOLERANCES[FP32]
        assert torch.equal(kernels.batched_linear(x[1:2], w), got[1:2])
    state = w.float()  # is never met by rounded rows
    assert torch.equal(NARROW.batched_linear(x, state), EXACT.batched_linear(x, state))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_packed_matrix_for_each_head(*, is_transposed: bool) -> None:
    torch.manual_seed(1)
    form = WeightFormat(code="e4m3", rows=16, columns=16)
    own = make_layer(packed(form, FP32), Sizes(3, 32, 48)).experts
    matrices = [own[i]["up"] for i in range(3)]
    stack = PackedStack(tuple(m for m in matrices if isinstance(m, Packed)))
    taken = stack.transpose(1, 2) if is_transposed else stack
    x = normal(4, 3, taken.shape[2])
    want = TORCH.batched_linear(x, taken)
    assert error(EXACT.batched_linear(x, taken), want) < TOLERANCES[FP32]


# --- experts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation", [SwiGlu(), ClampedSwiGlu(alpha=1.702, limit=0.5), GeGlu(), ReluSquared()]
)
def test_a_network(activation) -> None:
    w: dict[str, torch.Tensor] = {"up": normal(48, 64), "down": normal(64, 48, seed=1)}
    if not isinstance(activation, ReluSquared):
        w["gate"] = normal(48, 64, seed=2)
    w |= {f"{name}_bias": normal(len(m), seed=3) for name, m in w.items()}
    x = normal(5, 64, seed=4)
    got = EXACT.expert_ffn(x, w, activation)
    assert error(got, TORCH.expert_ffn(x, w, activation)) < TOLERANCES[FP32]
    assert torch.equal(EXACT.expert_ffn(x[2:3], w, activation), got[2:3])


def _layer(make: Make, spare: int = 3) -> Layer:
    torch.manual_seed(1)
    return make_layer(make, Sizes(EXPERTS, 64, 48, spare))


def _routed(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    ids_TA = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(rows)])
    return torch.randn(rows, 64), ids_TA


def _experts(kernels: Kernels, layer: Layer, x_TD: torch.Tensor, ids_TA: torch.Tensor):
    out = torch.full((ids_TA.numel(), 64), torch.nan)
    groups = kernels.group(ids_TA, EXPERTS)
    kernels.experts(x_TD, layer.experts, groups, layer.activation, out)
    return out


@pytest.mark.parametrize("name", FORMATS)
def test_experts_of_every_format(name: str) -> None:
    layer, (x_TD, ids_TA) = _layer(FORMATS[name]), _routed(2)
    groups = TORCH.group(ids_TA, EXPERTS)
    got = _experts(EXACT, layer, x_TD, ids_TA)
    assert error(got, layer.reference(x_TD, groups)) < TOLERANCES[FP32]
    got = _experts(NARROW, layer, x_TD, ids_TA)
    assert error(got, layer.reference(x_TD.bfloat16(), groups)) < TOLERANCES[BF16]


@pytest.mark.parametrize("kernels", [EXACT, NARROW])
def test_the_bits_of_a_row_among_experts_are_its_own(kernels: CudaKernels) -> None:
    """Whatever the other rows, their tiles, and the slots."""
    layer, (x_TD, ids_TA) = _layer(plain(BF16)), _routed(30)
    together = _experts(kernels, layer, x_TD, ids_TA)
    for rows in (slice(0, 1), slice(1, 20)):
        alone = _experts(kernels, layer, x_TD[rows], ids_TA[rows])
        assert torch.equal(alone, together.view(30, TOP_K, 64)[rows].flatten(0, 1))
    elsewhere = _layer(plain(BF16), spare=7)
    assert torch.equal(_experts(kernels, elsewhere, x_TD[:1], ids_TA[:1]), together[:TOP_K])


def _by_row(kernels: CudaKernels, layer: Layer, x_TD: torch.Tensor, ids_TA: torch.Tensor):
    out = torch.full((ids_TA.numel(), 64), torch.nan)
    routed = RoutedIds(ids_TA, EXPERTS)
    kernels.experts_by_row(x_TD, layer.experts, routed, layer.activation, out)
    return out


@pytest.mark.parametrize("name", FORMATS)
def test_experts_by_row_of_every_format(name: str) -> None:
    """Rows are rounded to 16 bits there, and nothing after them."""
    layer, (x_TD, ids_TA) = _layer(FORMATS[name]), _routed(2)
    groups = TORCH.group(ids_TA, EXPERTS)
    for kernels, rows in ((EXACT, x_TD), (NARROW, x_TD.bfloat16().float())):
        got = _by_row(kernels, layer, x_TD, ids_TA)
        assert error(got, layer.reference(rows, groups)) < TOLERANCES[FP32]
        assert torch.equal(_by_row(kernels, layer, x_TD[1:], ids_TA[1:]), got[TOP_K:])


def test_experts_that_lie_alike_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[list[int]] = []

    def counted(*args: Any) -> None:
        launches.append(args[2].tolist())
        launch.run_experts(*args)

    monkeypatch.setattr(expert_table, "run_experts", counted)
    layer, other = _layer(plain(BF16)), _layer(plain(BF16))
    x_TD, ids_TA = _routed(4)
    want = _experts(EXACT, layer, x_TD, ids_TA)
    assert len(launches) == 1 and -1 not in launches[0]
    out = torch.full_like(want, torch.nan)
    two = {1: layer.experts[1], 2: other.experts[2]}  # of two arenas
    EXACT.experts(x_TD, two, EXACT.group(ids_TA, EXPERTS), layer.activation, out)
    assert [row.count(-1) for row in launches[1:]] == [2, 2]
    is_absent = ids_TA.flatten() == 0
    assert out[is_absent].isnan().all() and torch.equal(out[~is_absent], want[~is_absent])


def test_where_an_expert_lies_is_derived_from_one_that_lies_alike() -> None:
    layer = _layer(plain(BF16))
    first = StoredTensors()
    for name, weight in layer.experts[0].items():
        first[name] = weight
    moved = {
        expert: first.moved(int(layer.slots_E[expert] - layer.slots_E[0]) * layer.slot_bytes)
        for expert in range(EXPERTS)
    }
    x_TD, ids_TA = _routed(4)
    want = _experts(EXACT, layer, x_TD, ids_TA)
    out = torch.full_like(want, torch.nan)
    for _ in range(2):
        EXACT.experts(x_TD, moved, EXACT.group(ids_TA, EXPERTS), layer.activation, out)
        assert torch.equal(out, want)


def test_an_expert_in_two_allocations_is_refused() -> None:
    w = {"gate": normal(48, 64), "up": normal(48, 64), "down": normal(64, 48)}
    x_TD, ids_TA = _routed(1)
    with pytest.raises(AssertionError, match="in two allocations"):
        EXACT.experts(x_TD, {0: w}, EXACT.group(ids_TA, 3), SwiGlu(), torch.empty(2, 64))


# --- attention ------------------------------------------------------------------------------------


def test_attention_of_both_kinds_of_rows() -> None:
    keys, values = PagedRows(normal(6, 2, 32, 16)), PagedRows(normal(6, 2, 32, 16, seed=1))
    work = attention_work([(30, 5, True), (40, 1, False)], [(3, 1), (0, 5)])
    options = AttentionOptions(scale=0.3, value_dim=16, window=20, sinks_H=normal(4, seed=2))
    q = normal(6, 4, 16, seed=3)
    want = TORCH.attention(q, keys, values, work, options)
    assert error(EXACT.attention(q, keys, values, work, options), want) < TOLERANCES[FP32]
    narrow = [PagedRows(x.rows_PKBd.bfloat16()) for x in (keys, values)]
    got = NARROW.attention(q, narrow[0], narrow[1], work, options)
    assert error(got, want) < TOLERANCES[BF16]


# --- rows -----------------------------------------------------------------------------------------


def test_what_happens_to_rows() -> None:
    x, y = normal(5, 3, 16)[:, :2], normal(5, 2, 16, seed=1)
    for norm in (RmsNorm(eps=1e-5, plus_one=True), LayerNorm(eps=1e-5, bias=True)):
        weight, bias = normal(16, seed=2).bfloat16(), normal(16, seed=3)
        got = EXACT.normalise(norm, weight, bias, x)
        assert error(got, TORCH.normalise(norm, weight, bias, x)) < TOLERANCES[FP32]
    assert torch.equal(EXACT.join((x, y)), TORCH.join((x, y)))
    changed = []
    for kernels in (EXACT, TORCH):
        hidden = normal(5, 16, seed=4)
        kernels.accumulate(hidden, normal(5, 16, seed=5), 0.5)
        kernels.accumulate(hidden, normal(5, 16, seed=6), 1.0)
        kernels.scale(hidden, torch.tensor(1.5))
        kernels.gate(hidden, normal(5, 1, seed=7))
        weights, outputs = normal(5, 3, seed=8), normal(5, 3, 16, seed=9)
        kernels.combine(weights, outputs, hidden.clone(), hidden, 0.7)
        changed.append(hidden + kernels.weighted_sum(weights, outputs, None))
    assert error(changed[0], changed[1]) < TOLERANCES[FP32]


def test_routes_and_groups() -> None:
    logits = normal(7, 8)
    routing = SoftmaxTopK(renorm_floor=0.0)
    got, want = (k.route(routing, 3, logits, None, wants_scores=True) for k in (EXACT, TORCH))
    assert torch.equal(got.ids_TA, want.ids_TA)
    assert error(got.weights_TA, want.weights_TA) < TOLERANCES[FP32]
    for one, other in zip(EXACT.group(got.ids_TA, 8), TORCH.group(got.ids_TA, 8), strict=True):
        assert torch.equal(one, other) and one.is_contiguous()


def test_nothing_is_read_of_what_tensors_contain(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device it would wait for all that was asked of it; a graph could not hold it."""
    layer, (x_TD, ids_TA) = _layer(plain(BF16)), _routed(4)
    keys = PagedRows(normal(6, 2, 32, 16))
    work = attention_work([(30, 3, True), (40, 1, False)], [(3, 1), (0, 5)])
    options = AttentionOptions(scale=0.3, value_dim=16)
    routing = SoftmaxTopK(renorm_floor=0.0)
    w = normal(48, 64)
    EXACT.linear(x_TD, w)  # the BLAS is compared when a shape is new

    def look(self: torch.Tensor, *args: object) -> None:
        raise AssertionError("a look at a tensor")

    for name in ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, look)
    for name in ("bincount", "equal", "nonzero", "unique"):
        monkeypatch.setattr(torch, name, look)
    EXACT.linear(x_TD, w)
    routes = EXACT.route(routing, TOP_K, x_TD[:, :EXPERTS], None)
    out = _experts(EXACT, layer, x_TD, ids_TA)
    EXACT.combine(routes.weights_TA, out.view(4, TOP_K, 64), None, x_TD, 1.0)
    EXACT.attention(normal(4, 4, 16), keys, keys, work, options)


def test_what_an_architecture_cannot_multiply_is_refused() -> None:
    with pytest.raises(UsageError, match="sm_75 multiplies no bf16: allowed are 'auto' and"):
        CudaKernels(75, bf16_activations=True)
    assert CudaKernels(75).name == "triton"


@pytest.mark.parametrize(("backend", "name"), [("auto", "triton"), ("torch", "torch")])
def test_a_device_has_them_unless_torch_is_asked_for(backend: str, name: str) -> None:
    found = choose_device_kernels(
        backend, torch.device("cpu"), capability=90, bf16_activations=False
    )
    assert found.name == name

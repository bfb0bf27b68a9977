"""The hierarchical roofline against the paper's own figures, its limits, and how it may move."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning import GPU, HOST, Setting, optimise
from published import PUBLISHED
from windlass.errors import UsageError
from windlass.models.registry import read_spec
from windlass.perf import roofline
from windlass.perf.roofline import Level, Machine, Rows, Task
from windlass.units import GIB

MIXTRAL = read_spec({"model_type": "mixtral", **PUBLISHED["mixtral"][0]})[0]
# plots/roofline of MoE-Lightning's artifact: an L4 and its host
L4 = Machine((Level("device", 242e12, 300e9), Level("host", 1.3e12, 100e9)), (16e9,))


# --- check values of section 3.2 ------------------------------------------------------------------


@pytest.mark.parametrize(("kv_bytes", "intensity", "turning"), [(2, 4, 25), (0.5, 16, 81.25)])
def test_decode_attention_of_mixtral_belongs_on_the_host(kv_bytes, intensity, turning):
    """fp16 and int4 keys and values: FLOP per byte, and P1."""
    rows = Rows(decode=100, context=512)
    task = roofline.decode_attention(MIXTRAL, 0, rows, 2 * 8 * 128 * kv_bytes, 2)
    assert task.intensity(HOST) == pytest.approx(intensity)
    first = roofline.first_turning_point(L4, task, at=GPU, home=HOST)
    assert first == pytest.approx(turning)
    assert task.intensity(HOST) < first


def test_experts_of_mixtral_in_micro_batches_of_128():
    rows = Rows(decode=128, micro=128)
    task = roofline.experts(MIXTRAL, 0, rows, 2, 2)
    assert task.intensity(GPU) == pytest.approx(31.9, rel=5e-3)
    assert roofline.ceiling(L4, task, GPU) == pytest.approx(9.58e12, rel=5e-3)
    saturated = Task("experts", 1e15, (1.0, 1.0))
    first = roofline.first_turning_point(L4, saturated, at=GPU, home=HOST)
    assert first == pytest.approx(81.25)
    second = roofline.second_turning_point(L4, task, at=GPU, home=HOST)
    assert second == pytest.approx(599, rel=5e-3)
    assert second * 8 / 2 == pytest.approx(2396, rel=5e-3)  # sequences per pass that reach it


@pytest.mark.parametrize(("host_to_device", "micro_batches"), [(285 / 16, 17.8), (300 / 16, 18.75)])
def test_rereading_weights_for_each_micro_batch_limits_their_number(host_to_device, micro_batches):
    """Link time equals the device's own memory time at b_g / b_cg micro-batches: the balance
    point. One expert pass over all rows has no such limit."""
    machine = Machine((Level("device", 1e15, host_to_device), Level("host", 1e15, 1e3)), (1.0,))
    for times in (round(micro_batches) - 3, round(micro_batches) + 3):
        task = roofline.experts(MIXTRAL, 0, Rows(decode=64 * times, micro=64), 2, 2)
        balance = roofline.balance_point(machine, task, at=GPU, home=HOST)
        assert (task.intensity(HOST) < balance) == (times < micro_batches)


# --- MoE-Lightning's published policies, setting S2 -----------------------------------------------

S2 = Setting(
    layers=32, h1=4096, h2=14336, n_q=32, n_kv=8, n_e=8, k=2, s=77, n=32,
    m_g=25769803776, m_c=197880360960, b_cg=17179869184, b_g=306016419840, b_c=81604378624,
    p_g=104e12, p_c=1.6e12,
)  # fmt: skip
# n: mu, n_ub, r_lo, r_hi, link, ffn, cpu, T, tok/s, GPU, host, inter, home GiB, best rejected
PUBLISHED_POLICIES = {
    32: (324, 14, 0.054195, 0.055885, 0.154894, 0.129494, 0.025728, 0.154894, 944.66,
         20.640, 147.282, 5.2533, 3.2357, (292, 15, 920.43)),
    64: (228, 16, 0.075628, 0.084423, 0.150212, 0.147808, 0.026550, 0.150212, 770.97,
         20.640, 146.647, 3.6968, 2.5449, (260, 14, 763.24)),
    128: (164, 16, 0.101100, 0.106671, 0.146562, 0.147685, 0.027527, 0.147685, 559.61,
          20.640, 146.935, 2.6591, 1.8305, (196, 13, 543.47)),
}  # fmt: skip


def test_derived_constants_of_s2():
    assert (S2.h_kv, S2.d_h, S2.w_i) == (1024, 128, 2818572288)
    assert S2.w_other == 2684354560
    assert (S2.w_other + S2.w_i * S2.layers) / GIB == pytest.approx(86.5, abs=0.05)
    assert S2.gpu_limit / GIB == pytest.approx(20.640, abs=5e-4)
    assert S2.host_limit / GIB == pytest.approx(147.432, abs=5e-4)


@pytest.mark.parametrize("generated", PUBLISHED_POLICIES)
def test_published_policies_come_out(generated):
    mu, n_ub, low, high, link, ffn, cpu, layer, tokens, gpu, host, inter, home, rejected = (
        PUBLISHED_POLICIES[generated]
    )
    best, second, ended = optimise(replace(S2, n=generated))
    assert (best.mu, best.n_ub) == (mu, n_ub)
    assert ended == 708
    exact = pytest.approx
    assert (best.low, best.high) == (exact(low, abs=1e-6), exact(high, abs=1e-6))
    seconds = (best.link_s, best.ffn_s, best.cpu_s, best.layer_s)
    assert seconds == exact((link, ffn, cpu, layer), rel=1e-4)
    assert best.tokens_s == exact(tokens, rel=1e-4)
    sizes = [best.gpu_bytes, best.host_bytes, best.inter_bytes, best.home_bytes]
    assert [size / GIB for size in sizes] == exact([gpu, host, inter, home], rel=1e-4)
    assert (second.mu, second.n_ub) == rejected[:2]
    assert second.tokens_s == exact(rejected[2], rel=1e-4)
    assert (best.layer_s == best.link_s) == (generated < 128)  # then r_w is the most that fits


@pytest.mark.parametrize(
    ("generated", "found", "tokens"),
    [(32, (287, 16), 964.5), (64, (230, 16), 777.1), (128, (165, 16), 563.0)],
)
def test_a_finer_grid_of_micro_batches_finds_more(generated, found, tokens):
    best, _, _ = optimise(replace(S2, n=generated), step=1)
    assert (best.mu, best.n_ub) == found
    assert best.tokens_s == pytest.approx(tokens, rel=1e-4)


# --- three levels ---------------------------------------------------------------------------------


def _machine(flops=100e12, memory=600e9, link=25e9, disk=6e9):
    levels = (Level("device", flops, memory), Level("host", 1e12, 80e9), Level("disk", 0.0, disk))
    return Machine(levels, (link, disk))


TASK = Task("experts", 1e12, (1e9, 1e9, 1e9))


def test_an_infinite_link_leaves_the_device_as_the_bound():
    machine = _machine(link=math.inf, disk=math.inf)
    assert roofline.attainable(machine, TASK, at=0, home=2) == roofline.ceiling(machine, TASK, 0)
    bound = roofline.lower_bound(machine, [TASK], home=2)
    assert max(bound, key=bound.__getitem__) == "device compute"


@pytest.mark.parametrize("links", [(0.0, 6e9), (25e9, 0.0), (25e9, -1.0), (math.nan, 6e9)])
def test_a_link_that_moves_nothing_is_refused(links):
    levels = _machine().levels
    with pytest.raises(UsageError, match="link from"):
        Machine(levels, links)


def test_the_slowest_link_between_binds_and_a_disk_computes_nothing():
    machine = _machine()
    assert roofline.attainable(machine, TASK, at=0, home=2) == pytest.approx(6e12)
    assert roofline.attainable(machine, TASK, at=0, home=1) == pytest.approx(25e12)
    assert roofline.first_turning_point(machine, TASK, at=1, home=2) == 0.0
    bound = roofline.lower_bound(machine, [TASK], home=2)
    assert bound["link from disk"] == pytest.approx(1 / 6)
    assert max(bound, key=bound.__getitem__) == "link from disk"


_rates = st.floats(1e6, 1e15)


@given(_rates, _rates, _rates, _rates, st.floats(1, 10), st.sampled_from((0, 1)))
def test_more_of_anything_never_slows(flops, memory, link, disk, more, at):
    task = Task("any", 1e12, (3e9, 2e9, 1e9))
    base = roofline.seconds(_machine(flops, memory, link, disk), task, at=at, home=2)
    for values in (
        (flops * more, memory, link, disk), (flops, memory * more, link, disk),
        (flops, memory, link * more, disk), (flops, memory, link, disk * more),
    ):  # fmt: skip
        assert roofline.seconds(_machine(*values), task, at=at, home=2) <= base


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_active_experts_grow_with_rows_to_all(rows, more):
    few = roofline.active_experts(128, 8, rows)
    assert 8 <= few + 1e-9 and few <= roofline.active_experts(128, 8, rows + more) <= 128
    assert roofline.active_experts(128, 8, 1) == pytest.approx(8)


def test_95_percent_of_experts_are_active_from_few_rows():
    """throughput.md 4.2."""
    for experts, top_k, rows in ((8, 2, 11), (64, 8, 23), (128, 8, 47), (256, 8, 95)):
        assert roofline.active_experts(experts, top_k, rows) >= 0.95 * experts
        assert roofline.active_experts(experts, top_k, rows - 1) < 0.95 * experts

"""A device beside its host: passes on the clock against their closed form, what groups hide, slots
that are chained, and the numbers that papers print."""

from dataclasses import replace

import pytest

from devices import device_problem, small_spec, with_rates
from machines import processor
from planning import few_layers, sizes_of
from published import PUBLISHED
from windlass.hardware.profile import Curve, HardwareProfile, LinkRates
from windlass.ids import Part
from windlass.models.registry import read_spec
from windlass.perf.bounds import bounds_of
from windlass.perf.device_cost import DeviceCost, exchanged_numbers, few_rows
from windlass.perf.device_pass_cost import DevicePassCost, Placed
from windlass.perf.job_passes import PassRun
from windlass.perf.op_cost import Seen
from windlass.perf.pass_cost import kv_numbers
from windlass.perf.sample import sample_layers
from windlass.perf.simulation import ClockedModel
from windlass.perf.sizes import DeviceSizes, Problem
from windlass.planner.constraints import PlanConstraints
from windlass.planner.device_budget import plan_for
from windlass.units import GIB

SPEC = small_spec(layers=6, experts=8)
CONTEXT = 640


def _timed(memory, host_memory, seqs, rates, **wanted):
    """The plan, a decode pass of it on the clock, in its steady state, and its closed form."""
    problem = device_problem(SPEC, memory * GIB, profile=with_rates(**rates))
    fixed = PlanConstraints(
        max_num_seqs=seqs, max_num_batched_tokens=seqs + 64, max_model_len=CONTEXT + 32,
        kv_pages=seqs * (CONTEXT // 32 + 1), micro_batch_tokens=100, **wanted,
    )  # fmt: skip
    plan = plan_for(SPEC, problem.sizes, int(host_memory * GIB), fixed)
    one = PassRun(1, Seen(seqs, float(seqs * CONTEXT), 0, 0.0), seqs)
    model = ClockedModel(problem, plan)
    for _ in range(2):
        model.run(one)
    closed = DevicePassCost(problem).of(one, Placed.of(plan, problem.sizes))
    assert max(bounds_of(problem, plan).of(one).values()) <= (timed := model.run(one)).seconds
    return plan, timed, closed


@pytest.mark.parametrize(
    ("rates", "memory", "host_memory", "seqs", "share", "binds"),
    [
        ({}, 2, 12, 64, 1.0, "down"),
        ({}, 2, 12, 64, 0.5, "down"),
        (dict(down=1000, device=0.1), 3, 12, 128, 0.0, "device"),
        (dict(down=1000, host=0.1), 2, 40, 400, 1.0, "host"),
        (dict(down=1000), 2, 2.5, 64, 1.0, "disk"),
    ],
)  # fmt: skip
def test_a_pass_on_the_clock_takes_what_its_closed_form_says(
    rates, memory, host_memory, seqs, share, binds
):
    _, timed, closed = _timed(memory, host_memory, seqs, rates, host_attention=share)
    assert max(timed.busy, key=timed.busy.__getitem__) == binds
    assert max(closed.busy, key=closed.busy.__getitem__) == binds
    # of few experts in few slots the link waits for a slot now and then
    assert 0.99 * closed.seconds <= timed.seconds <= 1.2 * closed.seconds or binds == "disk"
    for lane in ("down", "host", "device"):
        assert 0.88 * closed.busy[lane] <= timed.busy[lane] + 1e-3, lane
        assert timed.busy[lane] <= 1.2 * closed.busy[lane] + 1e-3, lane
    assert timed.seconds >= max(timed.busy.values()) * (1 - 1e-2)  # some of it is ahead of its pass


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_experts_of_the_host_spare_the_link(share):
    """The link carries the others alone; the host is as busy as its rates say."""
    _, without, _ = _timed(2, 12, 8, {})
    plan, timed, closed = _timed(2, 12, 8, {}, host_experts=share)
    assert plan.host_experts == share
    for lane in ("down", "host", "up"):
        assert timed.busy[lane] == pytest.approx(closed.busy[lane], rel=0.3, abs=1e-3), lane
    assert timed.busy["host"] > without.busy["host"] == 0
    assert timed.busy["down"] < (1.1 - share) * without.busy["down"]
    assert timed.seconds >= 0.99 * max(timed.busy.values())


def test_attention_of_one_group_hides_behind_the_experts_of_another():
    """Where the host attends for as long as the device computes, two groups take little more than
    either; with slots for a layer's experts they fetch what one group does."""
    rates = dict(down=100, host=0.8, device=0.5)
    _, alone, _ = _timed(2, 40, 400, rates, host_attention=1.0, groups=1)
    plan, beside, _ = _timed(2, 40, 400, rates, host_attention=1.0, groups=2)
    assert plan.above is not None and plan.above.slots[Part.EXPERT] > 8
    both = alone.busy["host"] + alone.busy["device"]
    assert alone.seconds > 0.85 * both
    assert beside.busy["host"] == pytest.approx(alone.busy["host"], rel=0.05)
    assert max(beside.busy.values()) <= beside.seconds < 0.85 * alone.seconds


def test_what_the_host_holds_is_read_from_disk_once():
    """All experts in RAM, a few on the device: the disk is silent from the second pass on, and the
    link carries what the device lacks. Less RAM, and the rest is read in every pass."""
    plan, timed, _ = _timed(2, 12, 64, {}, host_attention=1.0)
    assert timed.bytes_read == 0 and timed.busy["disk"] == 0
    plan, timed, _ = _timed(2, 2.5, 64, {}, host_attention=1.0)
    missing = 48 - plan.host.slots[Part.EXPERT]
    read = timed.bytes_read / sizes_of(SPEC).slot_bytes[Part.EXPERT]
    assert missing > 20 and 0.5 * missing < read <= 1.1 * missing


def test_keys_and_values_that_come_take_the_link_and_go_back():
    """Beside a model that stays on the device: bytes of the positions before, of whole pages, on
    the clock and in closed form; with experts on the same link both take longer."""
    each = 6 * 4096 * 64  # layers, bytes, rows
    plan, timed, closed = _timed(20, 24, 64, {}, kv_offloading_share=1.0)
    assert plan.shares.streamed == 1 and plan.kv_pages == plan.host.kv_pages
    costs = DeviceCost(device_problem(SPEC, 20 * GIB), kv_numbers=kv_numbers(SPEC))
    down, up = costs.fetch_s(each * CONTEXT), costs.send_s(each * 32)
    assert timed.busy["down"] == pytest.approx(down, rel=0.03)
    assert closed.busy["down"] == pytest.approx(down, rel=0.01)
    assert timed.busy["up"] == pytest.approx(up) and closed.busy["up"] == pytest.approx(up)
    assert timed.busy["host"] == closed.busy["host"] == 0
    assert timed.seconds == pytest.approx(closed.seconds, rel=0.25)
    _, without, _ = _timed(20, 24, 64, {})
    assert without.busy["down"] == 0 and without.seconds < timed.seconds
    _, fetched, _ = _timed(2, 24, 64, {}, host_attention=1.0)
    _, both, _ = _timed(2, 24, 64, {}, kv_offloading_share=1.0)
    assert both.busy["down"] > fetched.busy["down"] + 0.8 * down


@few_layers()
def test_few_layers_stand_for_many():
    spec = small_spec(layers=24, experts=8)
    assert len(sample_layers(spec, most_experts=64).spec.blocks) < 24
    seconds = []
    for most in (64, 10_000):
        problem = device_problem(spec, 3 * GIB)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("windlass.perf.simulation._MOST_EXPERTS", most)
            plan = plan_for(spec, problem.sizes, 24 * GIB, PlanConstraints(max_num_seqs=64))
            model = ClockedModel(problem, plan)
            one = PassRun(1, Seen(64, 64.0 * 200, 0, 0.0), 64)
            model.run(one)
            seconds.append(model.run(one).seconds)
    assert seconds[0] == pytest.approx(seconds[1], rel=0.08)


# --- what papers print ----------------------------------------------------------------------------

MIXTRAL = read_spec({"model_type": "mixtral", **PUBLISHED["mixtral"][0]})[0]


def _paper(link: float, host: float) -> Problem:
    """Mixtral-8x7B on a machine of which a paper gives bytes/s of the link and of the host."""

    def flat(rate: float) -> Curve:
        return Curve(((1.0, rate),))

    way = LinkRates(rate=flat(link))
    fast = processor("gpu", flops=1e14)
    profile = HardwareProfile(
        name="paper", captured="", software="", threads=24, source="paper", disk=flat(1e9),
        disk_in_flight=4, disk_path="", device=replace(fast, memory_rate=3e11), down=way, up=way,
        host=replace(processor(), decode_attention=host, call_s=0.0),
    )  # fmt: skip
    sizes = sizes_of(MIXTRAL)
    device = DeviceSizes(
        budget_bytes=24 * GIB, process_bytes=0, slot_bytes=sizes.slot_bytes, backend="cuda"
    )
    return Problem(MIXTRAL, replace(sizes, device=device, bytes_per_token=32 * 4096), profile)


def _pass(problem, seqs, context, resident, *, groups=2):
    """A decode pass of so many sequences that all attend on the host, all dense parts and the share
    `resident` of the experts on the device."""
    above = dict.fromkeys(problem.sizes.num_parts, 1.0) | {Part.EXPERT: resident}
    placed = Placed(above, dict.fromkeys(above, 1.0), 1.0, groups)
    one = PassRun(1, Seen(seqs, float(seqs * context), 0, 0.0), seqs)
    return DevicePassCost(problem).of(one, placed)


@pytest.mark.parametrize(
    ("seqs", "context", "resident", "link_s", "host_s"),
    [(4536, 77 + 32, 0.055885, 0.154894, 0.025728), (3648, 77 + 64, 0.084423, 0.150212, 0.026550),
     (2624, 77 + 128, 0.106671, 0.146562, 0.027527)],
)  # fmt: skip
def test_moe_lightning_on_an_l4(seqs, context, resident, link_s, host_s):
    """Its published plans of setting S2: seconds of a layer on the link and of host attention. Its
    formula leaves queries and results on the link out, and counts them for the host (up to 4 %)."""
    found = _pass(_paper(16 * GIB, 76 * GIB), seqs, context, resident)
    sent = 32 * seqs * 4 * exchanged_numbers(MIXTRAL.blocks[0].attention)[1] / (16 * GIB)
    assert found.busy["down"] - sent == pytest.approx(32 * link_s, rel=2e-3)
    assert found.busy["host"] == pytest.approx(32 * host_s, rel=0.04)
    assert found.seconds == pytest.approx(max(found.busy.values()), rel=0.02)


def test_moe_gen_on_an_a5000():
    """Of 160 GiB of RAM: 872 sequences, 12.3 % of the weights resident, all attention on the host,
    3.1327 s a pass (throughput's closed form; there attention's weights are streamed, too)."""
    found = _pass(_paper(26e9, 25e9), 872, 512 + 128, 0.1230)
    streamed = 32 * (1 - 0.1230) * 2 * (2 * 4096**2 + 2 * 4096 * 1024) / 26e9
    sent = 32 * 872 * 4 * 4096 / 26e9
    assert found.busy["down"] + streamed - sent == pytest.approx(3.1327, rel=1e-3)
    assert found.busy["host"] == pytest.approx(32 * 872 * 640 * 4096 / 25e9, rel=1e-6)


def test_where_decode_attention_belongs():
    """The first turning point of MoE-Lightning's roofline: where memory of the host is faster than
    the link, its keys and values stay there, as those of Mixtral on an L4 (100 GB/s, 16 GB/s)."""
    problem = _paper(16e9, 100e9)
    cost = DeviceCost(problem, kv_numbers=kv_numbers(MIXTRAL))
    rows, positions = 1000, 1000 * 512
    up, host, down = cost.host_attention_s(0, Seen(rows, float(positions), 0, 0.0))
    fetched = positions * 4096 / 16e9
    assert up + host + down < fetched / 3  # 4 of 25 FLOP/B


def test_an_expert_with_few_rows_is_sooner_computed_where_it_lies():
    """Up to as many rows as the host multiplies while the link carries the expert: more for a
    slower link, none where the link is as fast as memory, and the number is where it turns."""
    found = {}
    for speed in (0.5, 1, 4, 1e4):
        problem = device_problem(SPEC, 4 * GIB, profile=with_rates(down=speed))
        rows = found[speed] = few_rows(problem)
        cost = DeviceCost(problem, kv_numbers=1)
        if rows:
            assert cost.host_expert_s(0, rows) < cost.fetched_expert_s(0, rows)
        assert cost.host_expert_s(0, rows + 1) >= cost.fetched_expert_s(0, rows + 1)
    assert found[0.5] > found[1] > found[4] > found[1e4] == 0
    # 50 MB over 12 GB/s are 4.2 ms, in which 1.3 TFLOP/s multiply 109 rows by 25 M weights
    assert found[1] == pytest.approx(109, rel=0.1)

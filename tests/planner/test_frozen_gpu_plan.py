"""Plans for machines with a GPU: within both memories, better for more of anything, and as the
closed forms (tests/perf/test_frozen_gpu_tiers.py) say."""

import functools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frozen_gpu import A5000, MIXTRAL
from planning import SPECS, sizes_of
from windlass.ids import Part
from windlass.perf.frozen_gpu_tiers import GpuRates, Share, layer_seconds
from windlass.planner.frozen_gpu_plan import DevicePlan, GpuModel, Memory, model_of, plan_device
from windlass.units import GIB
from windlass.workload import Workload

MODEL = GpuModel(
    shape=replace(MIXTRAL, hidden=2 * 4096, query=4 * 4096), num_layers=32,
    ends_bytes=4 * 32000 * 4096, head_flops=2 * 32000 * 4096,
)  # fmt: skip
RATES = replace(A5000, up=26e9, disk=6e9, host_memory=200e9, call_s=2e-5)
JOB = Workload.from_lengths(512, 256, 8000)
MEMORY = Memory(device=0.9 * 24 * GIB, host=0.9 * 160 * GIB)


def planned(rates: GpuRates, memory: Memory) -> DevicePlan:
    """The plan of a job that fits."""
    found = plan_device(MODEL, rates, memory, JOB)
    assert found is not None
    return found


@functools.cache
def best_plan(rates=RATES, memory=MEMORY):
    return plan_device(MODEL, rates, memory, JOB)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(1, 80), st.floats(8, 900), st.integers(1, 4000), st.integers(1, 2000),
    st.integers(1, 400), st.booleans(),
)  # fmt: skip
def test_no_plan_breaks_a_memory(device, host, count, prompt, output, has_disk):
    memory = Memory(device=device * GIB, host=host * GIB, has_disk=has_disk)
    found = plan_device(MODEL, RATES, memory, Workload.from_lengths(prompt, output, count))
    if found is None:
        return
    assert found.device_bytes <= memory.device * (1 + 1e-9)
    assert found.host_bytes <= memory.host * (1 + 1e-9)
    assert 1 <= found.sequences <= count
    assert found.resident + found.on_disk <= 1 + 1e-9 and (has_disk or not found.on_disk)
    output_s = found.sequences / found.pass_s
    assert found.output_tokens_s == pytest.approx(output_s) and found.total_s > 0


def test_a_disk_lets_a_model_run_that_memory_cannot_hold():
    small = replace(MEMORY, host=48 * GIB)
    assert plan_device(MODEL, RATES, replace(small, has_disk=False), JOB) is None
    found = planned(RATES, small)
    assert found.on_disk > 0.3 and found.bottleneck in ("disk", "down")
    faster = planned(replace(RATES, disk=12e9), small)
    assert faster.total_s < found.total_s


def test_a_device_without_room_for_buffers_is_refused():
    assert plan_device(MODEL, RATES, replace(MEMORY, device=GIB), JOB) is None


def test_a_weak_host_computes_no_attention_and_a_strong_one_does():
    weak = planned(replace(RATES, host_attention=1e9), MEMORY)
    strong = planned(replace(RATES, host_attention=100e9), MEMORY)
    assert weak.host_share < 0.2 < 0.5 < strong.host_share
    assert strong.total_s < weak.total_s


def test_keys_and_values_live_on_a_device_that_holds_the_weights():
    found = planned(RATES, replace(MEMORY, device=900 * GIB))
    assert found.resident == 1 and found.kv_on_device == 1 and found.host_share == 0


def test_groups_pay_where_experts_need_not_be_read_twice():
    share = Share(sequences=900, context=640, host_attention=0.9, resident=0.1)
    host = replace(RATES, down=1e12, device_memory=1e13, attention=1e15)
    one, two = (layer_seconds(MIXTRAL, host, replace(share, groups=groups)) for groups in (1, 2))
    assert two < one


def test_few_expert_slots_let_the_link_idle_during_attention():
    share = Share(sequences=900, context=640, host_attention=1.0)
    slow = [
        layer_seconds(MIXTRAL, RATES, replace(share, expert_slots=slots))
        for slots in (1, 4, math.inf)
    ]
    assert slow[0] > slow[1] > slow[2]


@pytest.mark.parametrize(
    ("where", "name"),
    [("memory", "device"), ("memory", "host"), ("rates", "down"), ("rates", "disk"),
     ("rates", "host_attention"), ("rates", "device_memory")],
)  # fmt: skip
def test_more_of_anything_is_hardly_ever_worse(where, name):
    """Shares are tried in steps, so that a step may be missed by a little."""
    last = best_plan().total_s
    base = {"memory": MEMORY, "rates": RATES}[where]
    for factor in (1.3, 2.5):
        found = best_plan(**{where: replace(base, **{name: getattr(base, name) * factor})})
        assert found.total_s <= last * 1.03
        last = found.total_s


def test_a_model_is_read_from_its_description():
    spec = SPECS["olmoe-1b-7b"]
    sizes = sizes_of(spec)
    model = model_of(spec, sizes)
    parts = sizes.slot_bytes[Part.BLOCK] + 64 * sizes.slot_bytes[Part.EXPERT]
    assert model.shape.all_weights == pytest.approx(parts)
    assert model.weights == pytest.approx(16 * parts)
    assert model.shape.kv * 16 == sizes.bytes_per_token
    assert model.shape.score_flops == 4 * 16 * 128

"""Closed forms of layers on a device beside its host: a table that was computed apart
from them, and their limits."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frozen_gpu import A5000, H200, MIXTRAL, MIXTRAL_INT8, QWEN
from windlass.perf.frozen_gpu_tiers import (
    Share,
    balanced_host_share,
    layer_seconds,
    work,
)
from windlass.units import GIB

PROMPT, OUTPUT = 512, 256


A5000_MEMORY = 0.9 * 24 * GIB - 8 * GIB


def _reduced(shape, layers, tables, device, host, *, mixed):
    """A reduced planner: sequences and the resident share by memory alone."""
    fixed = tables + 4 * shape.expert + 2 * shape.attention + GIB
    weights = layers * shape.all_weights + tables
    whole = layers * shape.all_weights
    resident = min(1.0, max(0.0, (device - fixed) / whole))
    held = PROMPT + (OUTPUT / 2 if mixed else OUTPUT)
    alive = math.floor((host - (1 - resident) * whole) / (shape.kv * layers * held))
    assert weights > whole
    return Share(
        sequences=alive, prefill=alive * PROMPT / OUTPUT if mixed else 0.0,
        context=PROMPT + OUTPUT / 2, resident=resident, micro=math.inf,
    )  # fmt: skip


CASES = {
    "8x7B, 512 GiB, separate": (
        MIXTRAL, A5000, 512, False, 4106, 0.1230, (0.6061, 8.3507, 491.7), (0.557, 9.0014, 456.2)
    ),
    "8x7B, beta 45e9": (
        MIXTRAL, replace(A5000, host_attention=45e9), 512, False, 4106, 0.1230,
        (0.7837, 5.9984, 684.5), (0.721, 6.8413, 600.2),
    ),
    "8x7B, 512 GiB, mixed": (
        MIXTRAL, A5000, 512, True, 4927, 0.1230, (0.5868, 9.7011, 507.9), (0.440, 12.0355, 409.4)
    ),
    "8x7B, 160 GiB, mixed": (
        MIXTRAL, A5000, 160, True, 872, 0.1230, (1, 3.1327, 278.4), (0.889, 3.4450, 253.1)
    ),
    "8x7B int8, 160 GiB, mixed": (
        MIXTRAL_INT8, A5000, 160, True, 1435, 0.2631, (0.6296, 3.0314, 473.4),
        (0.483, 3.7124, 386.5),
    ),
    "30B, H200, separate": (
        QWEN, H200, 100, False, 825, 0.2467, (0.8302, 1.0772, 765.9), (0.824, 1.0837, 761.3)
    ),
    "30B, H200, mixed": (
        QWEN, H200, 100, True, 990, 0.2467, (0.7659, 1.1926, 830.1), (0.753, 1.2086, 819.1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_reduced_planner_of_the_reference(case):
    shape, rates, host, mixed, alive, resident, overlapped, in_order = CASES[case]
    layers, tables = (48, 4 * 151936 * 2048) if shape is QWEN else (32, 4 * 32000 * 4096)
    device = 16 * GIB if shape is QWEN else A5000_MEMORY
    budget = 100 * GIB if shape is QWEN else 0.9 * host * GIB
    share = _reduced(shape, layers, tables, device, budget, mixed=mixed)
    assert share.sequences == pytest.approx(alive, rel=1e-3)
    assert share.resident == pytest.approx(resident, rel=1e-3)

    omega, seconds, tokens = overlapped
    # experts are not read again for a second group here
    groups = replace(share, groups=2)
    best = balanced_host_share(shape, rates, groups)
    assert best == pytest.approx(omega, rel=1e-3)
    found = work(shape, rates, replace(groups, host_attention=best))
    assert layers * replace(found, reread=0.0).total(2) == pytest.approx(seconds, rel=1e-3)
    assert share.sequences / (layers * replace(found, reread=0.0).total(2)) == pytest.approx(
        tokens, rel=1e-3
    )

    omega, seconds, tokens = in_order
    steps = [replace(share, host_attention=i / 1000) for i in range(1001)]
    best_step = min(steps, key=lambda one: layer_seconds(shape, rates, one))
    total = layers * layer_seconds(shape, rates, best_step)
    assert total == pytest.approx(seconds, rel=1e-3)
    assert share.sequences / total == pytest.approx(tokens, rel=1e-3)
    assert best_step.host_attention == pytest.approx(omega, abs=1.5e-3)


SHARE = Share(sequences=500, context=640, host_attention=0.5, resident=0.1, groups=2)


def test_an_infinite_link_leaves_the_device_or_the_host():
    rates = replace(A5000, down=math.inf)
    found = work(MIXTRAL, rates, SHARE)
    assert found.down == 0
    assert found.total(2) == max(
        found.host_attention, found.attention + found.experts + found.reread
    )


def test_experts_wait_for_attention_only_in_one_group():
    found = work(MIXTRAL, replace(A5000, down=1e15), SHARE)
    waits = max(found.host_attention, found.attention) + found.experts
    assert found.total(1) == waits
    assert found.total(2) < waits


@given(
    st.sampled_from(("down", "device_memory", "host_attention", "attention")), st.floats(1.01, 50),
    st.floats(0, 1), st.floats(0, 1), st.sampled_from((1, 2, 4)), st.integers(1, 5000),
)  # fmt: skip
def test_faster_parts_never_slow_a_layer(name, more, omega, resident, groups, alive):
    share = Share(
        sequences=alive, context=640, host_attention=omega, resident=resident, groups=groups
    )
    faster = replace(A5000, **{name: getattr(A5000, name) * more})
    assert layer_seconds(MIXTRAL, faster, share) <= layer_seconds(MIXTRAL, A5000, share)
    lighter = replace(share, resident=min(1.0, resident + 0.1))
    assert layer_seconds(MIXTRAL, A5000, lighter) <= layer_seconds(MIXTRAL, A5000, share)

"""The closed form for machines with a GPU, against the worked examples of the throughput reference
(section 4.11): self-consistent numbers, not measurements."""

from dataclasses import replace

import pytest

from windlass.hardware.profile import Curve
from windlass.planner.with_device import Layers, Rates, plan_device
from windlass.units import GIB


def layers(*, count, width, vocab, experts, top_k, inner, kv_heads, heads, q=2) -> Layers:
    """A model of grouped-query attention with heads of 128, keys and values in 16 bits."""
    expert, dense = 3 * width * inner, 2 * width * heads * 128 + 2 * width * kv_heads * 128
    return Layers(
        num_layers=count, num_experts=experts, top_k=top_k, expert_bytes=expert * q,
        dense_bytes=dense * q, kv_bytes=2 * kv_heads * 128 * 2, ends_bytes=4 * vocab * width,
        expert_flops=2 * expert, dense_flops=2 * dense, position_flops=4 * heads * 128,
    )  # fmt: skip


MIXTRAL = dict(
    count=32, width=4096, vocab=32000, experts=8, top_k=2, inner=14336, kv_heads=8, heads=32
)
QWEN = dict(
    count=48, width=2048, vocab=151936, experts=128, top_k=8, inner=768, kv_heads=4, heads=32
)
A5000 = Rates(
    device_bytes=0.9 * 24 * GIB - 8 * GIB, host_bytes=0.9 * 512 * GIB, link=26e9,
    flops=Curve(((1, 70e12),)), device_memory=600e9, host_attention=25e9,
)  # fmt: skip
SMALL = replace(A5000, host_bytes=0.9 * 160 * GIB)
H200 = Rates(
    device_bytes=16 * GIB, host_bytes=100 * GIB, link=50e9, flops=Curve(((1, 300e12),)),
    device_memory=4e12, host_attention=40e9,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "rates", "mixed", "expected"),
    [
        (layers(**MIXTRAL), A5000, False, (4106, 0.1230, 0.6061, 8.3507, 491.7)),
        (layers(**MIXTRAL), replace(A5000, host_attention=45e9), False,
         (4106, 0.1230, 0.7837, 5.9984, 684.5)),
        (layers(**MIXTRAL), A5000, True, (4927, 0.1230, 0.5868, 9.7011, 507.9)),
        (layers(**MIXTRAL), SMALL, True, (872, 0.1230, 1.0, 3.1327, 278.4)),
        (layers(**MIXTRAL, q=1), SMALL, True, (1435, 0.2631, 0.6296, 3.0314, 473.4)),
        (layers(**QWEN), H200, False, (825, 0.2467, 0.8302, 1.0772, 765.9)),
        (layers(**QWEN), H200, True, (990, 0.2467, 0.7659, 1.1926, 830.1)),
    ],
)  # fmt: skip
def test_the_worked_examples(model, rates, mixed, expected):
    found = plan_device(model, rates, 512, 256, mixed=mixed)
    sequences, resident, host_share, pass_s, tokens_s = expected
    assert found.sequences == sequences
    assert found.resident == pytest.approx(resident, abs=1e-4)
    assert found.host_share == pytest.approx(host_share, abs=1e-3)
    assert found.pass_s == pytest.approx(pass_s, rel=1e-3)
    assert found.output_tokens_s == pytest.approx(tokens_s, rel=1e-3)


def test_a_disk_lets_a_model_run_that_memory_cannot_hold():
    small = replace(A5000, host_bytes=48 * GIB)
    assert plan_device(layers(**MIXTRAL), small, 512, 256) is None
    found = plan_device(layers(**MIXTRAL), replace(small, disk=6e9), 512, 256)
    assert found.on_disk > 0.3 and found.sequences >= 1 and found.binds in ("disk", "down")
    faster = plan_device(layers(**MIXTRAL), replace(small, disk=12e9), 512, 256)
    assert faster.output_tokens_s > found.output_tokens_s


def test_a_device_without_room_for_an_expert_is_refused():
    assert plan_device(layers(**MIXTRAL), replace(A5000, device_bytes=GIB), 512, 256) is None


def test_no_more_sequences_than_there_are():
    assert plan_device(layers(**MIXTRAL), A5000, 512, 256, most=100).sequences == 100


@pytest.mark.parametrize("name", ["device_bytes", "host_bytes", "link", "disk", "host_attention"])
def test_more_of_anything_is_never_worse(name):
    rates = replace(SMALL, disk=2e9)
    last = 0.0
    for factor in (1, 1.3, 1.7, 2.5):
        more = replace(rates, **{name: getattr(rates, name) * factor})
        found = plan_device(layers(**MIXTRAL), more, 512, 256)
        assert found.output_tokens_s >= last * 0.999
        last = found.output_tokens_s

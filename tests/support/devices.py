"""Machines with a device and models that are planned for them, in tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from planning import SPECS, few_layers, sizes_of
from windlass.hardware.preset import load_machine
from windlass.hardware.profile import Curve, HardwareProfile, LinkRates
from windlass.models.spec import ModelSpec, Moe
from windlass.perf.sizes import DeviceSizes, Problem
from windlass.planner import search as searching
from windlass.units import MIB


def small_spec(*, layers: int = 4, experts: int = 16, top_k: int = 2) -> ModelSpec:
    """OLMoE's attention, and a few layers of a few wide experts: quick on the clock."""
    spec = SPECS["olmoe-1b-7b"]
    moe = spec.blocks[0].ffn
    assert isinstance(moe, Moe)
    expert = replace(moe.expert, intermediate=4096)
    ffn = replace(moe, num_experts=experts, top_k=top_k, expert=expert)
    return replace(spec, blocks=(replace(spec.blocks[0], ffn=ffn),) * layers)


def device_problem(
    spec: ModelSpec, device_bytes: float, *, profile: HardwareProfile | None = None
) -> Problem:
    """The model on a machine with a T4, of whose memory so much may be taken."""
    sizes = sizes_of(spec)
    device = DeviceSizes(
        budget_bytes=int(device_bytes), process_bytes=128 * MIB, slot_bytes=sizes.slot_bytes,
        backend="cuda",
    )  # fmt: skip
    return Problem(spec, replace(sizes, device=device), profile or load_machine("t4"))


def with_rates(
    *, down: float = 1.0, disk: float = 1.0, host: float = 1.0, device: float = 1.0
) -> HardwareProfile:
    """The machine with a T4, its links, disk, host attention and device so many times as fast."""
    profile = load_machine("t4")
    own = profile.device
    assert own is not None and profile.down is not None

    def times(curve: Curve, factor: float) -> Curve:
        return Curve(tuple((size, rate * factor) for size, rate in curve.points))

    faster = replace(
        own, memory_rate=own.memory_rate * device, row_rate=own.row_rate * device,
        experts={kind: times(curve, device) for kind, curve in own.experts.items()},
        dense={kind: times(curve, device) for kind, curve in own.dense.items()},
        decode_attention=own.decode_attention * device, call_s=own.call_s / device,
        prefill_attention=own.prefill_attention * device, expert_s=own.expert_s / device,
    )  # fmt: skip
    attends = replace(
        profile.host, decode_attention=profile.host.decode_attention * host,
        prefill_attention=profile.host.prefill_attention * host,
    )  # fmt: skip
    link = LinkRates(rate=times(profile.down.rate, down))
    return replace(profile, device=faster, host=attends, down=link, disk=times(profile.disk, disk))


@contextmanager
def quick_search() -> Iterator[None]:
    """A coarse grid, and as few layers and plans on the clock as can be."""
    with few_layers(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "_SEQS", (4, 16, 64, 256))
        patch.setattr(searching, "_ROWS", (512, 2048))
        patch.setattr(searching, "_PAGE_SHARES", (1.0, 0.5))
        patch.setattr(searching, "_SHARE_STEP", 0.5)
        patch.setattr(searching, "_COMPOSED", 4)
        patch.setattr(searching, "_CLOCKED_ABOVE", 1)
        yield

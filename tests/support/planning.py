"""Machines and models that plans are made for, in tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from windlass.checkpoint.synthetic import PRESETS
from windlass.hardware.assumed import assumed_profile
from windlass.hardware.profile import Curve, HardwareProfile
from windlass.ids import Part
from windlass.models.registry import read_spec
from windlass.models.shapes import block_shapes, ffn_shapes
from windlass.models.spec import Ffn, ModelSpec, Moe
from windlass.perf import simulation as timing
from windlass.perf.sizes import Backend, Sizes
from windlass.plan import Plan
from windlass.units import GIB, KIB, MIB, round_up

SPECS = {name: read_spec(config)[0] for name, config in PRESETS.items()}


def sizes_of(spec: ModelSpec) -> Sizes:
    """What a bf16 checkpoint of `spec` weighs, in a process of 240 MiB."""

    def weight(shapes) -> int:
        elements = 0
        for shape in shapes.values():
            size = 1
            for extent in shape:
                size *= extent
            elements += size
        return round_up(2 * elements, 4 * KIB)

    moes = [b.ffn for b in spec.blocks if isinstance(b.ffn, Moe)]
    dense = [b.ffn for b in spec.blocks if isinstance(b.ffn, Ffn)]
    table = 2 * spec.vocab_size * spec.hidden_size
    chunk = min(16 * MIB, round_up(table, 4 * KIB))
    slots = {
        Part.EXPERT: max(weight(ffn_shapes(m.expert, spec.hidden_size)) for m in moes),
        Part.BLOCK: max(weight(block_shapes(spec, i)) for i in range(len(spec.blocks))),
        Part.HEAD: chunk, Part.FINAL: 8 * KIB, Part.EMBED: round_up(table, 4 * KIB),
    }  # fmt: skip
    counts = {
        Part.EXPERT: sum(m.num_experts for m in moes), Part.BLOCK: len(spec.blocks),
        Part.HEAD: -(-table // chunk), Part.FINAL: 1, Part.EMBED: 1,
    }  # fmt: skip
    if dense:
        slots[Part.FFN] = max(weight(ffn_shapes(f, spec.hidden_size)) for f in dense)
        counts[Part.FFN] = len(dense)
    return Sizes(
        process_bytes=240 * MIB, slot_bytes=slots, num_parts=counts,
        bytes_per_token=len(spec.blocks) * 4 * KIB, staged_bytes_per_token=4 * KIB,
        kv_cache_dtype="bfloat16",
        bytes_per_position=512, row_buffer_bytes=2 * MIB, state_bytes=0,
        backend=Backend("cpu", threads=2),
    )  # fmt: skip


def with_host(plan: Plan, **changes: Any) -> Plan:
    """The plan with other values of its host tier; those of a kind of part as `expert=4` (slots)
    or as a record of changes."""
    host = plan.host
    parts = {
        own.part: replace(own, **(change if isinstance(change, dict) else {"slots": change}))
        for own in host.parts
        if (change := changes.pop(own.part.value, None)) is not None
    }
    kept = tuple(parts.get(own.part, own) for own in host.parts)
    return replace(plan, tiers=(replace(host, **{"parts": kept, **changes}),))


def round_sizes(spec: ModelSpec) -> Sizes:
    """Round numbers: blocks and chunks of the head of 16 MiB, experts of bf16."""
    layers, moe = len(spec.blocks), spec.blocks[0].ffn
    assert isinstance(moe, Moe)
    expert = 3 * 2 * spec.hidden_size * moe.expert.intermediate
    table = 2 * spec.vocab_size * spec.hidden_size
    return Sizes(
        process_bytes=240 * MIB,
        slot_bytes={
            Part.EXPERT: expert, Part.BLOCK: 16 * MIB, Part.HEAD: 16 * MIB, Part.FINAL: 8 * KIB,
            Part.EMBED: table,
        },
        num_parts={
            Part.EXPERT: layers * moe.num_experts, Part.BLOCK: layers,
            Part.HEAD: -(-table // (16 * MIB)), Part.FINAL: 1, Part.EMBED: 1,
        },
        bytes_per_token=layers * 4 * KIB,
        staged_bytes_per_token=4 * KIB,
        kv_cache_dtype="bfloat16",
        bytes_per_position=512,
        row_buffer_bytes=2 * MIB,
        state_bytes=0,
        backend=Backend("torch", threads=1),
    )  # fmt: skip


@contextmanager
def few_layers() -> Iterator[None]:
    """As few layers as can be stand for the model on the clock, which is many times as fast: for
    tests that compare estimates with each other. That few stand for many: test_estimate.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_MOST_EXPERTS", 64)
        yield


def machine(*, disk: float = 1.0, compute: float = 1.0, threads: int = 2) -> HardwareProfile:
    """The assumed machine with a disk and arithmetic so many times as fast."""
    profile = assumed_profile(threads=threads, memory_bytes=24 * GIB)
    host = replace(
        profile.host,
        memory_rate=profile.host.memory_rate * compute,
        experts={kind: _times(curve, compute) for kind, curve in profile.host.experts.items()},
        dense={kind: _times(curve, compute) for kind, curve in profile.host.dense.items()},
        decode_attention=profile.host.decode_attention * compute,
        prefill_attention=profile.host.prefill_attention * compute,
        row_rate=profile.host.row_rate * compute,
        call_s=profile.host.call_s / compute,
        expert_s=profile.host.expert_s / compute,
    )
    return replace(profile, disk=_times(profile.disk, disk), host=host)


def _times(curve: Curve, factor: float) -> Curve:
    return Curve(tuple((size, rate * factor) for size, rate in curve.points))

"""The whole engine over two tiers: the same bits as with one, whatever there is room for in each,
and no byte on a link that need not be there."""

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from engines import engine_for, make_model, prompts, request, run_all
from fakes import FakeDevice
from windlass.build.open import open_engine
from windlass.device.base import Device
from windlass.device.cpu import CpuDevice
from windlass.engine.engine import Engine
from windlass.errors import UsageError
from windlass.ids import DISK_TO_HOST, HOST, Part, Route
from windlass.options import EngineOptions
from windlass.plan import Plan, TierPlan
from windlass.weights.tier_supply import TierSupply

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
TO_DEVICE = Route(HOST, "device")
FEW = {Part.EXPERT: 3, Part.BLOCK: 2, Part.FFN: 1, Part.HEAD: 1, Part.EMBED: 0}
LENGTHS = (70, 3, 33)


def _requests():
    return [
        request(f"r{i}", prompt, max_tokens=3 + 2 * i, logprobs=3)
        for i, prompt in enumerate(prompts(LENGTHS))
    ]


def _bits(results):
    """Everything that must be equal, floats included."""
    choices = {name: output.outputs[0] for name, output in results.items()}
    return {
        name: (one.token_ids, one.cumulative_logprob, one.logprobs) for name, one in choices.items()
    }


def _tier(tier: TierPlan, name: str, slots: Mapping[Part, int]) -> TierPlan:
    """`tier` with so many slots of some kinds, as many as the checkpoint has of the others."""
    parts = tuple(
        replace(own, slots=min(slots.get(own.part, 999), own.num_parts or 1), slot_bytes=None)
        for own in tier.parts
    )
    return replace(tier, name=name, parts=parts, kept_states=0)


class Model:
    """A checkpoint, and what an engine with everything in memory makes of the requests."""

    def __init__(self, path, family: str) -> None:
        self.path = path
        make_model(family, path, dtype=torch.bfloat16)
        with engine_for(path, max_num_batched_tokens=75) as engine:
            self.bits = _bits(run_all(engine, _requests()))
            self.plan: Plan = engine.plan
            self.stats = engine.stats().weights

    def open(
        self, host: Mapping[Part, int], above: Mapping[Part, int], *, device: Device | None = None,
        top: Device | None = None,
    ) -> Engine:  # fmt: skip
        """With so many slots in the host and above it; all where a kind is not named."""
        own = self.plan.host
        tiers = (_tier(own, HOST, host), _tier(own, "device", above))
        options = EngineOptions(
            model=str(self.path), plan=replace(self.plan, tiers=tiers), generation_config="vllm"
        )
        return open_engine(options, device=device, above=top or CpuDevice(1, name="device"))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    return Model(tmp_path_factory.mktemp(request.param), request.param)


def _part_bytes(engine: Engine, kinds=tuple(Part)) -> int:
    """Bytes that the tensors of all parts of these kinds take on the device."""
    supply = engine._weights.supply
    assert isinstance(supply, TierSupply)
    keys = [key for key in supply.layout.parts if key.part in kinds]
    moves = [move for key in keys for move in supply._learn(key)[0].moves]
    return sum(move.num_bytes for move in moves)


def test_experts_lie_alike_on_the_device(model):
    with model.open({}, {}) as engine:
        supply = engine._weights.supply
        experts = supply.layout.keys(Part.EXPERT)
        found = {supply.part_reads(key).placements for key in experts}
        assert len(experts) > 8 and len(found) == 1
        assert all(place.at % 256 == 0 for place in found.pop() if not place.ops)


def test_with_room_in_both_tiers_each_link_carries_every_part_once(model):
    with model.open({}, {}) as engine:
        assert _bits(run_all(engine, _requests())) == model.bits
        moved = engine.stats().weights.link_bytes
        assert moved[DISK_TO_HOST] == engine.stats().bytes_read
        assert moved[TO_DEVICE] <= _part_bytes(engine)
        before = dict(moved)
        run_all(engine, [request("again", prompts((40,), seed=1)[0])])
        after = engine.stats().weights.link_bytes
        rest = _part_bytes(engine, (Part.EXPERT,))  # not used before
        assert after[TO_DEVICE] - before[TO_DEVICE] < rest / 2
        run_all(engine, [request("again", prompts((40,), seed=1)[0])])
        assert engine.stats().weights.link_bytes == after, "all are there"


def test_with_all_in_ram_and_few_slots_above_the_disk_is_read_once(model):
    with model.open({}, FEW) as engine:
        assert _bits(run_all(engine, _requests())) == model.bits
        stats = engine.stats().weights
        own = engine._weights.supply.below.stats()
        assert stats.link_bytes[TO_DEVICE] > 3 * _part_bytes(engine)
        assert stats.link_bytes[DISK_TO_HOST] <= model.stats.bytes_read * 1.01
        assert own.evictions == 0 and stats.evictions > 0
        assert stats.wait_s > 0
        assert stats.prefetch_issued > stats.prefetch_used > 0 and own.prefetch_issued > 0


def test_a_device_that_holds_all_needs_few_slots_below(model):
    one_of_each = dict.fromkeys((Part.EXPERT, Part.BLOCK, Part.FFN, Part.HEAD), 1)
    with model.open(one_of_each, {}) as engine:
        assert _bits(run_all(engine, _requests())) == model.bits
        run_all(engine, [request("again", prompts((40,), seed=1)[0])])
        stats = engine.stats().weights
        assert stats.evictions == 0
        assert stats.link_bytes[TO_DEVICE] <= _part_bytes(engine)
        below = engine._weights.supply.below.stats()
        # read ahead into the one slot and gone before it was copied: as the moments have it
        in_vain = below.prefetch_issued_bytes - below.prefetch_used_bytes
        read = stats.link_bytes[DISK_TO_HOST]
        assert read - in_vain <= model.stats.bytes_read and read <= 2 * model.stats.bytes_read


@pytest.mark.parametrize("seed", range(2))
def test_bits_do_not_depend_on_slots_or_arrival(model, seed):
    chance = random.Random(seed)
    host, above = (
        {part: max(least, chance.choice((1, 2, 5, 16))) for part, least in fewest.items()}
        | {Part.EMBED: chance.choice((0, 1))}
        for fewest in (dict.fromkeys(FEW, 1), {**FEW, Part.EXPERT: 1})
    )
    device, top = (
        FakeDevice(name=name, seed=seed, num_lanes=2, delay_s=3e-5) for name in (HOST, "device")
    )
    with model.open(host, above, device=device, top=top) as engine:
        assert _bits(run_all(engine, _requests())) == model.bits, (host, above)
        assert engine.stats().weights.link_bytes[TO_DEVICE] > 0


def test_a_plan_is_for_the_memories_that_there_are(model):
    with pytest.raises(UsageError, match="tiers above the host: got device, allowed gpu"):
        model.open({}, {}, top=CpuDevice(1, name="gpu"))
    tiers = (model.plan.host, _tier(model.plan.host, "device", {}))
    plan = replace(model.plan, tiers=tiers)
    with pytest.raises(UsageError, match="tiers above the host: got device, allowed none"):
        engine_for(model.path, plan=plan, max_num_batched_tokens=75)
    with pytest.raises(UsageError, match="tiers above the host: got none, allowed device"):
        open_engine(
            EngineOptions(model=str(model.path), plan=model.plan, generation_config="vllm"),
            above=CpuDevice(1, name="device"),
        )
    wrong = replace(tiers[1], parts=tuple(replace(p, slot_bytes=1) for p in tiers[1].parts))
    plan = replace(model.plan, tiers=(model.plan.host, wrong))
    with pytest.raises(UsageError, match=r"tiers.device: \w+ slot_bytes: got 1, allowed"):
        open_engine(
            EngineOptions(model=str(model.path), plan=plan, generation_config="vllm"),
            above=CpuDevice(1, name="device"),
        )
    with pytest.raises(UsageError, match="expert slots: got 0, allowed 1 to"):
        model.open({}, {Part.EXPERT: 0})

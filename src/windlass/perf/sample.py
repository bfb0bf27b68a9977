"""A few layers of a large model that stand for all of it on the clock. Pure arithmetic."""

from dataclasses import dataclass, replace

from windlass.forecast.interface import ExpertTable
from windlass.ids import Part
from windlass.models.spec import Block, Ffn, ModelSpec, Moe
from windlass.perf.sizes import Sizes
from windlass.plan import Plan, TierPlan

_FEWEST_MOVING = 8  # of a device's, which a sample has though its share is less
_PIPELINE_SLOTS = 16  # of experts on their way, however many layers there are


@dataclass(frozen=True, slots=True)
class Sample:
    """A model of some of the layers. `weights`: how much more than itself each stands for, less
    what all do; `factor`: layers of the whole for each of the sample."""

    spec: ModelSpec
    weights: tuple[float, ...]
    factor: float


def sample_layers(spec: ModelSpec, *, most_experts: int) -> Sample:
    """Layers of every kind, in their order, in nearly the shares that the whole has of them."""
    blocks = spec.blocks
    kinds: dict[Block, list[int]] = {}
    for layer, block in enumerate(blocks):
        kinds.setdefault(block, []).append(layer)
    widest = max(b.ffn.num_experts if isinstance(b.ffn, Moe) else 1 for b in kinds)
    wanted = max(most_experts // widest, 2 * len(kinds), 4)
    if wanted >= len(blocks):
        return Sample(spec, (1.0,) * len(blocks), 1.0)
    kept: list[tuple[int, float]] = []
    for layers in kinds.values():
        count = max(1, round(wanted * len(layers) / len(blocks)))
        step = len(layers) / count
        kept += [(layers[int(i * step)], step) for i in range(count)]
    kept.sort()
    factor = len(blocks) / len(kept)
    chosen = replace(spec, blocks=tuple(blocks[layer] for layer, _ in kept))
    return Sample(chosen, tuple(step / factor for _, step in kept), factor)


def parts_of(sample: Sample, sizes: Sizes) -> dict[Part, int]:
    """Parts of each kind that the sample has."""
    networks = [block.ffn for block in sample.spec.blocks]
    own = {
        Part.EXPERT: sum(f.num_experts for f in networks if isinstance(f, Moe)),
        Part.BLOCK: len(networks),
        Part.FFN: sum(isinstance(f, Ffn) for f in networks),
    }
    return {part: own.get(part, count) for part, count in sizes.num_parts.items() if count}


def slots_of(plan: Plan, tier: TierPlan, sizes: Sizes, sample: Sample) -> dict[Part, int]:
    """The tier's slots for the sample: the share that stays, and those on their way."""
    slots: dict[Part, int] = {}
    # those of a layer stay until its last group has passed, however many layers there are
    again = max(ExpertTable.of(sample.spec).num_experts) if plan.groups > 1 else 0
    for part, count in parts_of(sample, sizes).items():
        whole, given = sizes.num_parts[part], tier.slots.get(part, 0)
        moving = min(given, 2 if part is not Part.EXPERT else _PIPELINE_SLOTS + again)
        if plan.above is not None:  # many stay beside those that move: no more than their share
            least = min(moving, _FEWEST_MOVING + again)
            slots[part] = max(min(count, least), given * count // whole)
            continue
        kept = (given - moving) * count / whole
        slots[part] = count if given >= whole else min(count, moving + int(kept))
    return slots

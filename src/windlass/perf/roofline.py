"""The Hierarchical Roofline Model (MoE-Lightning, arXiv 2411.11217, section 3.2), for any number of
memory levels: device, host, disk. Pure arithmetic; FLOP, bytes, seconds.

The paper has two levels and one link. Here data that lives several levels away crosses every link
between, each with its own intensity, and the slowest binds. Levels are numbered from the fastest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from windlass.errors import UsageError
from windlass.hardware.profile import HardwareProfile
from windlass.models.spec import ModelSpec, Moe
from windlass.perf.flops import (
    attention_flops,
    attention_matrices,
    expert_matrices,
    head_flops_per_token,
    shared_matrices,
)


@dataclass(frozen=True, slots=True)
class Level:
    """A memory and what computes beside it: FLOP/s and bytes/s; a disk computes nothing."""

    name: str
    flops: float
    memory_rate: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Levels, the fastest first; `links[i]` in bytes/s from level i + 1 to level i. UsageError for
    a link that moves nothing: no plan could use what lies behind it."""

    levels: tuple[Level, ...]
    links: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.links) != len(self.levels) - 1:
            raise UsageError(f"machine: got {len(self.links)} links, allowed one below each level")
        for level, rate in zip(self.levels[1:], self.links, strict=True):
            if not rate > 0:
                raise UsageError(f"link from {level.name}: got {rate} bytes/s, allowed more than 0")


@dataclass(frozen=True, slots=True)
class Task:
    """A module's work in one layer. `bytes[i]`: what it touches at level i, where i is at or
    above the level that its data lives on; 0 where nothing."""

    name: str
    flops: float
    bytes: tuple[float, ...]

    def intensity(self, level: int) -> float:
        """FLOP for each byte touched at `level`."""
        moved = self.bytes[level]
        return self.flops / moved if moved else math.inf


def ceiling(machine: Machine, task: Task, level: int) -> float:
    """FLOP/s of `task` on data in `level`'s own memory (Eq. 8)."""
    own = machine.levels[level]
    return min(own.flops, own.memory_rate * task.intensity(level))


def attainable(machine: Machine, task: Task, *, at: int, home: int) -> float:
    """FLOP/s of `task` computed at level `at` on data that lives at `home` (Eq. 7; one term for
    each link between)."""
    links = (machine.links[i - 1] * task.intensity(i) for i in range(at + 1, home + 1))
    return min(ceiling(machine, task, at), *links, math.inf)


def seconds(machine: Machine, task: Task, *, at: int, home: int) -> float:
    """The least time of `task` (Eq. 14)."""
    rate = attainable(machine, task, at=at, home=home)
    return task.flops / rate if task.flops else 0.0


def first_turning_point(machine: Machine, task: Task, *, at: int, home: int) -> float:
    """P1 (Eq. 9), in FLOP per byte at `home`: a task of less intensity is better computed there
    than moved to `at`."""
    return ceiling(machine, task, home) / _path(machine, at, home)


def second_turning_point(machine: Machine, task: Task, *, at: int, home: int) -> float:
    """P2 (Eq. 10), in FLOP per byte at `home`: a task of less intensity, computed at `at`, waits
    for the link."""
    return ceiling(machine, task, at) / _path(machine, at, home)


def balance_point(machine: Machine, task: Task, *, at: int, home: int) -> float:
    """The intensity at `home` where the link brings data as fast as `at` reads it from its own
    memory (Eq. 11): more rows per pass are of no use beyond it, larger micro-batches are."""
    own = machine.levels[at]
    return own.memory_rate * task.intensity(at) / _path(machine, at, home)


def _path(machine: Machine, at: int, home: int) -> float:
    """bytes/s from `home` to `at`."""
    assert 0 <= at < home < len(machine.levels), f"no way from level {home} to {at}"
    return min(machine.links[at:home])


def machine_of(profile: HardwareProfile, *, kind: str) -> Machine:
    """The measured machine at its best rates, for weights of `kind`."""
    levels, links = [], []
    if profile.device is not None and profile.down is not None:
        best = profile.device.experts[kind].best
        levels.append(Level("device", best, profile.device.memory_rate))
        links.append(profile.down.rate.best)
    levels.append(Level("host", profile.host.experts[kind].best, profile.host.memory_rate))
    levels.append(Level("disk", 0.0, profile.disk.best))
    links.append(profile.disk.best)
    return Machine(tuple(levels), tuple(links))


# --- what a pass asks of one layer ----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of a pass and what they look back on. `micro`: rows that pass through a module at once;
    weights are read from the device's own memory once for each such group (all rows where None)."""

    decode: int
    context: float = 0.0  # mean positions that a decode row sees
    prefill: int = 0
    prompt: float = 0.0  # tokens of the prompts that prefill rows belong to
    micro: int | None = None

    @property
    def total(self) -> int:
        return self.decode + self.prefill


def decode_attention(spec: ModelSpec, layer: int, rows: Rows, kv_bytes: float, levels: int) -> Task:
    """Scores and sums of the decode rows; `kv_bytes`: one position of one sequence in the layer."""
    per_row = attention_flops(spec.blocks[layer].attention, round(rows.context))
    moved = rows.decode * rows.context * kv_bytes
    return Task("decode attention", float(rows.decode * per_row), (moved,) * levels)


def prefill_attention(
    spec: ModelSpec, layer: int, rows: Rows, kv_bytes: float, levels: int
) -> Task:
    """The same of prompt rows, which see half of their prompt on average."""
    per_row = attention_flops(spec.blocks[layer].attention, round(rows.prompt / 2))
    return Task(
        "prefill attention", float(rows.prefill * per_row), (rows.prefill * kv_bytes,) * levels
    )


def projections(spec: ModelSpec, layer: int, rows: Rows, weight_bytes: float, levels: int) -> Task:
    """Dense matrices of a block: attention's, router, shared expert. `weight_bytes`: of one
    weight."""
    block = spec.blocks[layer]
    matrices = attention_matrices(spec, layer) + shared_matrices(spec, layer)
    if not isinstance(block.ffn, Moe):
        matrices += expert_matrices(spec, layer)
    return _weights("dense", 2 * matrices * rows.total, matrices * weight_bytes, rows, levels)


def experts(spec: ModelSpec, layer: int, rows: Rows, weight_bytes: float, levels: int) -> Task:
    """All experts of a layer that the rows are routed to, evenly."""
    moe = spec.blocks[layer].ffn
    assert isinstance(moe, Moe), f"layer {layer} has no experts"
    one = expert_matrices(spec, layer)
    active = active_experts(moe.num_experts, moe.top_k, rows.total)
    flops = 2 * one * moe.top_k * rows.total
    return _weights("experts", flops, active * one * weight_bytes, rows, levels)


def head(spec: ModelSpec, num_rows: int, weight_bytes: float, levels: int) -> Task:
    """Logits of `num_rows` rows."""
    flops = head_flops_per_token(spec)
    return Task("head", float(flops * num_rows), (flops / 2 * weight_bytes,) * levels)


def active_experts(num_experts: int, top_k: int, rows: float) -> float:
    """Experts of a layer that at least one of `rows` rows uses, rows and choices being even."""
    return float(num_experts * (1 - (1 - min(1.0, top_k / num_experts)) ** rows))


def _weights(name: str, flops: float, moved: float, rows: Rows, levels: int) -> Task:
    """Weights cross the links once per pass and the fastest memory once for each micro-batch."""
    times = 1 if rows.micro is None else -(-rows.total // rows.micro)
    return Task(name, float(flops), (times * moved, *[moved] * (levels - 1)))


def lower_bound(machine: Machine, tasks: Sequence[Task], *, home: int) -> dict[str, float]:
    """Least seconds of each resource for `tasks` computed at level 0 on data at `home`: one entry
    per level and link; the largest is a bound of any schedule."""
    own = machine.levels[0]
    bound = {
        f"{own.name} compute": sum(task.flops for task in tasks) / own.flops,
        f"{own.name} memory": sum(task.bytes[0] for task in tasks) / own.memory_rate,
    }
    for i in range(1, home + 1):
        moved = sum(task.bytes[i] for task in tasks)
        bound[f"link from {machine.levels[i].name}"] = moved / machine.links[i - 1]
    return bound

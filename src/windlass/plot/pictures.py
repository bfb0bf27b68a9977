"""The pictures of a plan: the hierarchical roofline (MoE-Lightning, arXiv 2411.11217, Fig. 4 and 5)
with the operating points of the plan's passes, and what each lane does in one pass."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from windlass.hardware.profile import HardwareProfile
from windlass.ids import Part
from windlass.plan import Plan
from windlass.planner.budget import Sizes
from windlass.planner.compose import PassRun
from windlass.planner.costs import Seen
from windlass.planner.explain import Explanation
from windlass.planner.reckon import held_shares, kv_layers
from windlass.planner.roofline import (
    Machine,
    Rows,
    Task,
    attainable,
    decode_attention,
    experts,
    machine_of,
    prefill_attention,
    projections,
)
from windlass.planner.timing import ClockedModel
from windlass.plot.chart import Axis, Bar, Chart, Line, Panel, Point
from windlass.schedule.clock import Span
from windlass.spec.model import ModelSpec, Moe
from windlass.workload import Workload

_DECADES = (0.01, 1e6)  # FLOP per byte
_LANES = ("disk", "host")
_MOST_BARS = 3000  # of a timeline; shorter ones are joined beyond
_WARM_PASSES = 2  # that come before the one that is drawn


def chart_of(found: Explanation, spec: ModelSpec, sizes: Sizes, profile: HardwareProfile) -> Chart:
    """Both pictures of the best plan, and its lines."""
    plan, work = found.best.plan, found.workload
    host = replace(profile, device=None, down=None, up=None)  # what this version computes on
    return Chart(
        f"{found.model} on {found.machine}",
        (roofline_panel(spec, sizes, plan, host, work),
         timeline_panel(spec, sizes, plan, host, work)),
        tuple(found.lines()),
    )  # fmt: skip


# --- roofline -------------------------------------------------------------------------------------


def roofline_panel(
    spec: ModelSpec, sizes: Sizes, plan: Plan, profile: HardwareProfile, work: Workload
) -> Panel:
    """Roofs of the host's own memory and of the disk in front of it; for each module of a decode
    pass and of a full pass, what it attains and by the bytes of which level."""
    machine = machine_of(profile, kind=sizes.weight_kinds.get(Part.EXPERT, "bfloat16"))
    peak = machine.levels[0].flops
    points = tuple(operating_points(spec, sizes, plan, machine, work))
    lines = [
        Line(f"{machine.levels[0].name}: {peak / 1e9:.3g} GFLOP/s", ((_DECADES[0], peak),
             (_DECADES[1], peak))),
        _roof(f"{machine.levels[0].name} memory", machine.levels[0].memory_rate, peak),
    ]  # fmt: skip
    for level, rate in zip(machine.levels[1:], machine.links, strict=True):
        lines.append(replace(_roof(level.name, rate, peak), is_dashed=True))
    low = min([machine.links[-1] * 0.1, *(point.y / 3 for point in points)])
    high = 10 ** math.ceil(math.log10(3 * max([peak, *(p.x for p in points)]) / peak) + 4)
    return Panel(
        title="Hierarchical roofline: modules of one layer",
        x=Axis("FLOP for each byte of the level that the data come from", 0.1, high, is_log=True),
        y=Axis("FLOP/s", low, 3 * peak, is_log=True),
        lines=tuple(lines),
        points=points,
    )


def _roof(name: str, rate: float, peak: float) -> Line:
    """bytes/s times intensity, up to the peak."""
    knee = peak / rate
    return Line(f"{name}: {rate / 1e9:.3g} GB/s", ((_DECADES[0], _DECADES[0] * rate), (knee, peak)))


def operating_points(
    spec: ModelSpec, sizes: Sizes, plan: Plan, machine: Machine, work: Workload
) -> Iterable[Point]:
    """Modules of a layer with experts in a pass that decodes, and in one that is filled up with
    prompts: weights that memory does not hold come from the disk."""
    layer = next(i for i, block in enumerate(spec.blocks) if isinstance(block.ffn, Moe))
    held, disk = held_shares(plan, sizes), len(machine.levels) - 1
    seqs = min(plan.max_num_seqs, work.num_sequences)
    context = work.mean_prompt_tokens + work.mean_output_tokens / 2
    prefill = max(0, plan.max_num_batched_tokens - seqs)
    decode = Rows(decode=seqs, context=context)
    full = Rows(decode=seqs, context=context, prefill=prefill, prompt=work.mean_prompt_tokens)
    kv = sizes.bytes_per_token / max(1, kv_layers(spec))
    levels = len(machine.levels)
    for name, rows in (("decode", decode), ("mixed", full)):
        for part, make in ((Part.EXPERT, experts), (Part.BLOCK, projections)):
            task = make(spec, layer, rows, _bytes_per_weight(spec, sizes, part, layer), levels)
            yield _point(machine, task, name, disk, 1 - held.get(part, 0.0))
    if kv:
        yield _point(machine, decode_attention(spec, layer, decode, kv, levels), "decode", 0, 0)
        if prefill:
            task = prefill_attention(spec, layer, full, kv, levels)
            yield _point(machine, task, "mixed", 0, 0)


def _point(machine: Machine, task: Task, name: str, home: int, missing: float) -> Point:
    """Where `missing` is the share of the bytes that come from `home`."""
    if not missing:
        home = 0
    moved = tuple(b * (missing if i == home and home else 1.0) for i, b in enumerate(task.bytes))
    own = replace(task, bytes=moved)
    if home == 0:
        rate, intensity = attainable(machine, own, at=0, home=0), own.intensity(0)
    else:
        rate, intensity = attainable(machine, own, at=0, home=home), own.intensity(home)
    source = machine.levels[home].name
    return Point(f"{task.name}, {name} ({source})", intensity, rate)


def _bytes_per_weight(spec: ModelSpec, sizes: Sizes, part: Part, layer: int) -> float:
    """Stored, of a kind of part, by its slots and the matrices in them."""
    one = Rows(decode=1)
    task = (experts if part is Part.EXPERT else projections)(spec, layer, one, 1.0, 1)
    moe = spec.blocks[layer].ffn
    parts = moe.top_k if part is Part.EXPERT and isinstance(moe, Moe) else 1
    return sizes.slot_bytes[part] * parts / task.bytes[0]


# --- timeline -------------------------------------------------------------------------------------


def timeline_panel(
    spec: ModelSpec, sizes: Sizes, plan: Plan, profile: HardwareProfile, work: Workload
) -> Panel:
    """A decode pass of full size, with weights where the passes before left them. Of a large model
    some layers stand for all, so the time is theirs."""
    seqs = min(plan.max_num_seqs, work.num_sequences)
    context = work.mean_prompt_tokens + work.mean_output_tokens / 2
    one = PassRun(1, Seen(seqs, seqs * context, 0, 0), seqs)
    model = ClockedModel(spec, sizes, plan, profile, keeps_spans=True)
    for _ in range(_WARM_PASSES):
        model.run(one)
    begin = model.lanes.clock.now
    timed = model.run(one)
    end = model.lanes.clock.now
    share = (end - begin) / timed.seconds
    bars = bars_of(model.spans, begin, end, merge_s=(end - begin) / _MOST_BARS)
    layers = max(1, round(share * len(spec.blocks)))
    return Panel(
        title=f"One pass of {seqs} decoding sequences, {timed.seconds:.3g} s in all;"
        f" {layers} of {len(spec.blocks)} layers on the clock",
        x=Axis("seconds", 0.0, end - begin),
        y=Axis("lane", -0.5, len(_LANES) - 0.5, names=_LANES),
        bars=tuple(bars),
    )


def bars_of(spans: Sequence[Span], begin: float, end: float, *, merge_s: float) -> list[Bar]:
    """What lies between `begin` and `end`, neighbours of one lane and kind joined over gaps of less
    than `merge_s`; seconds since `begin`."""
    bars: list[Bar] = []
    last: dict[str, int] = {}
    for span in sorted(spans, key=lambda one: one.begin):
        if span.end <= begin or span.begin >= end or span.lane not in _LANES:
            continue
        start, stop = max(span.begin, begin) - begin, min(span.end, end) - begin
        label = span.label.partition("[")[0].partition(" ")[0] or span.lane
        at = last.get(span.lane)
        if at is not None and bars[at].label == label and start - bars[at].end < merge_s:
            bars[at] = replace(bars[at], end=max(stop, bars[at].end))
        else:
            last[span.lane] = len(bars)
            bars.append(Bar(label, _LANES.index(span.lane), start, stop))
    return bars

"""Draws what `windlass plan --json` printed: the hierarchical roofline (MoE-Lightning, arXiv
2411.11217, figures 4 and 5) with the plan's operating points, and what each lane does in a pass.

    windlass plan -m DIR --machine laptop --json > plan.json
    python bench/draw_plan.py plan.json plan.svg -m DIR --machine laptop

`-` reads the plan from standard input. `--machine`: the name or file that was planned for; of this
machine, what `windlass doctor -m DIR --json` prints. The picture is an .svg, or an .html with the
plan's numbers below.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, cast

from windlass.build.checkpoint_sizes import sizes_of
from windlass.checkpoint.folder import read_model
from windlass.hardware.preset import load_machine
from windlass.hardware.profile import HardwareProfile
from windlass.ids import Part
from windlass.models.spec import ModelSpec, Moe
from windlass.options import EngineOptions, resolve_model
from windlass.perf import flops as per_token
from windlass.perf.job_passes import PassRun
from windlass.perf.op_cost import Seen
from windlass.perf.pass_cost import held_shares, kv_layers
from windlass.perf.simulation import ClockedModel
from windlass.perf.sizes import Backend, Problem, Sizes
from windlass.plan import Plan
from windlass.runtime.clock import Span

LANES = ("disk", "host")
_MOST_BARS = 3000  # of a timeline; shorter ones are joined beyond
_WARM_PASSES = 2  # that come before the one that is drawn
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 1000, 90, 270, 70, 50
_HEIGHT, _LANES_HEIGHT = 480, 230
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999")
_TEXT = 'font-family="sans-serif" font-size="12"'


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan and what it was made for; lengths in tokens, of one sequence on average."""

    spec: ModelSpec
    sizes: Sizes
    plan: Plan
    profile: HardwareProfile
    num_sequences: int
    prompt: float
    output: float

    @property
    def decoding(self) -> int:
        """Sequences of a full pass."""
        return min(self.plan.max_num_seqs, self.num_sequences)

    @property
    def context(self) -> float:
        """Positions that a decoded token sees."""
        return self.prompt + self.output / 2


@dataclass(frozen=True, slots=True)
class Point:
    """A module of one layer: FLOP for each byte that comes from `source`, and its FLOP/s."""

    label: str
    source: str
    intensity: float
    rate: float


# --- the roofline ---------------------------------------------------------------------------------


def roofs(planned: Planned) -> dict[str, float]:
    """Bytes/s by where data come from, the fastest first."""
    return {"host": planned.profile.host.memory_rate, "disk": planned.profile.disk.best}


def peak(planned: Planned) -> float:
    """FLOP/s of the host at its best, with weights as the experts' are stored."""
    return planned.profile.host.experts[
        planned.sizes.weight_kinds.get(Part.EXPERT, "bfloat16")
    ].best


def points(planned: Planned) -> Iterator[Point]:
    """Modules of a layer with experts in a pass that decodes, and in one that is filled up with
    prompts: weights that are not resident come from the disk, the KV cache from memory."""
    spec, plan, seqs = planned.spec, planned.plan, planned.decoding
    layer = next(i for i, block in enumerate(spec.blocks) if isinstance(block.ffn, Moe))
    attention, moe = spec.blocks[layer].attention, spec.blocks[layer].ffn
    assert isinstance(moe, Moe)
    prefill = max(0, plan.max_num_batched_tokens - seqs)
    held, slot = held_shares(plan, planned.sizes), planned.sizes.slot_bytes
    dense = per_token.attention_matrices(spec, layer) + per_token.shared_matrices(spec, layer)
    one = 2 * per_token.expert_matrices(spec, layer) * moe.top_k
    for name, tokens in {"decode": seqs, "mixed": seqs + prefill}.items():
        used = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** tokens)
        for part, flops, moved in (
            (Part.EXPERT, one * tokens, used * slot[Part.EXPERT]),
            (Part.BLOCK, 2 * dense * tokens, slot[Part.BLOCK]),
        ):
            missing = 1 - held[part]
            label = f"{'experts' if part is Part.EXPERT else 'dense'}, {name}"
            yield _point(planned, label, flops, {"host": moved, "disk": moved * missing})
    kv = planned.sizes.bytes_per_token / max(1, kv_layers(spec))
    if kv:
        seen = per_token.attention_flops(attention, round(planned.context))
        yield _point(
            planned, "decode attention", seqs * seen, {"host": seqs * planned.context * kv}
        )
    if kv and prefill:
        seen = per_token.attention_flops(attention, round(planned.prompt / 2))
        yield _point(planned, "prefill attention", prefill * seen, {"host": prefill * kv})


def _point(planned: Planned, label: str, flops: float, moved: Mapping[str, float]) -> Point:
    """On the roof that binds: `moved` bytes by where they come from."""
    rates = {source: roofs(planned)[source] * flops / num for source, num in moved.items() if num}
    source = min(rates, key=rates.__getitem__)
    rate = min(peak(planned), rates[source])
    return Point(f"{label} ({source})", source, flops / moved[source], rate)


# --- a pass ---------------------------------------------------------------------------------------


def bars(planned: Planned) -> tuple[list[Span], float, str]:
    """A decode pass of full size, with weights where the passes before left them; its seconds on
    the clock, and in words. Of a large model some layers stand for all, and the time is theirs."""
    seqs = planned.decoding
    one = PassRun(1, Seen(seqs, seqs * planned.context, 0, 0), seqs)
    host = replace(planned.profile, device=None, down=None, up=None)
    model = ClockedModel(Problem(planned.spec, planned.sizes, host), planned.plan, keeps_spans=True)
    for _ in range(_WARM_PASSES):
        model.run(one)
    begin = model.lanes.clock.now
    timed = model.run(one)
    long = model.lanes.clock.now - begin
    layers = max(1, round(long / timed.seconds * len(planned.spec.blocks)))
    title = (f"One pass of {seqs} decoding sequences, {timed.seconds:.3g} s in all;"
             f" {layers} of {len(planned.spec.blocks)} layers on the clock")  # fmt: skip
    return join(model.spans, begin, begin + long), long, title


def join(spans: Sequence[Span], begin: float, end: float) -> list[Span]:
    """What lies between `begin` and `end`, in seconds since `begin`. Neighbours alike
    are joined over gaps too short to be seen."""
    found: list[Span] = []
    last: dict[str, int] = {}
    for span in sorted(spans, key=lambda one: one.begin):
        if span.end <= begin or span.begin >= end or span.lane not in LANES:
            continue
        start, stop = max(span.begin, begin) - begin, min(span.end, end) - begin
        at = last.get(span.lane)
        gap = math.inf if at is None else start - found[at].end
        if at is not None and found[at].label == span.label and gap < (end - begin) / _MOST_BARS:
            found[at] = found[at]._replace(end=max(stop, found[at].end))
        else:
            last[span.lane] = len(found)
            found.append(Span(span.lane, span.label, start, stop))
    return found


# --- SVG ------------------------------------------------------------------------------------------


def draw(planned: Planned, title: str) -> str:
    """Both pictures, one below the other."""
    size = f'width="{_WIDTH}" height="{_HEIGHT + _LANES_HEIGHT}"'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(10, 20, title, weight="bold"),
        *_draw_roofline(planned), *_draw_bars(*bars(planned)), "</svg>",
    ])  # fmt: skip


def _draw_roofline(planned: Planned) -> Iterator[str]:
    top, marks = peak(planned), list(points(planned))
    low_x = 10.0 ** math.floor(math.log10(min(0.1, *(p.intensity for p in marks))))
    high_x = 10.0 ** math.ceil(math.log10(10 * max(p.intensity for p in marks)))
    low_y, high_y = min(roofs(planned)["disk"] / 10, *(p.rate / 3 for p in marks)), 3 * top
    x0, x1, y0, y1 = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, _TOP

    def x(value: float) -> float:
        return x0 + (x1 - x0) * math.log(value / low_x) / math.log(high_x / low_x)

    def y(value: float) -> float:
        return y0 + (y1 - y0) * math.log(max(value, low_y) / low_y) / math.log(high_y / low_y)

    yield _text(x0, y1 - 12, "FLOP/s of the modules of one layer, by FLOP for each byte")
    for power in range(math.ceil(math.log10(low_x)), math.floor(math.log10(high_x)) + 1):
        yield _rule(x(10.0**power), y0, x(10.0**power), y1)
        yield _text(x(10.0**power), y0 + 16, f"1e{power}", anchor="middle")
    for power in range(math.ceil(math.log10(low_y)), math.floor(math.log10(high_y)) + 1):
        yield _rule(x0, y(10.0**power), x1, y(10.0**power))
        yield _text(x0 - 6, y(10.0**power) + 4, f"1e{power}", anchor="end")
    at = y1 + 8
    for (source, rate), colour in zip(roofs(planned).items(), _COLOURS, strict=False):
        start, knee = max(low_x, low_y / rate), top / rate  # the line enters from left or below
        corners = [(start, start * rate), (min(knee, high_x), min(top, high_x * rate))]
        corners += [(high_x, top)] if knee < high_x else []
        line = " ".join(f"{x(a):.2f},{y(b):.2f}" for a, b in corners)
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield from _key(x1 + 12, at, colour, f"{source}: {rate / 1e9:.3g} GB/s")
        at += 18
    yield _text(x1 + 30, at, f"host: {top / 1e9:.3g} GFLOP/s")
    for number, mark in enumerate(marks, start=1):
        says = f"{mark.label}: {mark.intensity:.3g} FLOP/byte, {mark.rate:.3g} FLOP/s"
        yield (f'<circle cx="{x(mark.intensity):.2f}" cy="{y(mark.rate):.2f}" r="5">'
               f"<title>{escape(says)}</title></circle>")  # fmt: skip
        yield _text(x(mark.intensity) + 7, y(mark.rate) + 12, str(number))
        yield _text(x1 + 12, at + 18 * number, f"{number}  {mark.label}")


def _draw_bars(found: Sequence[Span], seconds: float, title: str) -> Iterator[str]:
    x0, x1, y1 = _LEFT, _WIDTH - _RIGHT, _HEIGHT + _TOP / 2
    height = (_LANES_HEIGHT - _BOTTOM - _TOP / 2) / len(LANES)
    labels = sorted({bar.label for bar in found})
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(labels)}
    yield _text(x0, y1 - 12, title)
    for i in range(6):
        at = x0 + (x1 - x0) * i / 5
        yield _rule(at, y1, at, y1 + height * len(LANES))
        yield _text(at, y1 + height * len(LANES) + 16, f"{seconds * i / 5:.3g} s", anchor="middle")
    for i, lane in enumerate(LANES):
        yield _text(x0 - 6, y1 + height * (i + 0.5) + 4, lane, anchor="end")
    for bar in found:
        left, wide = (x1 - x0) * bar.begin / seconds, (x1 - x0) * (bar.end - bar.begin) / seconds
        top = y1 + height * (LANES.index(bar.lane) + 0.1)
        yield (f'<rect x="{x0 + left:.2f}" y="{top:.1f}" width="{max(0.2, wide):.2f}" '
               f'height="{0.8 * height:.1f}" fill="{colours[bar.label]}"/>')  # fmt: skip
    for i, (label, colour) in enumerate(colours.items()):
        yield from _key(x1 + 12, y1 + 8 + 18 * i, colour, label)


def _key(x: float, y: float, colour: str, label: str) -> Iterator[str]:
    yield f'<rect x="{x}" y="{y - 8}" width="12" height="8" fill="{colour}"/>'
    yield _text(x + 18, y, label)


def _rule(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    style = f'{_TEXT} text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


# --- the command ----------------------------------------------------------------------------------


def read(document: Mapping[str, Any], model: str, machine: str) -> Planned:
    """The plan of `document` for the checkpoint or configuration in `model`."""
    plan, work, profile = (
        Plan.from_json(document["plan"]),
        document["workload"],
        load_machine(machine),
    )
    has_weights = any(resolve_model(model).glob("*.safetensors"))
    options = EngineOptions(
        model=model, kv_cache_dtype=cast(Any, plan.kv_cache_dtype),
        load_format="auto" if has_weights else "dummy",
    )  # fmt: skip
    with ExitStack() as opened:
        folder = read_model(options, opened)
        sizes = sizes_of(folder, options, Backend("cpu", profile.threads))
    count = work["num_sequences"]
    return Planned(folder.spec, sizes, plan, profile, count, work["prompt_tokens"] / count,
                   work["output_tokens"] / count)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draws a plan.")
    parser.add_argument("plan", help="what `windlass plan --json` printed, or -")
    parser.add_argument("picture", type=Path, help="a name ending in .svg or .html")
    parser.add_argument("-m", "--model", required=True, metavar="DIR", help="that was planned for")
    parser.add_argument("--machine", required=True, metavar="NAME|FILE", help="planned for")
    options = parser.parse_args(arguments)
    if options.picture.suffix not in (".svg", ".html"):
        parser.error(f"picture: got {options.picture}, allowed a name ending in .svg or .html")
    text = sys.stdin.read() if options.plan == "-" else Path(options.plan).read_text("utf-8")
    document = json.loads(text)
    title = f"{document['model']} on {document['machine']}"
    picture = draw(read(document, options.model, options.machine), title)
    if options.picture.suffix == ".html":
        numbers = escape(json.dumps(document, indent=1))
        picture = (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>'
                   f"{escape(title)}</title></head>\n<body>\n{picture}\n<pre>{numbers}</pre>\n"
                   "</body></html>")  # fmt: skip
    options.picture.write_text(picture + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Changes every field of every family's golden spec, one at a time, and says which changes neither
the layout nor the logits notice. Exit 1 on a survivor without an explanation, and on an explanation
that no longer explains anything.

    python scripts/mutate.py [family ...]
"""

import copy
import re
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests/support")]

import families  # noqa: E402
from delta_model import DELTA_CASES, DeltaModel, make_delta_checkpoint  # noqa: E402
from dense_model import TOLERANCE, Checkpoint, dense_logits, prompts  # noqa: E402
from windlass.checkpoint.layout import build_layout  # noqa: E402
from windlass.decoder.rope import frequencies  # noqa: E402
from windlass.errors import WindlassError  # noqa: E402
from windlass.models import spec as m  # noqa: E402

Spec = m.ModelSpec
Forward = Callable[[Checkpoint, torch.Tensor], torch.Tensor]

# Survivors whose change is no change of the mathematics: (pattern of "family path", reason).
EXPLAINED: tuple[tuple[str, str], ...] = (
    (r"^\S+ (family|limited_by) = ", "words for messages"),
    (r"^\S+ max_positions = ", "a limit of requests, not part of the mathematics"),
    (
        r"^(mixtral|qwen3(_vl|_5)?_moe\w*) .*routing = TopKSoftmax\(router_bias=False\)$",
        "softmax over the best logits is the softmax over all, divided by the sum of the best",
    ),
    (
        r"^granitemoe(shared)? .*routing = SoftmaxTopK\(renorm_floor=0\.0, ",
        "the same the other way round",
    ),
    (
        r"^(qwen2_moe|olmoe|deepseek_v2|qwen3_next|mellum) .*renorm_order = 2$",
        "kept scores are not divided at all there (renorm_floor is None)",
    ),
    (
        r"^\S+ embed_multiplier_as_stored = ",
        "tables are fp32 here, which holds every multiplier as it is",
    ),
)

# Settings with which the blend of YaRN begins and ends inside the few frequencies of a tiny head;
# with the usual ones its bounds are clamped, and no change of them changes a frequency.
_BLEND = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "beta_fast": 2.0,
          "beta_slow": 0.25, "original_max_position_embeddings": 32}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"rope_parameters": {**_BLEND, "truncate": False}},
    "deepseek_v3": {"rope_parameters": {**_BLEND, "mscale": 1.0, "mscale_all_dim": 1.0}},
}


class Golden(NamedTuple):
    checkpoint: Checkpoint
    forward: Forward
    prompts: list[torch.Tensor]
    expected: list[torch.Tensor]


class Counts(typing.NamedTuple):
    by_layout: int
    by_logits: int
    survivors: list[str]


# --- changes --------------------------------------------------------------------------------------

_FROM_NONE: dict[str, Any] = {
    "clip_qkv": 0.3,
    "window": 3,
    "renorm_floor": 0.0,
    "renorm_eps": 0.0,
    "q_lora_rank": 8,
    "router_norm": 0.5,
    "logit_cap": 1.0,
    "rope": m.Rope(dim=2, theta=100.0),
    "shared": m.Shared(ffn=m.Ffn(intermediate=8)),
    "attention": m.ShortConv(conv_kernel=2),
    "ffn": m.Ffn(intermediate=8),
}


def mutants(record: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path of the field, changed record) for every change of a frozen record."""
    hints = typing.get_type_hints(type(record))
    for field in fields(record):
        old, name = getattr(record, field.name), f"{path}{field.name}"
        if field.name == "blocks":
            continue
        for suffix, new in _changes(name, field.name, old, hints[field.name]):
            yield suffix, replace(record, **{field.name: new})


def _changes(path: str, field: str, old: Any, hint: Any) -> Iterator[tuple[str, Any]]:
    if old is None:
        yield f"{path} = {_FROM_NONE[field]}", _FROM_NONE[field]
        return
    if type(None) in typing.get_args(hint):
        yield f"{path} = None", None
    if is_dataclass(old):
        yield from mutants(old, f"{path}.")
        for sibling in _siblings(old):
            yield f"{path} = {sibling}", sibling
        return
    for new in _values(field, old, hint):
        yield f"{path} = {new}", new


def _values(field: str, old: Any, hint: Any) -> list[Any]:
    if typing.get_origin(hint) is Literal:
        return [other for other in typing.get_args(hint) if other != old]
    if isinstance(old, bool):
        return [not old]
    if isinstance(old, int):
        return [old + 2] if field == "dim" else [old * 2 if field == "original_max" else old + 1]
    if isinstance(old, float):
        return [old + 0.01 if "eps" in field else old * 1.1 or 2.0]
    if isinstance(old, tuple):
        return [(old[0] * 1.5, *old[1:]), (*old[:-1], old[-1] * 1.5)]
    assert isinstance(old, str), f"no change is known for {field} = {old!r}"
    return [f"{old}?"]


def _siblings(old: Any) -> list[Any]:
    """The other members of a tagged union, with values as near as they have."""
    groups = getattr(old, "groups", m.NoGroups())
    routings = [
        m.SoftmaxTopK(renorm_floor=None, groups=groups),
        m.SoftmaxTopK(renorm_floor=0.0, groups=groups),
        m.TopKSoftmax(),
        m.SigmoidTopK(renorm_eps=0.0, groups=groups, select_bias=False),
        m.SparseMixer(jitter_eps=0.01),
    ]
    scalings = [
        m.NoScaling(),
        m.LinearScaling(2.0),
        m.YarnScaling(factor=2.0, original_max=16, beta_fast=32.0, beta_slow=1.0,
                      attention_factor=1.0, truncate=True),
        m.Llama3Scaling(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max=16),
        m.ProportionalScaling(pairs=1),
    ]  # fmt: skip
    eps = getattr(old, "eps", 1e-6)
    unions: list[tuple[Any, list[Any]]] = [
        (m.Scaling, scalings),
        (m.Routing, routings),
        (m.Norm, [m.RmsNorm(eps=eps), m.LayerNorm(eps=eps, bias=False)]),
        (
            m.Activation,
            [m.SwiGlu(), m.ClampedSwiGlu(alpha=1.7, limit=7.0), m.GeGlu(), m.ReluSquared()],
        ),
        (m.NoGroups | m.RoutingGroups, [m.NoGroups(), m.RoutingGroups(num=2, kept=1, score="max")]),
    ]
    for union, members in unions:
        if isinstance(old, union):
            return [one for one in members if type(one) is not type(old)]
    return []


def all_mutants(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """Changes of the model, of each kind of block, and of the order of blocks."""
    yield from mutants(spec)
    for i, block in enumerate(spec.blocks):
        if block in spec.blocks[:i]:
            continue
        for path, changed in mutants(block, f"blocks[{i}]."):
            yield (
                path,
                replace(
                    spec, blocks=tuple(changed if one == block else one for one in spec.blocks)
                ),
            )
    for i, (one, two) in enumerate(zip(spec.blocks, spec.blocks[1:], strict=False)):
        if one != two:
            blocks = (*spec.blocks[:i], two, one, *spec.blocks[i + 2 :])
            yield f"blocks[{i}] and [{i + 1}] swapped", replace(spec, blocks=blocks)


# --- goldens --------------------------------------------------------------------------------------


@torch.inference_mode()
def golden(family: str, folder: Path) -> Golden:
    if family in DELTA_CASES:
        model = make_delta_checkpoint(family, folder)
        ids, forward = [torch.arange(70) * 37 % 98 + 3], _delta_logits
    else:
        model = families.make_checkpoint(family, folder, **CHANGES.get(family, {}))
        ids, forward = prompts(), dense_logits
    expected = [model(one[None]).logits[0] for one in ids]
    found = Golden(Checkpoint(folder), forward, ids, expected)
    assert not _differs(found, found.checkpoint), f"{family}: the golden comparison itself fails"
    return found


def _delta_logits(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    cuts = [0, *range(len(ids) - 4, len(ids) + 1)]
    return DeltaModel(checkpoint).run_alone(ids, cuts, prompt=len(ids) - 4)


def _differs(golden: Golden, checkpoint: Checkpoint) -> bool:
    for ids, expected in zip(golden.prompts, golden.expected, strict=True):
        got = golden.forward(checkpoint, ids)
        # not (a <= b): a NaN differs
        if got.shape != expected.shape or not (got - expected).abs().max() <= TOLERANCE:
            return True
    return False


def _same_rotations(one: Spec, two: Spec) -> bool:
    """Whether two specs differ, but in nothing except how equal frequencies are described."""

    def without_ropes(spec: Spec) -> list[Any]:
        kept: list[Any] = [replace(spec, blocks=())]
        for block in spec.blocks:
            attention: Any = block.attention
            rope = getattr(attention, "rope", None)
            if rope is None:
                kept.append(block)
                continue
            turns = [frequencies(rope, long=long) for long in (False, True)]
            described = [(turn_f.tolist(), factor) for turn_f, factor in turns]
            attention = replace(attention, rope=None)
            bound = getattr(rope.scaling, "short", None) and rope.scaling.original_max
            kept.append((replace(block, attention=attention), rope.interleaved, described, bound))
        return kept

    def dims(spec: Spec) -> list[int]:
        ropes = [getattr(block.attention, "rope", None) for block in spec.blocks]
        return [0 if rope is None else rope.dim for rope in ropes]

    return one != two and dims(one) == dims(two) and without_ropes(one) == without_ropes(two)


@torch.inference_mode()
def run(family: str, golden: Golden) -> Counts:
    """Tries all changes. A change that cannot be computed at all has been noticed as well; one of
    rotary settings that changes no frequency is none."""
    by_layout = by_logits = 0
    survivors: list[str] = []
    original = golden.checkpoint
    for path, spec in all_mutants(original.spec):
        if _same_rotations(spec, original.spec):
            continue
        changed = copy.copy(original)
        changed.__dict__.pop("part", None)  # a cache of the original's parts
        changed.spec = spec
        try:
            changed.layout = build_layout(
                spec, original.names, original.infos, head_chunk_bytes=1024
            )
        except (WindlassError, AssertionError, ValueError):
            by_layout += 1
            continue
        try:
            noticed = _differs(golden, changed)
        except (AssertionError, RuntimeError, KeyError, IndexError, ValueError, ZeroDivisionError):
            noticed = True
        if noticed:
            by_logits += 1
        else:
            survivors.append(f"{family} {path}")
    return Counts(by_layout, by_logits, survivors)


def main(chosen: list[str]) -> int:
    torch.set_num_threads(1)
    everything = [*families.CASES, *families.ALIKE, *DELTA_CASES]
    totals, survivors = [0, 0], []
    for family in chosen or everything:
        with tempfile.TemporaryDirectory() as folder:
            counts = run(family, golden(family, Path(folder)))
        print(f"{family:18s} layout {counts.by_layout:3d}  logits {counts.by_logits:3d}  "
              f"survivors {len(counts.survivors)}", flush=True)  # fmt: skip
        totals = [totals[0] + counts.by_layout, totals[1] + counts.by_logits]
        survivors += counts.survivors
    unexplained = [s for s in survivors if not any(re.search(p, s) for p, _ in EXPLAINED)]
    stale = [p for p, _ in EXPLAINED if not any(re.search(p, s) for s in survivors)]
    for survivor in unexplained:
        print(f"unexplained survivor: {survivor}")
    if not chosen:
        for pattern in stale:
            print(f"explains nothing: {pattern}")
    noticed = sum(totals)
    print(f"{noticed + len(survivors)} changes: {totals[0]} noticed by the layout, {totals[1]} by "
          f"the logits, {len(survivors) - len(unexplained)} change no mathematics, "
          f"{len(unexplained)} unexplained")  # fmt: skip
    return 1 if unexplained or (stale and not chosen) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

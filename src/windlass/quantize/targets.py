"""Which tensors of a checkpoint become integers, and what all of them are called afterwards. Knows
names and shapes, no bytes, no torch.

Quantised are the linear maps of attention, dense networks, shared and routed experts. Everything
else is copied: norms, biases, routers and gates, convolutions, embeddings, the head, and tensors
that Windlass does not read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from windlass.checkpoint.layout import ITEM_BYTES
from windlass.checkpoint.safetensors import natural_key
from windlass.errors import ModelError, UsageError
from windlass.ids import Part, WeightKey
from windlass.models.names import Layout, NameMap, Piece, TensorInfo
from windlass.models.spec import ModelSpec
from windlass.quantize.scheme import GROUPS, IntegerScheme

# Canonical names in a block. Gates of the delta rule (`a_proj`, `b_proj`) have few rows and decide
# about much: they stay as they are, like routers, and so does `state_proj` of Mamba-2, which has
# its step sizes.
_LINEAR = re.compile(
    r"(([qkvoz]|gate|in|q_a|q_b|kv_a)_proj|k_up|v_up|shared\.(gate|up|down))\.weight"
)
_NETWORK = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class TargetMatrix:
    """A linear map (N, K) that becomes integers. `source.name` is what it is called afterwards,
    though it may lie in a stack of all experts."""

    source: TensorInfo
    kind: str  # for the report: where it is and what

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.source.shape
        return rows, width


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor that is copied, and why."""

    source: TensorInfo
    why: str
    kind: str = ""  # of a linear map

    @property
    def name(self) -> str:
        return self.source.name


Target = TargetMatrix | Kept


def choose_targets(
    model: tuple[ModelSpec, NameMap, Layout],
    tensors: Mapping[str, TensorInfo],
    scheme: IntegerScheme,
    *,
    experts_only: bool,
) -> list[Target]:
    """Every tensor of the checkpoint, in the order in which they are written.

    Raises ModelError for families whose experts cannot be taken apart, and UsageError where no
    rows of experts fit the groups.
    """
    spec, names, layout = model
    wanted = list(_experts(spec, names, layout, tensors))
    experts = [_fitting(info, f"experts {_leaf(info)}", scheme) for info in wanted]
    if not any(isinstance(target, TargetMatrix) for target in experts):
        raise UsageError(f"{scheme.name}: fits no expert: {misfits(experts, scheme)}")
    stacks = {piece.tensor for key in layout.keys(Part.EXPERT) for piece in layout.parts[key]
              if piece.name in _NETWORK}  # fmt: skip
    uses = _uses(layout)
    rest = (
        _target(info, uses.get(info.name, []), scheme, experts_only=experts_only)
        for info in tensors.values()
        if info.name not in stacks
    )
    return sorted([*experts, *rest], key=lambda target: natural_key(target.name))


def ignored_modules(targets: Iterable[Target], layout: Layout) -> list[str]:
    """compressed-tensors' `ignore`: modules that another program may take for linear maps. The
    head, which may have no tensor of its own, is always among them."""
    tables = {piece.tensor for key in layout.keys(Part.EMBED) for piece in layout.parts[key]}
    found = [
        target.name.removesuffix(".weight")
        for target in targets
        if isinstance(target, Kept)
        and target.name.endswith(".weight")
        and len(target.source.shape) > 1
        and target.name not in tables
    ]
    return found if "lm_head" in found else [*found, "lm_head"]


def misfits(targets: Iterable[Target], scheme: IntegerScheme) -> str | None:
    """What to say of experts that stay as they are; None where all become integers. Programs with
    one kernel for all of an expert's matrices take three integer matrices or none."""
    experts = [target for target in targets if target.kind.startswith("experts ")]
    kept = [target for target in experts if isinstance(target, Kept)]
    if not kept:
        return None
    widths = {target.source.shape[-1] for target in experts}
    others = [f"--group {g}" for g in GROUPS if not any(width % g for width in widths)]
    allowed = " or ".join(others) if others else "int8 without --group"
    return f"{kept[0].name}: {kept[0].why}; {allowed} fits all"


# --- experts --------------------------------------------------------------------------------------


def _experts(
    spec: ModelSpec, names: NameMap, layout: Layout, tensors: Mapping[str, TensorInfo]
) -> Iterator[TensorInfo]:
    """Each matrix of each expert under a name of its own, as compressed-tensors wants it."""
    prefix = _trunk_prefix(names, layout)
    for key in layout.keys(Part.EXPERT):
        for piece in layout.parts[key]:
            if piece.name not in _NETWORK:
                continue
            name = _own_name(names, piece, prefix, key)
            if name is None or piece.ops or len(piece.shape) != 2:
                raise ModelError(
                    f"{spec.family}: experts are stacked in one tensor ({piece.tensor}), which has"
                    " no form in compressed-tensors; allowed are families whose experts have names"
                    " of their own, such as mixtral, qwen3_moe, olmoe, deepseek_v3"
                )
            stored = tensors[piece.tensor]
            item = ITEM_BYTES[stored.dtype]
            begin, end = (stored.begin + item * at for at in (piece.start, piece.stop))
            yield replace(stored, name=name, shape=piece.shape, begin=begin, end=end)


def _own_name(names: NameMap, piece: Piece, prefix: str, key: WeightKey) -> str | None:
    """What the tensor of a single expert is called; None where the family has no such name."""
    for source in names.expert[piece.name]:
        if source.stacked == "no" and not source.ops:
            return source.name.format(model=prefix, layer=key.layer, expert=key.index)
    return None


def _trunk_prefix(names: NameMap, layout: Layout) -> str:
    table = layout.parts[WeightKey(Part.EMBED)][0].tensor
    return next(
        prefix
        for prefix in names.prefixes
        for source in names.embed["weight"]
        if source.name.format(model=prefix) == table
    )


# --- everything else ------------------------------------------------------------------------------


def _uses(layout: Layout) -> dict[str, list[tuple[Part, str]]]:
    """Tensor on disk -> which canonical tensors are in it."""
    uses: dict[str, list[tuple[Part, str]]] = {}
    for key, pieces in layout.parts.items():
        for piece in pieces:
            found = uses.setdefault(piece.tensor, [])
            if (key.part, piece.name) not in found:
                found.append((key.part, piece.name))
    return uses


def _target(
    info: TensorInfo, uses: list[tuple[Part, str]], scheme: IntegerScheme, *, experts_only: bool
) -> Target:
    if not uses:
        return Kept(info, "not read by Windlass")
    parts = {part for part, _ in uses}
    if parts & {Part.EMBED, Part.HEAD, Part.FINAL}:
        return Kept(info, "embedding, head or last norm")
    if len(info.shape) != 2 or not all(_is_linear(part, name) for part, name in uses):
        return Kept(info, "no linear map, or a router or gate")
    if experts_only:
        return Kept(info, "not a routed expert")
    assert info.name.endswith(".weight"), f"{info.name} is no module's weight"
    return _fitting(info, f"{_place(uses)} {_leaf(info)}", scheme)


def _fitting(info: TensorInfo, kind: str, scheme: IntegerScheme) -> Target:
    """A matrix, unless its rows cannot be cut into groups."""
    refusal = scheme.refusal(info.shape[1])
    return TargetMatrix(info, kind) if refusal is None else Kept(info, refusal, kind)


def _leaf(info: TensorInfo) -> str:
    return info.name.removesuffix(".weight").rpartition(".")[2]


def _is_linear(part: Part, name: str) -> bool:
    if part is Part.FFN:
        return name in _NETWORK
    return part is Part.BLOCK and _LINEAR.fullmatch(name) is not None


def _place(uses: list[tuple[Part, str]]) -> str:
    if uses[0][0] is Part.FFN:
        return "dense"
    return "shared" if uses[0][1].startswith("shared.") else "attention"

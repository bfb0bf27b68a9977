"""Kinds of weights, as hardware profiles call them: what decides how fast they are multiplied."""

from collections import Counter
from collections.abc import Mapping
from math import prod

from windlass.ids import Part
from windlass.models.names import Layout, TensorInfo

_PLAIN = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def weight_kinds(layout: Layout, tensors: Mapping[str, TensorInfo]) -> dict[Part, str]:
    """How most elements of each part's matrices are stored."""
    counts: dict[Part, Counter[str]] = {}
    for key, pieces in layout.parts.items():
        own = counts.setdefault(key.part, Counter())
        for piece in pieces:
            if piece.packed is None:
                own[_PLAIN[tensors[piece.tensor].dtype]] += prod(piece.shape)
            elif piece.role == "codes":
                own[piece.packed.format.kind] += prod(piece.packed.shape)
    return {part: own.most_common(1)[0][0] for part, own in counts.items()}

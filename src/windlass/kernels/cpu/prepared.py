"""A part's matrices as structures of the library, made once for as long as the part stays in its
slot."""

import ctypes as c
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch

from windlass.kernels.cpu import library as lib
from windlass.kernels.cpu.matrices import floats, matrices_of
from windlass.models.spec import RoutingGroups, SigmoidTopK, SoftmaxTopK, TopKSoftmax
from windlass.tensors import StoredTensors, Tensors, Weight, plain_or_none

_FFN = ("gate", "up", "down")  # without a gate where the activation has none


class Linears:
    """Matrices that meet the same rows, as structures, and what those point to."""

    __slots__ = ("products", "places", "widths", "has_copies", "_kept")

    def __init__(self, parts: Sequence[tuple[Weight, torch.Tensor | None]]) -> None:
        self.widths: list[int] = []  # of each result
        self.places: list[tuple[int, int]] = []  # of each product: its result, first column
        self.has_copies = False  # beside the stored weights
        self._kept: list[object] = []
        products = []
        for index, (w, bias_E) in enumerate(parts):
            bias = None if bias_E is None else floats(bias_E)
            matrices = matrices_of(w)
            width = sum(m.n for m in matrices)
            column = 0
            for m in matrices:
                start = None if bias is None else bias.data_ptr() + 4 * column
                products.append(lib.Product(w=c.pointer(m), bias=start))
                self.places.append((index, column))
                self.has_copies |= m.copy is not None
                column += m.n
            self.widths.append(width)
            self._kept.append((matrices, bias))
        self.products = (lib.Product * len(products))(*products)


class Network:
    """The matrices of one expert or dense network as a structure, and what it points to."""

    __slots__ = ("struct", "address", "has_copies", "_kept")

    def __init__(self, w: Tensors) -> None:
        matrices = [_single(w[name]) if name in w else None for name in _FFN]
        stored = [plain_or_none(w, f"{name}_bias") for name in _FFN]
        biases = [None if b is None else floats(b) for b in stored]
        self._kept = (matrices, biases)
        self.has_copies = any(m is not None and m.copy is not None for m in matrices)
        self.struct = lib.Expert(
            *(None if m is None else c.pointer(m) for m in matrices),
            *(None if b is None else b.data_ptr() for b in biases),
        )
        self.address = c.addressof(self.struct)


def _single(w: Weight) -> lib.Matrix:
    (matrix,) = matrices_of(w)
    return matrix


def network_of(w: Tensors) -> Network:
    return prepared(w, "network", lambda: Network(w))


_Made = TypeVar("_Made", Linears, Network)


def prepared(w: Tensors, key: object, make: Callable[[], _Made]) -> _Made:
    """What is derived from a part: kept for as long as its tensors stay in their slot, unless it
    has copies of them, which no slot is planned for."""
    if not isinstance(w, StoredTensors):
        return make()
    found = cast("_Made | None", w.prepared.get(key))
    if found is None:
        found = make()
        if not found.has_copies:
            w.prepared[key] = found
    return found


def routing_of(
    routing: SoftmaxTopK | TopKSoftmax | SigmoidTopK, top_k: int, bias_E: torch.Tensor | None
) -> lib.Routing:
    """`bias_E` must live as long as the structure."""
    if isinstance(routing, TopKSoftmax):
        return lib.Routing(score=lib.SCORES["logits"], scale=1.0, top_k=top_k)
    found = lib.Routing(
        scale=routing.scale, top_k=top_k, bias=None if bias_E is None else bias_E.data_ptr()
    )
    if isinstance(routing, SigmoidTopK):
        found.score = lib.SCORES["sigmoid"]
        if routing.renorm_eps is not None:
            found.norm, found.norm_by = lib.NORMS["plus"], routing.renorm_eps
    elif routing.renorm_floor is not None:
        found.norm = lib.NORMS["sum" if routing.renorm_order == 1 else "euclid"]
        found.norm_by = routing.renorm_floor
    if isinstance(routing.groups, RoutingGroups):
        found.num_groups, found.kept_groups = routing.groups.num, routing.groups.kept
        found.rank_by_two = routing.groups.score == "top2_sum"
    return found

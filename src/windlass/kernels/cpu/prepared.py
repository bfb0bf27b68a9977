"""A part's matrices as structures of the library, made once for as long as the part stays in its
slot."""

import ctypes as c
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from windlass.kernels.cpu import library as lib
from windlass.kernels.cpu.matrices import floats, matrices_of
from windlass.kernels.interface import CapturedExperts
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


_Words = c.c_int64 * (c.sizeof(lib.Network) // 8)
_MATRICES = lib.Network.matrices.offset // 8  # the word that they begin with
_MATRIX = c.sizeof(lib.Matrix) // 8
_POINTERS = [
    getattr(lib.Matrix, name).offset // 8 for name in ("codes", "scales", "zeros", "groups")
]


class Network:
    """The matrices of one expert or dense network as a structure, and what it points to."""

    __slots__ = ("address", "width", "has_copies", "is_plain", "_words", "_outside", "_kept")

    def __init__(self, w: Tensors) -> None:
        matrices = [_single(w[name]) if name in w else None for name in _FFN]
        stored = [plain_or_none(w, f"{name}_bias") for name in _FFN]
        biases = [None if b is None else floats(b) for b in stored]
        self._kept: object = (matrices, biases)
        self.has_copies = any(m is not None and m.copy is not None for m in matrices)
        self.is_plain = not self.has_copies and all(b is None for b in biases)
        self._words = _Words()
        self.address = c.addressof(self._words)
        self._outside: list[int] = []  # words that point to what is stored
        self.width = 0
        for i, (m, bias) in enumerate(zip(matrices, biases, strict=True)):
            self._words[3 + i] = 0 if bias is None else bias.data_ptr()
            if m is None:
                continue
            at = _MATRICES + i * _MATRIX
            self._words[i] = self.address + 8 * at
            c.memmove(self.address + 8 * at, c.addressof(m), 8 * _MATRIX)
            self._outside += [at + word for word in _POINTERS if self._words[at + word]]
            self.width = m.n  # of the last

    @property
    def struct(self) -> lib.Expert:
        return lib.Expert.from_buffer(self._words)

    def moved(self, num_bytes: int) -> "Network":
        """See `Pointers.moved`."""
        assert self.is_plain, "a copy does not lie where the matrix does"
        new = Network.__new__(Network)
        words = new._words = _Words.from_buffer_copy(self._words)
        address = new.address = c.addressof(words)
        for i in (0, 1, 2):
            if words[i]:
                words[i] += address - self.address
        for i in self._outside:
            words[i] += num_bytes
        new._outside, new._kept, new.width = self._outside, None, self.width
        new.is_plain, new.has_copies = True, False
        return new


def _single(w: Weight) -> lib.Matrix:
    (matrix,) = matrices_of(w)
    return matrix


def network_of(w: Tensors) -> Network:
    """Made once for as long as the part stays in its slot, and there of that of a part that is laid
    out alike."""
    if not isinstance(w, StoredTensors):
        return Network(w)
    found: Network | None = w.prepared.get("network")  # type: ignore[assignment]  # of this key
    if found is None:
        found = w.pointers("network", lambda: Network(w))
        if not found.has_copies:
            w.prepared["network"] = found
    return found


class NativeExperts(CapturedExperts):
    """Implements `CapturedExperts`: the table that calls of experts take."""

    def __init__(self, num_experts: int) -> None:
        self.table = (c.c_void_p * num_experts)()
        self._held: Mapping[int, Tensors] = {}
        self._networks: list[Network] = []

    def hold(self, experts: Mapping[int, Tensors]) -> None:
        table = self.table
        for expert in self._held:
            table[expert] = None
        self._held = experts
        self._networks = [network_of(w) for w in experts.values()]
        for expert, network in zip(experts, self._networks, strict=True):
            table[expert] = network.address

    @property
    def has_copies(self) -> bool:
        return any(network.has_copies for network in self._networks)

    def __getitem__(self, expert: int) -> Tensors:
        return self._held[expert]

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def prepared(w: Tensors, key: object, make: Callable[[], Linears]) -> Linears:
    """What is derived from a part: kept for as long as its tensors stay in their slot, unless it
    has copies of them, which no slot is planned for."""
    if not isinstance(w, StoredTensors):
        return make()
    found: Linears | None = w.prepared.get(key)  # type: ignore[assignment]  # of this key
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

"""Random experts in slots of an arena, in every format, and what they compute, in fp64."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from windlass.formats import WeightFormat
from windlass.kernels.dequantise import dequantise
from windlass.kernels.interface import ExpertGroups
from windlass.kernels.reference import gelu
from windlass.kernels.triton.launch import ExpertSlots
from windlass.models.spec import Activation, ClampedSwiGlu, GeGlu, ReluSquared, SwiGlu
from windlass.tensors import Packed, Tensors, Weight, plain_or_none
from windlass.units import round_up

SWIGLU = SwiGlu()
ALIGNMENT = 256  # bytes; of every tensor in a device's slot
Make = Callable[[int, int], Weight]


def plain(dtype: torch.dtype, *, is_transposed: bool = False, every: int = 1) -> Make:
    """Weights (n, k). `every`: they are columns or rows of a fused matrix, interleaved."""

    def make(n: int, k: int) -> torch.Tensor:
        fused = (torch.randn(every * n, k) / k**0.5).to(dtype)
        return (fused.t().contiguous().t() if is_transposed else fused)[::every]

    return make


def packed(form: WeightFormat, scale_type: torch.dtype = torch.bfloat16) -> Make:
    """A matrix (n, k) of random codes, scales and zero points."""
    bits = 4 if form.code in ("int4", "e2m1") else 8
    per_word = 32 // bits
    # a code's size, as the fourth root of its mean square
    size = {"int4": 6.5, "int8": 104.0, "e4m3": 110.0, "e2m1": 2.6}[form.code]

    def make(n: int, k: int) -> Packed:
        blocks_n = -(-n // form.rows) if form.rows else 1
        blocks_k = -(-k // form.columns) if form.columns else 1
        if form.packing == "rows":
            codes = _bytes(n, -(-k * bits // 8))
            if form.code == "e4m3":
                codes = torch.where(codes & 0x7F == 0x7F, codes - 1, codes)  # no NaN
        else:
            shape = (k // per_word, n) if form.packing == "gptq" else (k, n // 8)
            codes = _words(*shape)
        scales = ((0.5 + torch.rand(blocks_n, blocks_k)) / size / k**0.5).to(
            torch.float32 if scale_type == torch.uint8 else scale_type
        )
        if scale_type == torch.uint8:
            scales = (scales.log2().round() + 127).to(torch.uint8)
        if form.packing != "rows":
            scales = scales.t().contiguous().t()
        zeros = {
            "none": lambda: None,
            "rows": lambda: _words(-(-n // per_word), blocks_k),
            "gptq": lambda: _words(blocks_k, n // per_word),
            "awq": lambda: _words(blocks_k, n // 8),
        }[form.zero]()
        groups = torch.randint(blocks_k, (k,), dtype=torch.int32) if form.has_groups else None
        return Packed(form, (n, k), codes, scales, zeros, groups)

    return make


FORMATS: dict[str, Make] = {
    "bf16": plain(torch.bfloat16),
    "int4 g128": packed(WeightFormat(code="int4", columns=128)),
    "int4 g32 zeros": packed(WeightFormat(code="int4", columns=32, zero="rows")),
    "int8 rows": packed(WeightFormat(code="int8")),
    "fp8 128x128": packed(WeightFormat(code="e4m3", rows=128, columns=128), torch.float32),
    "mxfp4": packed(WeightFormat(code="e2m1", columns=32), torch.uint8),
    "gptq int4 g128": packed(
        WeightFormat(code="int4", packing="gptq", columns=128, zero="gptq", zero_add=1),
        torch.float16,
    ),
    "awq int4 g128": packed(
        WeightFormat(code="int4", packing="awq", columns=128, zero="awq"), torch.float16
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Experts of a layer, each in a slot of an arena whose other bytes are 0xFF (NaN)."""

    arena: torch.Tensor
    slot_bytes: int
    slots_E: torch.Tensor  # int32
    experts: Mapping[int, Tensors]  # views of the slots
    activation: Activation

    def experts_for(self, compute: torch.dtype) -> ExpertSlots:
        return ExpertSlots.of(
            self.arena, self.slot_bytes, int(self.slots_E[0]), self.experts[0], self.activation,
            compute,
        )  # fmt: skip

    def reference(self, x_TD: torch.Tensor, groups: ExpertGroups) -> torch.Tensor:
        """Outputs by place, in fp64."""
        out_PD = x_TD.new_empty(len(groups.order), x_TD.shape[1], dtype=torch.float64)
        parts = zip(groups.rows.split(counts := groups.counts_E.tolist()),
                    groups.order.split(counts), strict=True)  # fmt: skip
        for expert, (rows, places) in enumerate(parts):
            if len(rows):
                out_PD[places] = expert_ffn(
                    x_TD[rows].double(), self.experts[expert], self.activation
                )
        return out_PD


class Sizes(NamedTuple):
    """Of a layer; `spare` slots are empty."""

    experts: int
    hidden: int
    inner: int
    spare: int = 3


def make_layer(
    make: Make, sizes: Sizes, *, activation: Activation = SWIGLU, has_biases: bool = False
) -> Layer:
    """`make`: a matrix of so many rows and columns. The slots are shuffled."""
    experts, hidden, inner, spare = sizes
    matrices = {"up": (inner, hidden), "down": (hidden, inner)}
    if not isinstance(activation, ReluSquared):
        matrices = {"gate": (inner, hidden)} | matrices
    biases = {f"{name}_bias": n for name, (n, _) in matrices.items() if has_biases}
    made: list[dict[str, Weight]] = []
    for _ in range(experts):
        tensors: dict[str, Weight] = {name: make(n, k) for name, (n, k) in matrices.items()}
        made.append(tensors | {name: torch.randn(n).bfloat16() for name, n in biases.items()})
    slot_bytes = round_up(sum(_room(w) for w in made[0].values()), 4096)
    arena = torch.full(((experts + spare) * slot_bytes,), 0xFF, dtype=torch.uint8)
    slots_E = torch.randperm(experts + spare)[:experts].int()
    placed: dict[int, Tensors] = {}
    for expert, tensors in enumerate(made):
        cursor = _Cursor(arena, int(slots_E[expert]) * slot_bytes)
        placed[expert] = {name: cursor.weight(w) for name, w in tensors.items()}
    return Layer(
        arena=arena, slot_bytes=slot_bytes, slots_E=slots_E, experts=placed, activation=activation
    )


def expert_ffn(x_ND: torch.Tensor, w: Tensors, activation: Activation) -> torch.Tensor:
    """`Kernels.expert_ffn`, in the type of x."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = w[name]
        if isinstance(weight, Packed):
            weight = dequantise(weight, 0, weight.shape[0])
        assert isinstance(weight, torch.Tensor)
        bias = plain_or_none(w, f"{name}_bias")
        return x @ weight.to(x.dtype).t() + (0 if bias is None else bias.to(x.dtype))

    up = linear(x_ND, "up")
    if isinstance(activation, ReluSquared):
        return linear(up.relu().square(), "down")
    gate = linear(x_ND, "gate")
    if isinstance(activation, ClampedSwiGlu):
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
        return linear((up + 1) * gate * torch.sigmoid(activation.alpha * gate), "down")
    function = gelu if isinstance(activation, GeGlu) else torch.nn.functional.silu
    return linear(function(gate) * up, "down")


class _Cursor:
    """Places tensors one behind the other, with the strides that they have."""

    def __init__(self, arena: torch.Tensor, at: int) -> None:
        self._arena, self._at = arena, at

    def weight(self, w: Weight) -> Weight:
        if isinstance(w, torch.Tensor):
            return self._tensor(w)
        assert isinstance(w, Packed)
        return Packed(
            w.format,
            w.shape,
            self._tensor(w.codes),
            self._tensor(w.scales),
            None if w.zeros is None else self._tensor(w.zeros),
            None if w.groups is None else self._tensor(w.groups),
        )

    def _tensor(self, t: torch.Tensor) -> torch.Tensor:
        here = self._arena[self._at : self._at + _extent(t)].view(t.dtype)
        self._at += round_up(_extent(t), ALIGNMENT)
        return here.as_strided(t.shape, t.stride()).copy_(t)


def _room(w: Weight) -> int:
    parts = (w.codes, w.scales, w.zeros, w.groups) if isinstance(w, Packed) else (w,)
    return sum(round_up(_extent(t), ALIGNMENT) for t in parts if isinstance(t, torch.Tensor))


def _extent(t: torch.Tensor) -> int:
    """Bytes from the first element to the last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.itemsize


def _bytes(n: int, k: int) -> torch.Tensor:
    return torch.randint(256, (n, k), dtype=torch.uint8)


def _words(n: int, k: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (n, k)).int()

"""Launches of experts.py: which tiles, which grids."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from windlass.kernels.interface import ExpertGroups
from windlass.kernels.triton import experts as kernels
from windlass.kernels.triton.matrix import Matrix, Vector, block_columns, matrix_at, vector_at
from windlass.models.spec import Activation, ClampedSwiGlu, GeGlu, ReluSquared, SwiGlu
from windlass.tensors import Packed, Tensors, plain_or_none

_ACTIVATIONS = {SwiGlu: "silu", GeGlu: "gelu", ReluSquared: "relu2"}
_PLANNED = 16  # tiles that one program plans
_COMBINED = 512  # columns of a program that combines
_ACTIVATED = 1024  # numbers of a program that activates
_MOST_TILES = 65535  # of a grid's second dimension


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """`rows` x `features` results by blocks of `columns` weights of a row. All but `rows` decide
    the order of sums, so they are fixed for an architecture and a format."""

    rows: int = 16
    features: int = 64
    columns: int = 64
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSlots:
    """The experts of a layer: slots of `slot_bytes` in `arena` (uint8), laid out alike."""

    arena: torch.Tensor
    slot_bytes: int
    gate: Matrix  # that of `up` where the activation has none
    up: Matrix
    down: Matrix
    gate_bias: Vector
    up_bias: Vector
    down_bias: Vector
    hidden: int  # D
    intermediate: int  # I
    activation: Activation

    @classmethod
    def of(
        cls, arena: torch.Tensor, slot_bytes: int, index: int, tensors: Tensors,
        activation: Activation, compute: torch.dtype,
    ) -> "ExpertSlots":  # fmt: skip
        """As the tensors of the expert in slot `index` lie. `compute`: the type of rows that will
        be multiplied."""
        slot = arena.data_ptr() + index * slot_bytes
        up, down = tensors["up"], tensors["down"]
        gate = tensors.get("gate", up)
        kinds = {w.format if isinstance(w, Packed) else None for w in (gate, up)}
        assert len(kinds) == 1, f"gate and up: stored in two formats: {kinds}"
        bias = [plain_or_none(tensors, f"{name}_bias") for name in ("gate", "up", "down")]
        return cls(
            arena=arena,
            slot_bytes=slot_bytes,
            gate=matrix_at(gate, slot, compute),
            up=matrix_at(up, slot, compute),
            down=matrix_at(down, slot, compute),
            gate_bias=vector_at(bias[0], slot),
            up_bias=vector_at(bias[1], slot),
            down_bias=vector_at(bias[2], slot),
            hidden=down.shape[0],
            intermediate=down.shape[1],
            activation=activation,
        )

    def moved(self, num_bytes: int) -> "ExpertSlots":
        """As tensors lie that are so many bytes further on in their slot."""
        return replace(
            self,
            gate=self.gate.moved(num_bytes),
            up=self.up.moved(num_bytes),
            down=self.down.moved(num_bytes),
            gate_bias=self.gate_bias.moved(num_bytes),
            up_bias=self.up_bias.moved(num_bytes),
            down_bias=self.down_bias.moved(num_bytes),
        )


def _activation_args(kind: Activation) -> tuple[float, float, str]:
    """alpha, limit, name."""
    if isinstance(kind, ClampedSwiGlu):
        return kind.alpha, kind.limit, "clamped"
    return 1.0, 0.0, _ACTIVATIONS[type(kind)]


def activate(gate_NI: torch.Tensor, up_NI: torch.Tensor, kind: Activation) -> torch.Tensor:
    """What a network makes of them, all contiguous and fp32; `gate_NI` is not read where the
    activation has none."""
    out_NI, size = torch.empty_like(up_NI), up_NI.numel()
    alpha, limit, name = _activation_args(kind)
    kernels.activate_rows[(triton.cdiv(size, _ACTIVATED),)](
        gate_NI, up_NI, out_NI, size, alpha, limit, ACTIVATION=name, BN=_ACTIVATED
    )
    return out_NI


def run_experts(
    x_TD: torch.Tensor, groups: ExpertGroups, slots_E: torch.Tensor, experts: ExpertSlots,
    out_PD: torch.Tensor, tile: Tile,
) -> None:  # fmt: skip
    """Writes the outputs of all places whose experts have a slot (`slots_E`, int32; -1: none) to
    their places of `out_PD` (fp32)."""
    assert x_TD.is_contiguous() and out_PD.is_contiguous(), "rows that are not contiguous"
    num_places, num_experts = len(groups.order), len(slots_E)
    most = -(-num_places // tile.rows) + min(num_experts, num_places)
    assert most <= _MOST_TILES, f"places of a launch: got {num_places}, which are {most} tiles"
    tiles_3M = torch.empty(3, most, dtype=torch.int32, device=x_TD.device)
    kernels.plan_tiles[(triton.cdiv(most, _PLANNED),)](
        groups.counts_E, tiles_3M, num_experts, most,
        BM=tile.rows, BE=triton.next_power_of_2(num_experts), BT=_PLANNED,
    )  # fmt: skip
    e, inner = experts, experts.intermediate
    hidden_PI = torch.empty(num_places, inner, dtype=x_TD.dtype, device=x_TD.device)
    alpha, limit, name = _activation_args(e.activation)
    common = dict(BM=tile.rows, BN=tile.features, num_warps=tile.warps, num_stages=tile.stages)
    kernels.gate_up[(triton.cdiv(inner, tile.features), most)](
        x_TD, groups.rows, tiles_3M, most, slots_E, e.arena, e.slot_bytes, e.gate, e.up,
        e.gate_bias, e.up_bias, hidden_PI, inner, e.hidden, alpha, limit, ACTIVATION=name,
        **_columns(block_columns(e.up, tile.columns), e.hidden), **common,
    )  # fmt: skip
    kernels.down[(triton.cdiv(e.hidden, tile.features), most)](
        hidden_PI, groups.order, tiles_3M, most, slots_E, e.arena, e.slot_bytes, e.down,
        e.down_bias, out_PD, e.hidden, inner,
        **_columns(block_columns(e.down, tile.columns), inner), **common,
    )  # fmt: skip


def run_experts_few(
    x_TD: torch.Tensor, ids_TA: torch.Tensor, slots_E: torch.Tensor, experts: ExpertSlots,
    out_PD: torch.Tensor, tile: Tile,
) -> None:  # fmt: skip
    """The same for few rows, without sorting them; other sums, so other bits."""
    assert x_TD.is_contiguous() and out_PD.is_contiguous(), "rows that are not contiguous"
    e, inner, num_places = experts, experts.intermediate, ids_TA.numel()
    hidden_PI = torch.empty(num_places, inner, dtype=torch.float32, device=x_TD.device)
    alpha, limit, name = _activation_args(e.activation)
    common = dict(BN=tile.features, num_warps=tile.warps, num_stages=tile.stages)
    kernels.gate_up_few[(triton.cdiv(inner, tile.features), num_places)](
        x_TD, ids_TA, slots_E, e.arena, e.slot_bytes, e.gate, e.up, e.gate_bias, e.up_bias,
        hidden_PI, inner, e.hidden, alpha, limit, ids_TA.shape[1], ACTIVATION=name,
        **_columns(tile.columns, e.hidden), **common,
    )  # fmt: skip
    kernels.down_few[(triton.cdiv(e.hidden, tile.features), num_places)](
        hidden_PI, ids_TA, slots_E, e.arena, e.slot_bytes, e.down, e.down_bias, out_PD,
        e.hidden, inner, **_columns(tile.columns, inner), **common,
    )  # fmt: skip


def combine(
    out_PD: torch.Tensor, weights_TA: torch.Tensor, shared_TD: torch.Tensor | None,
    hidden_TD: torch.Tensor, multiplier: float,
) -> None:  # fmt: skip
    """`Kernels.combine`, of outputs by place."""
    rows, width = hidden_TD.shape
    kernels.combine[(rows, triton.cdiv(width, _COMBINED))](
        out_PD, weights_TA, hidden_TD if shared_TD is None else shared_TD, hidden_TD, width,
        float(multiplier), A=weights_TA.shape[1], HAS_SHARED=shared_TD is not None, BD=_COMBINED,
    )  # fmt: skip


def _columns(columns: int, of: int) -> dict[str, Any]:
    return {"BK": columns, "EVEN": of % columns == 0}

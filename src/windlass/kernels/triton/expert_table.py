"""Where the experts are that a runtime has leased: from their tensors to slots of an arena."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from windlass.kernels.cuda_graphs import SlotTable
from windlass.kernels.interface import ExpertGroups, RoutedIds
from windlass.kernels.triton.launch import ExpertSlots, run_experts, run_experts_few
from windlass.kernels.triton.matrix import SLOT_BYTES, memory_of, tensors_of
from windlass.kernels.triton.tiles import expert_tile, few_tile
from windlass.models.spec import Activation
from windlass.tensors import StoredTensors, Tensors


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Implements `Pointers`: where an expert lies, `slot` times SLOT_BYTES from the beginning of
    the arena of `slots`. One launch has all experts of one `layout`."""

    slots: ExpertSlots
    slot: int
    layout: tuple[int, str]

    @classmethod
    def of(cls, slots: ExpertSlots, slot: int) -> "_Place":
        matrices = slots.gate, slots.up, slots.down
        biases = slots.gate_bias, slots.up_bias, slots.down_bias
        return cls(slots, slot, (slots.arena.data_ptr(), repr((matrices, biases))))

    @property
    def is_plain(self) -> bool:
        return True

    def moved(self, num_bytes: int) -> "_Place":
        further, rest = divmod(num_bytes, SLOT_BYTES)
        if rest:  # as files have it; never in slots of a device
            return _Place.of(self.slots.moved(rest), self.slot + further)
        return replace(self, slot=self.slot + further)


def grouped_experts(
    x_TD: torch.Tensor,
    experts: Mapping[int, Tensors],
    groups: ExpertGroups,
    activation: Activation,
    out: torch.Tensor,
    table: Callable[[Sequence[int]], torch.Tensor],
) -> None:
    """See `Kernels.experts`; `x_TD` is contiguous and of the type that is multiplied in. `table`:
    int32 where kernels read them."""
    num_experts = len(groups.counts_E)
    rows = 16 if len(groups.order) <= 16 * num_experts else 32
    for slots, slots_E in _launches(experts, num_experts, (activation, x_TD.dtype), table):
        tile = expert_tile(slots, x_TD.dtype, rows=rows)
        run_experts(x_TD, groups, slots_E, slots, out, tile)


def experts_by_row(
    x_TD: torch.Tensor,
    experts: Mapping[int, Tensors],
    routed: RoutedIds,
    activation: Activation,
    out: torch.Tensor,
    table: Callable[[Sequence[int]], torch.Tensor],
) -> None:
    """See `Kernels.experts_by_row`; else as `grouped_experts`. Weights meet each row in fp32."""
    kind = activation, torch.float32
    for slots, slots_E in _launches(experts, routed.num_experts, kind, table):
        run_experts_few(x_TD, routed.ids_TA, slots_E, slots, out, few_tile())


def _launches(
    experts: Mapping[int, Tensors],
    num_experts: int,
    kind: tuple[Activation, torch.dtype],
    table: Callable[[Sequence[int]], torch.Tensor],
) -> list[tuple[ExpertSlots, torch.Tensor]]:
    """Where they lie, and the slot of each. Experts that lie alike in one arena, as those of a
    device do, are one launch. `kind`: what is computed, in which type."""

    def find(w: Tensors) -> _Place:
        return _place(w, *kind)

    first = experts.found(find) if isinstance(experts, SlotTable) else None
    if first is not None:
        assert isinstance(experts, SlotTable)
        return [(first.slots, experts.slots_E)]
    alike: dict[tuple[int, str], tuple[ExpertSlots, list[int]]] = {}
    for expert, w in experts.items():
        place = find(w)
        launch = alike.setdefault(place.layout, (place.slots, [-1] * num_experts))
        launch[1][expert] = place.slot
    return [(slots, table(numbers)) for slots, numbers in alike.values()]


def _place(w: Tensors, activation: Activation, compute: torch.dtype) -> _Place:
    """Looked up once for as long as the expert stays in its slot."""
    if not isinstance(w, StoredTensors):
        return _found(w, activation, compute)
    key = "experts", activation, compute
    place = w.prepared.get(key)
    if place is None:
        place = w.prepared[key] = w.pointers(key, lambda: _found(w, activation, compute))
    assert isinstance(place, _Place), "kept as something else"
    return place


def _found(w: Tensors, activation: Activation, compute: torch.dtype) -> _Place:
    memory = memory_of([tensor for weight in w.values() for tensor in tensors_of(weight)])
    slot = memory.storage_offset() // SLOT_BYTES
    arena = memory.as_strided((slot * SLOT_BYTES + len(memory),), (1,), 0)
    return _Place.of(ExpertSlots.of(arena, SLOT_BYTES, slot, w, activation, compute), slot)

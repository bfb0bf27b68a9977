"""Torch's kernels as those of a device that keeps graphs: nothing is decided by what tensors
contain, experts are found by their slots, and rows by tables that do not move."""

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from windlass.kernels.cuda_graphs import CudaCapture, GraphCaptures, RowTables, SlotTable
from windlass.kernels.interface import AttentionOptions, AttentionWork, ExpertGroups
from windlass.kernels.reference import TorchKernels
from windlass.models.spec import Activation
from windlass.tensors import PagedRows, Tensors

_SLOT = 256


class _Place(NamedTuple):
    """Of an expert of plain matrices."""

    layout: Hashable
    slot: int
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, w: Tensors) -> "_Place":
        tensors = {name: one for name, one in w.items() if isinstance(one, torch.Tensor)}
        start = next(iter(tensors.values())).untyped_storage().data_ptr()
        ats = {name: one.data_ptr() - start for name, one in tensors.items()}
        first = min(ats.values())
        layout = start, *((name, at - first) for name, at in sorted(ats.items()))
        return cls(layout, first // _SLOT, tensors)

    def moved(self, slot: int) -> Tensors:
        """As it would lie in another slot."""
        further = (slot - self.slot) * _SLOT
        return {
            name: one.as_strided(
                one.shape, one.stride(), one.storage_offset() + further // one.element_size()
            )
            for name, one in self.tensors.items()
        }


class GraphKernels(TorchKernels):
    """Implements `Kernels`. `launch` calls a kernel (`FakeGraphs.launch`), `unseen`: the device
    does not look at what it does, which reads of an arena only its slots."""

    def __init__(
        self,
        captures: GraphCaptures,
        launch: Callable[..., None],
        unseen: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        self._captures = captures
        self._launch = launch
        self._unseen = unseen

    def capture(self, label: Callable[[], str]) -> CudaCapture:
        return self._captures.new()

    def group(self, ids_TA: torch.Tensor, num_experts: int) -> ExpertGroups:
        ids_P = ids_TA.flatten()
        order = torch.argsort(ids_P, stable=True)
        counts_E = ids_P.new_zeros(num_experts).scatter_add_(0, ids_P, torch.ones_like(ids_P))
        return ExpertGroups(order, order // ids_TA.shape[1], counts_E)

    def experts(
        self,
        x_TD: torch.Tensor,
        experts: Mapping[int, Tensors],
        groups: ExpertGroups,
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        first = experts.found(_Place.of) if isinstance(experts, SlotTable) else None
        if isinstance(experts, SlotTable) and first is not None:
            slots_E = experts.slots_E
        else:
            places = {expert: _Place.of(w) for expert, w in experts.items()}
            first = next(iter(places.values()))
            slots = [-1] * len(groups.counts_E)
            for expert, place in places.items():
                assert place.layout == first.layout, "experts that lie otherwise"
                slots[expert] = place.slot
            slots_E = self._captures.tensor(slots)

        def kernel(x_TD: torch.Tensor, slots_E: torch.Tensor, *rest: torch.Tensor) -> None:
            *of_groups, out = rest
            with self._unseen():
                slots = slots_E.tolist()
                here = {e: first.moved(slot) for e, slot in enumerate(slots) if slot >= 0}
                super(GraphKernels, self).experts(
                    x_TD, here, ExpertGroups(*of_groups), activation, out
                )

        self._launch(kernel, x_TD, slots_E, *groups, out)

    def attention(
        self,
        q_THd: torch.Tensor,
        keys: PagedRows,
        values: PagedRows,
        work: AttentionWork,
        options: AttentionOptions,
    ) -> torch.Tensor:
        fixed = self._captures.rows
        if any(work.is_prompt):
            return super().attention(q_THd, keys, values, work, options)
        if fixed is None:
            work = work.by_row()
            fixed = RowTables(self._captures.memory, work)
            fixed.fill(work)
        return _decode(q_THd, keys, values, fixed, options)


def _decode(
    q_THd: torch.Tensor,
    keys: PagedRows,
    values: PagedRows,
    rows: RowTables,
    options: AttentionOptions,
) -> torch.Tensor:
    """Page by page, in fp32: one that a row does not see changes nothing of it."""
    assert keys.scales_PKB is None, "keys of int8"
    heads, dim = q_THd.shape[1:]
    kv_heads, page_tokens = keys.rows_PKBd.shape[1:3]
    last_T = rows.tiles_5T[3].long()
    q_TKgd = q_THd.view(-1, kv_heads, heads // kv_heads, dim)
    shape = *q_TKgd.shape[:3], 1
    top = q_THd.new_full(shape, -1e30)
    total = q_THd.new_zeros(shape)
    if options.sinks_H is not None:
        top = options.sinks_H.view(1, kv_heads, -1, 1) + total
        total = torch.ones_like(total)
    acc = q_THd.new_zeros(*shape[:3], options.value_dim)
    for page in range(min(rows.pages_TP.shape[1], -(-rows.positions // page_tokens))):
        ids_T = rows.pages_TP[:, page].long()
        key_TKBd = keys.rows_PKBd[ids_T].float()[..., :dim]
        value_TKBv = values.rows_PKBd[ids_T].float()[..., : options.value_dim]
        at_B = page * page_tokens + torch.arange(page_tokens)
        is_seen = at_B <= last_T[:, None]
        if options.window is not None:
            is_seen &= at_B > last_T[:, None] - options.window
        seen = is_seen[:, None, None]
        score = (q_TKgd[..., None, :] * key_TKBd[:, :, None]).sum(-1) * options.scale
        score = torch.where(seen, score, -torch.inf)
        new = torch.maximum(top, score.amax(-1, keepdim=True))
        fade, weight = (top - new).exp(), (score - new).exp()
        weighted = torch.where(seen[..., None], weight[..., None] * value_TKBv[:, :, None], 0)
        acc = acc * fade + weighted.sum(-2)
        total = total * fade + weight.sum(-1, keepdim=True)
        top = new
    return (acc / total).view(len(q_THd), heads, options.value_dim)

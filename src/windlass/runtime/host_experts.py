"""Experts of generated rows that the host computes, from its own slots, while a device computes the
others: a share of each layer's experts, so that few rows need not wait for weights on a link.

Rows that have such an expert go up into pinned memory; a thread of its own, the worker, computes;
what comes of it goes back down, to the places of those rows:

    compute   gather -> record                                    wait -> to their places
    up                  wait, copy -> record                      ^
    worker                            synchronise, compute       |
    back                                                   copy -> record

One call is under way at a time, so that there is one place in pinned memory. Whoever writes to it
again does so after `compute` has waited for the last copy from it.

Parts are leased from the store of the host by the thread that computes, and given back when the
worker is done with them. Where they are few beside the host's slots, they are demanded before those
of the device, else behind: the device's come through the same slots.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from windlass.device.base import Allocator
from windlass.device.streams import Event
from windlass.ids import Part, WeightKey
from windlass.kernels.interface import ExpertGroups, Kernels
from windlass.models.spec import ModelSpec, Moe
from windlass.plan import Plan
from windlass.runtime.host_attention import Pending, Worker
from windlass.runtime.layer_ops import RoutedRows
from windlass.schedule.batch import MOST_CAPTURED, RowGroup
from windlass.schedule.expert_homes import host_experts
from windlass.tensors import Tensors
from windlass.trace import Tracer
from windlass.weights.store import Arrivals, Lease, WeightStore


class _Chosen(NamedTuple):
    """What some rows of a group have at the host, sorted by expert: P places of G rows."""

    rows_G: torch.Tensor
    places_P: torch.Tensor  # row * A + slot
    of_rows_P: torch.Tensor  # of `rows_G`
    counts_E: torch.Tensor


@dataclass(slots=True, eq=False)
class _Call:
    """Some rows on their way. Kept until it is over, with what lies on the device."""

    layer: int
    given_GD: torch.Tensor
    places_P: torch.Tensor
    out_PD: torch.Tensor
    staged_GD: torch.Tensor
    result_PD: torch.Tensor
    groups: ExpertGroups
    arrived: Event
    keys: Sequence[WeightKey]
    arriving: Arrivals | None = None
    job: Pending[None] | None = None


class OnHost(NamedTuple):
    """Experts of a group of rows, `h_TD`, that the host computes. `groups`: what is left to the
    device, and `counts` the rows of each expert there that has any."""

    layer: int
    h_TD: torch.Tensor
    groups: ExpertGroups
    counts: dict[int, int]
    begun: _Call
    others: Sequence[_Chosen]  # rows that there is no room for yet
    host: "HostExperts"

    def end(self, outputs: torch.Tensor) -> None:
        """Writes what the host has computed to its places of `outputs`, waiting for it. Raises what
        the worker has raised."""
        self.host.end(self.begun, outputs)
        for chosen in self.others:
            self.host.end(self.host.send(self.layer, self.h_TD, chosen), outputs)


def staged_rows(plan: Plan) -> int:
    """Rows that pinned memory has room for, with all their places."""
    return min(plan.pass_rows, max(MOST_CAPTURED, 2 * plan.max_num_seqs))


class HostExperts:
    """Asked by the thread that computes; `kernels`, those of the host, are the worker's."""

    def __init__(
        self,
        spec: ModelSpec,
        plan: Plan,
        weights: WeightStore,
        machine: tuple[Kernels, Allocator, Worker],
        tracer: Tracer,
    ) -> None:
        """`weights`: of the host. `machine`: kernels of the host, memory of the device, and who
        computes. `tracer`: is told what the worker does."""
        self._spec = spec
        self._weights = weights
        self._kernels, self._memory, self._worker = machine
        self._tracer = tracer
        self._share = plan.host_experts
        self._most_rows = staged_rows(plan)
        self._most_early = plan.host.of(Part.EXPERT).slots // 2
        self._buffer: torch.Tensor | None = None
        self._rows: dict[int, tuple[RowGroup, torch.Tensor]] = {}  # generated, by first token
        self._call: _Call | None = None  # under way

    def begin(
        self, layer: int, routed: RoutedRows, group: RowGroup, kernels: Kernels
    ) -> OnHost | None:
        """Sends rows of `group` to the worker; None where the host computes nothing of them.
        `kernels`: of the device."""
        rows = self._generated(group)
        if not len(rows):
            return None
        ids_TA = routed.routes.ids_TA
        (all_TA,) = self._memory.streams.on_host(ids_TA)
        chosen = self._chosen(layer, all_TA, rows)
        if not chosen:
            return None
        places = torch.cat([one.places_P for one in chosen])
        num_experts = routed.groups.counts_E.shape[0]
        gone_P = self._memory.tensor(places, dtype=torch.int64)
        left_P = ids_TA.flatten().index_fill(0, gone_P, num_experts)
        order, of_rows, counts_E = kernels.group(left_P.view(ids_TA.shape), num_experts + 1)
        kept = order.shape[0] - places.shape[0]  # those of the host are the last
        counts = torch.bincount(all_TA.flatten(), minlength=num_experts)
        counts -= torch.stack([one.counts_E for one in chosen]).sum(0)
        return OnHost(
            layer,
            routed.h_TD,
            ExpertGroups(order[:kept], of_rows[:kept], counts_E[:num_experts]),
            {expert: count for expert, count in enumerate(counts.tolist()) if count},
            self.send(layer, routed.h_TD, chosen[0]),
            chosen[1:],
            self,
        )

    def drain(self) -> None:
        """Returns when the worker has nothing to do any more, whatever came of it: after a pass
        that has failed slots may be given to other parts."""
        self._worker.submit(lambda: None).result()
        call, self._call = self._call, None
        if call is not None:
            call.arrived.synchronize()
            if call.arriving is not None:
                call.arriving.close()

    # --- what is chosen ---------------------------------------------------------------------------

    def _generated(self, group: RowGroup) -> torch.Tensor:
        """Rows of `group` that are no prompt's, ascending."""
        known = self._rows.get(group.first_token)
        if known is None or known[0] is not group:
            of_prompt = [
                one.is_prompt
                for micro in group.micro_batches
                for one in micro.segments
                for _ in one.token_ids
            ]
            rows = torch.tensor([i for i, is_so in enumerate(of_prompt) if not is_so]).long()
            known = self._rows[group.first_token] = group, rows
        return known[1]

    def _chosen(self, layer: int, ids_TA: torch.Tensor, rows: torch.Tensor) -> list[_Chosen]:
        moe = self._spec.blocks[layer].ffn
        assert isinstance(moe, Moe), "a layer without experts"
        flags_E = torch.tensor(host_experts(layer, moe.num_experts, self._share))
        ids_RA = ids_TA[rows]
        theirs_RA = flags_E[ids_RA]
        found = []
        for some in torch.split(theirs_RA.any(1).nonzero().flatten(), self._most_rows):
            if not len(some):
                continue
            ids_GA = ids_RA[some]
            of_rows, slots = theirs_RA[some].nonzero(as_tuple=True)
            experts = ids_GA[of_rows, slots]
            order = torch.argsort(experts, stable=True)
            of_rows, slots = of_rows[order], slots[order]
            places = rows[some][of_rows] * ids_TA.shape[1] + slots
            counts_E = torch.bincount(experts, minlength=moe.num_experts)
            found.append(_Chosen(rows[some], places, of_rows, counts_E))
        return found

    # --- one call ---------------------------------------------------------------------------------

    def send(self, layer: int, h_TD: torch.Tensor, chosen: _Chosen) -> _Call:
        """Begins with some rows."""
        streams, width = self._memory.streams, h_TD.shape[1]
        num_rows, num_places = len(chosen.rows_G), len(chosen.places_P)
        given_GD = h_TD[self._memory.tensor(chosen.rows_G, dtype=torch.int64)]
        places_P = self._memory.tensor(chosen.places_P, dtype=torch.int64)
        out_PD = self._memory.empty(num_places, width)
        staged = self._staged(width)[: (num_rows + num_places) * width].view(-1, width)
        streams.up.wait(streams.compute.record())
        with streams.on(streams.up):
            staged[:num_rows].copy_(given_GD, non_blocking=True)
        arrived = streams.up.record()
        counts = chosen.counts_E.tolist()
        call = self._call = _Call(
            layer, given_GD, places_P, out_PD, staged[:num_rows], staged[num_rows:],
            ExpertGroups(torch.arange(num_places), chosen.of_rows_P, chosen.counts_E),
            arrived,
            [WeightKey(Part.EXPERT, layer, e) for e, count in enumerate(counts) if count],
        )  # fmt: skip
        if len(call.keys) <= self._most_early:
            call.arriving = self._weights.arrivals(call.keys, settles=False)
            self._submit(call, call.arriving.ready(len(call.keys)))
        return call

    def end(self, call: _Call, outputs: torch.Tensor) -> None:
        """Ends with them."""
        streams = self._memory.streams
        if call.arriving is None:
            call.arriving = self._weights.arrivals(call.keys, settles=False)
        most = self._weights.cache.group_size
        while True:
            if call.job is not None:
                call.job.result()  # before what it reads may be evicted
            leases = call.arriving.group(most)
            if not leases:
                break
            self._submit(call, leases)
        with streams.on(streams.back):
            call.out_PD.copy_(call.result_PD, non_blocking=True)
        streams.compute.wait(streams.back.record())
        outputs[call.places_P] = call.out_PD
        self._call = None

    def _submit(self, call: _Call, leases: Sequence[Lease]) -> None:
        experts = {lease.key.index: lease.tensors for lease in leases}
        if experts:
            call.job = self._worker.submit(lambda: self._compute(call, experts))

    def _staged(self, width: int) -> torch.Tensor:
        if self._buffer is None:
            most = max(b.ffn.top_k for b in self._spec.blocks if isinstance(b.ffn, Moe))
            like = torch.empty(self._most_rows * (1 + most) * width, device="meta")
            self._buffer = self._memory.streams.pinned(like)
        return self._buffer

    @torch.inference_mode()
    def _compute(self, call: _Call, experts: Mapping[int, Tensors]) -> None:
        """By the worker."""
        moe = self._spec.blocks[call.layer].ffn
        assert isinstance(moe, Moe), "a layer without experts"
        call.arrived.synchronize()
        begin = time.perf_counter()
        self._kernels.experts(
            call.staged_GD, experts, call.groups, moe.expert.activation, call.result_PD
        )
        if self._tracer.writes:
            end, rows = time.perf_counter(), len(call.staged_GD)
            given = dict(layer=call.layer, experts=len(experts), rows=rows)
            self._tracer.record("experts", "host experts", begin, end, **given)

"""What a layer computes after its attention, module by module, on weights that are given. Knows
not where they come from."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from windlass.decoder import block as math
from windlass.decoder.moe import dense_ffn, route, shared_expert
from windlass.kernels.interface import ExpertGroups, Kernels, RoutedIds, Routes
from windlass.models.spec import Ffn, ModelSpec, Moe
from windlass.schedule.batch import RowGroup, RowsOfKind
from windlass.tensors import Tensors, plain
from windlass.trace import Tracer


class RoutedRows(NamedTuple):
    """Rows that know their experts."""

    h_TD: torch.Tensor  # what experts read
    router_TD: torch.Tensor  # what the router read
    routes: Routes
    groups: ExpertGroups
    # where generated rows go through experts each by itself: all rows, piece by piece, and the
    # groups of those of prompts
    apart: tuple[tuple[RowsOfKind, ExpertGroups | None], ...] = ()


class LayerOps:
    """Runs modules of layers; each is a span of the trace."""

    def __init__(
        self,
        spec: ModelSpec,
        kernels: Kernels,
        *,
        tracer: Tracer,
        wants_scores: bool,
        by_row: bool = False,
    ) -> None:
        """`wants_scores`: routing hands out the router's scores of all experts. `by_row`: generated
        rows go through experts each by itself."""
        self._spec = spec
        self._kernels = kernels
        self._tracer = tracer
        self._by_row = by_row
        self._kinds: tuple[RowGroup | None, tuple[RowsOfKind, ...]] = None, ()  # of the last group
        self._wants_scores = wants_scores

    def route(
        self,
        layer: int,
        w: Tensors,
        hidden: torch.Tensor,
        group: RowGroup | None = None,
    ) -> RoutedRows:
        """From the hidden states of all rows to their experts. `group`: whose rows they are, if
        they may be of prompts."""
        moe = self._moe(layer)
        with self._tracer.span("route", layer=layer, rows=hidden.shape[0]):
            h_TD, router_TD = math.routing_inputs(self._kernels, self._spec, moe, w, hidden)
            routes = route(self._kernels, moe, w, router_TD, wants_scores=self._wants_scores)
            groups = self._kernels.group(routes.ids_TA, moe.num_experts)
            kinds = self._kinds_of(group, len(h_TD)) if self._by_row else ()
            if all(one.is_prompt for one in kinds):
                return RoutedRows(h_TD, router_TD, routes, groups)
            apart = tuple((one, self._grouped(routes, one, moe.num_experts)) for one in kinds)
            return RoutedRows(h_TD, router_TD, routes, groups, apart)

    def _kinds_of(self, group: RowGroup | None, num_rows: int) -> tuple[RowsOfKind, ...]:
        if group is None:
            return (RowsOfKind(0, num_rows, False),)
        if self._kinds[0] is not group:
            self._kinds = group, group.kinds()
        return self._kinds[1]

    def _grouped(self, routes: Routes, rows: RowsOfKind, num_experts: int) -> ExpertGroups | None:
        if not rows.is_prompt:
            return None
        return self._kernels.group(routes.ids_TA[rows.first : rows.last], num_experts)

    def shared(
        self, layer: int, w: Tensors, hidden: torch.Tensor, routed: RoutedRows
    ) -> torch.Tensor | None:
        """Of the expert that all rows use, where there is one."""
        shared, h_TD = self._moe(layer).shared, routed.h_TD
        if shared is None:
            return None
        with self._tracer.span("shared", layer=layer, rows=h_TD.shape[0]):
            if shared.own_norms:
                h_TD = math.ffn_input(self._kernels, self._spec, w, hidden)
            y_TD = shared_expert(self._kernels, shared, w, h_TD)
            return math.shared_output(self._kernels, self._spec, shared, w, y_TD)

    def experts(
        self,
        layer: int,
        experts: Mapping[int, Tensors],
        routed: RoutedRows,
        outputs: torch.Tensor,
        rows: int,
    ) -> None:
        """Some experts, over the `rows` rows that chose them, to their places of `outputs`."""
        kernels, moe = self._kernels, self._moe(layer)
        activation = moe.expert.activation
        with self._tracer.span("experts", layer=layer, experts=len(experts), rows=rows):
            if not routed.apart:
                kernels.experts(routed.h_TD, experts, routed.groups, activation, outputs)
            for own, groups in routed.apart:
                h_TD, ids_TA = (
                    x[own.first : own.last] for x in (routed.h_TD, routed.routes.ids_TA)
                )
                out = outputs[own.first * ids_TA.shape[1] :][: ids_TA.numel()]
                if groups is None:
                    ids = RoutedIds(ids_TA, moe.num_experts)
                    kernels.experts_by_row(h_TD, experts, ids, activation, out)
                else:
                    kernels.experts(h_TD, experts, groups, activation, out)

    def combine(
        self,
        layer: int,
        w: Tensors,
        hidden: torch.Tensor,
        routed: RoutedRows,
        outputs: torch.Tensor,
        shared_TD: torch.Tensor | None,
    ) -> None:
        """Adds what the experts gave to the hidden states, in place. `w`: the block's, or
        `output_tensors` of it."""
        with self._tracer.span("combine", layer=layer, rows=hidden.shape[0]):
            weights_TA = routed.routes.weights_TA
            outputs_TAD = outputs.view(*weights_TA.shape, -1)
            got = math.ExpertOutputs(weights_TA, outputs_TAD, shared_TD)
            math.add_experts(self._kernels, self._spec, layer, w, hidden, got)

    def output_tensors(self, w: Tensors) -> Tensors:
        """Copies of what the end of a block needs of its part, whose slot may be gone by then."""
        return {name: plain(w, name).clone() for name in math.OUTPUT_TENSORS if name in w}

    def ffn_input(self, w: Tensors, hidden: torch.Tensor) -> torch.Tensor:
        """What the network of a block without experts reads."""
        return math.ffn_input(self._kernels, self._spec, w, hidden)

    def dense(
        self,
        layer: int,
        w: Tensors,
        block: Tensors,
        hidden: torch.Tensor,
        normed: torch.Tensor,
    ) -> None:
        """Adds the network of a block without experts to the hidden states, in place. `block`: as
        `combine` has it."""
        ffn = self._spec.blocks[layer].ffn
        assert isinstance(ffn, Ffn), "the schedule asked for a dense network of another layer"
        with self._tracer.span("dense", layer=layer, rows=hidden.shape[0]):
            y_TD = dense_ffn(self._kernels, ffn, w, normed)
            math.add_network(self._kernels, self._spec, layer, block, hidden, y_TD)

    def final_norm(self, w: Tensors, hidden: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
        """Those rows before the head, normed."""
        if len(rows_R) == hidden.shape[0]:  # all of them: rows come in their order
            return math.final_norm(self._kernels, self._spec, w, hidden)
        if not len(rows_R):
            return hidden[:0]
        return math.final_norm(self._kernels, self._spec, w, hidden[rows_R])

    def _moe(self, layer: int) -> Moe:
        moe = self._spec.blocks[layer].ffn
        assert isinstance(moe, Moe), "the schedule asked for experts of another layer"
        return moe

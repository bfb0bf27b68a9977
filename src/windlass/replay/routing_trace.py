"""A routing trace in memory: rows by column, passes as numbers of rows. Passes may be those that
were recorded, or composed anew of the same sequences.

R rows of the trace, T rows of a pass, A experts of a row, E experts of a layer, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from windlass.errors import UsageError
from windlass.forecast.interface import ExpertTable
from windlass.replay.trace_file import Router, Trace

Rows = NDArray[np.int64]
_PROMPT_CHUNK = 1024  # rows of a prompt in one pass, where passes are composed


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerRows:
    """All rows of a trace at the router of one layer. The last two are None where unknown."""

    ids_RA: NDArray[np.integer[Any]]
    scores_RE: NDArray[np.floating[Any]] | None = None
    residual_RD: NDArray[np.floating[Any]] | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RoutingTrace:
    """`layers`: one for each layer of the model, None where it has no experts. `num_experts`: 0
    there. `passes`: rows of each, in the order of the batch. `routings` (names of classes in
    `models/spec.py`) and `routers` in the order of the layers with experts; states and routers are
    there in a trace with inputs."""

    model: str
    num_experts: tuple[int, ...]
    top_k: int
    sequences_R: Rows
    positions_R: Rows
    is_prompt_R: NDArray[np.bool_]
    layers: tuple[LayerRows | None, ...]
    passes: tuple[Rows, ...]
    embedded_RD: NDArray[np.floating[Any]] | None = None
    final_RD: NDArray[np.floating[Any]] | None = None
    routings: tuple[str, ...] = ()
    routers: tuple[Router, ...] = ()

    @property
    def has_states(self) -> bool:
        return self.embedded_RD is not None

    @property
    def num_decode_rows(self) -> int:
        """Of passes without a prompt: those that are measured."""
        return sum(len(rows) for rows in self.passes if not self.is_prompt_R[rows].any())

    def table(self) -> ExpertTable:
        """Where the experts lie in flat vectors."""
        return ExpertTable(self.num_experts, self.top_k)

    def needed(self, layer: int, rows: Rows) -> list[int]:
        """Experts that a pass over `rows` uses in `layer`, ascending."""
        own = self.layers[layer]
        assert own is not None, f"layer {layer} has no experts"
        found: list[int] = np.unique(own.ids_RA[rows]).tolist()
        return found

    def first(self, num_passes: int | None) -> "RoutingTrace":
        """The same of the first passes alone; all where None."""
        return self if num_passes is None else replace(self, passes=self.passes[:num_passes])

    def lockstep(self, num_sequences: int) -> "RoutingTrace":
        """The same sequences, so many at a time: the prompt of each, then a token of each in every
        pass until all of them have ended. Of rows that were computed twice the last counts."""
        order = np.lexsort((np.arange(len(self.sequences_R)), self.positions_R, self.sequences_R))
        own, at = self.sequences_R[order], self.positions_R[order]
        is_last = np.append((own[1:] != own[:-1]) | (at[1:] != at[:-1]), True)
        order = order[is_last]
        cuts = np.flatnonzero(np.diff(self.sequences_R[order])) + 1
        sequences = np.split(order, cuts)
        passes: list[Rows] = []
        for first in range(0, len(sequences), num_sequences):
            passes += _in_lockstep(sequences[first : first + num_sequences], self.is_prompt_R)
        return replace(self, passes=tuple(passes))


def _in_lockstep(sequences: Sequence[Rows], is_prompt_R: NDArray[np.bool_]) -> list[Rows]:
    passes: list[Rows] = []
    answers = []
    for rows in sequences:
        prompt = rows[is_prompt_R[rows]]
        passes += [prompt[i : i + _PROMPT_CHUNK] for i in range(0, len(prompt), _PROMPT_CHUNK)]
        answers.append(rows[~is_prompt_R[rows]])
    for step in range(max(map(len, answers), default=0)):
        passes.append(np.array([rows[step] for rows in answers if step < len(rows)]))
    return passes


def read_trace(trace: Trace, *, with_states: bool = False) -> RoutingTrace:
    """All of a file. `with_states`: also what routers read, where the file has it. UsageError where
    it has no whole pass."""
    header, passes = trace.header, list(trace)
    if not passes:
        raise UsageError(f"{trace.path}: a routing trace without a whole pass")
    num_experts, layers = (
        [0] * header.num_layers,
        list[LayerRows | None]([None] * header.num_layers),
    )
    with_states = with_states and header.inputs
    for place, own in enumerate(header.layers):
        num_experts[own.layer] = own.num_experts
        routed = [one.layers[place] for one in passes]
        layers[own.layer] = LayerRows(
            ids_RA=np.concatenate([one.ids_TA for one in routed]),
            scores_RE=np.concatenate([one.scores_TE.astype(np.float16) for one in routed]),
            residual_RD=_join([one.residual_TD for one in routed]) if with_states else None,
        )
    counts = np.cumsum([len(one.sequences_T) for one in passes])
    return RoutingTrace(
        model=header.model,
        num_experts=tuple(num_experts),
        top_k=max(own.top_k for own in header.layers),
        sequences_R=np.concatenate([one.sequences_T for one in passes]),
        positions_R=np.concatenate([one.positions_T for one in passes]),
        is_prompt_R=np.concatenate([one.is_prompt_T for one in passes]),
        layers=tuple(layers),
        passes=tuple(np.split(np.arange(counts[-1]), counts[:-1])),
        embedded_RD=_join([one.embedded_TD for one in passes]) if with_states else None,
        final_RD=_join([one.final_TD for one in passes]) if with_states else None,
        routings=tuple(own.routing for own in header.layers),
        routers=trace.routers if with_states else (),
    )


def _join(parts: Sequence[Any]) -> NDArray[np.float32]:
    return np.concatenate(parts)

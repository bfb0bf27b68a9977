"""Routing traces by hand, and a cache without time or bytes."""

from collections.abc import Sequence

import numpy as np

from windlass.ids import Part, WeightKey
from windlass.replay.routing_trace import LayerRows, RoutingTrace
from windlass.replay.trace_file import (
    TracedLayer,
    TracedPass,
    TracedRouting,
    TraceHeader,
    TraceWriter,
)
from windlass.weights.eviction import EvictionPolicy


def trace_of(
    ids_RLA, num_experts: int, *, rows_per_pass: int = 1, sequences=None, num_prompt: int = 0
) -> RoutingTrace:
    """Rows in the order of passes; the first `num_prompt` of each sequence are its prompt's."""
    ids_RLA = np.asarray(ids_RLA)
    num_rows, num_layers, top_k = ids_RLA.shape
    sequences_R = np.zeros(num_rows, np.int64) if sequences is None else np.asarray(sequences)
    positions_R = np.array([int((sequences_R[:i] == s).sum()) for i, s in enumerate(sequences_R)])
    scores = np.full((num_rows, num_layers, num_experts), 1e-3, np.float32)
    np.put_along_axis(scores, ids_RLA, 1 / top_k, 2)
    return RoutingTrace(
        model="tiny",
        num_experts=(num_experts,) * num_layers,
        top_k=top_k,
        sequences_R=sequences_R,
        positions_R=positions_R,
        is_prompt_R=positions_R < num_prompt,
        layers=tuple(
            LayerRows(ids_RA=ids_RLA[:, i], scores_RE=scores[:, i]) for i in range(num_layers)
        ),
        passes=tuple(np.split(np.arange(num_rows), range(rows_per_pass, num_rows, rows_per_pass))),
    )


def uniform_ids(seed: int, num_rows: int, num_layers: int, num_experts: int, top_k: int):
    """Every expert as likely, whatever came before."""
    noise = np.random.default_rng(seed).random((num_rows, num_layers, num_experts))
    return np.argsort(noise, 2)[:, :, :top_k]


def topical_ids(seed: int, num_rows: int, num_layers: int, num_experts: int, top_k: int):
    """Some experts are likely for a while, then others."""
    random = np.random.default_rng(seed)
    ids = np.empty((num_rows, num_layers, top_k), np.int64)
    for row in range(num_rows):
        if row % 40 == 0:
            liking = random.gumbel(size=(num_layers, num_experts)) * 2
        noise = random.gumbel(size=(num_layers, num_experts))
        ids[row] = np.argsort(-(liking + noise), 1)[:, :top_k]
    return ids


def cache_hits(
    policy: EvictionPolicy,
    events: Sequence[tuple[int, Sequence[int]]],
    slots: int,
    *,
    num_layers: int = 1,
) -> float:
    """Share of hits of a cache that serves all experts of an event, (layer, experts), together. Of
    a model of so many layers: a pass ends where the next event is of no later layer."""
    resident: set[WeightKey] = set()
    requests = hits = 0
    last = -1
    for layer, experts in events:
        if layer <= last:
            policy.note_use(WeightKey(Part.BLOCK, num_layers - 1))
        last = layer
        needed = [WeightKey(Part.EXPERT, layer, expert) for expert in experts]
        requests += len(needed)
        hits += len(resident.intersection(needed))
        for key in needed:
            policy.discard(key)
        for key in needed:
            if key not in resident:
                if len(resident) == slots:
                    victim = policy.victim(key, None)
                    assert victim in resident and victim not in needed
                    policy.discard(victim)
                    resident.remove(victim)
                resident.add(key)
            policy.note_use(key)
        for key in needed:
            policy.add(key)
    return hits / requests


def layer_of(trace: RoutingTrace, layer: int) -> LayerRows:
    own = trace.layers[layer]
    assert own is not None
    return own


def _routing(own: LayerRows, rows, residual_TD) -> TracedRouting:
    assert own.scores_RE is not None
    return TracedRouting(own.ids_RA[rows], own.scores_RE[rows], residual_TD)


def written(path, trace, *, inputs=False):
    """`trace` as a file; layers 0 and 2 of three have experts."""
    header = TraceHeader(
        model=trace.model, stamp="s", num_layers=3, hidden_size=4, inputs=inputs,
        layers=tuple(
            TracedLayer(i, trace.num_experts[0], trace.top_k, "SoftmaxTopK") for i in (0, 2)
        ),
    )  # fmt: skip
    writer = TraceWriter(path, header)
    states = np.ones if inputs else lambda *_: None
    for number, rows in enumerate(trace.passes):
        writer.add(
            TracedPass(
                number=number,
                sequences_T=trace.sequences_R[rows],
                positions_T=trace.positions_R[rows],
                is_prompt_T=trace.is_prompt_R[rows],
                layers=tuple(
                    _routing(own, rows, states((len(rows), 4), np.float32))
                    for own in (layer_of(trace, 0), layer_of(trace, 1))
                ),
                embedded_TD=states((len(rows), 4), np.float32),
                final_TD=states((len(rows), 4), np.float32),
            )  # fmt: skip
        )
    writer.close()
    return path

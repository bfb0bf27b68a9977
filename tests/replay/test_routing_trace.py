"""Traces in memory: passes as they were, and composed anew."""

import numpy as np
import pytest

from traces import layer_of, trace_of, uniform_ids, written
from windlass.replay.router import TraceRouter
from windlass.replay.routing_trace import read_trace
from windlass.replay.trace_file import Trace


@pytest.mark.parametrize("inputs", [False, True])
def test_a_file_is_read_as_it_was_written(inputs, tmp_path):
    trace = trace_of(uniform_ids(1, 12, 2, 6, 2), 6, rows_per_pass=5, num_prompt=3)
    path = written(tmp_path / "t", trace, inputs=inputs)
    read = read_trace(Trace(path), with_states=True)
    assert read.num_experts == (6, 0, 6) and read.top_k == 2 and read.layers[1] is None
    assert [rows.tolist() for rows in read.passes] == [rows.tolist() for rows in trace.passes]
    assert np.array_equal(layer_of(read, 2).ids_RA, layer_of(trace, 1).ids_RA)
    assert read.has_states == inputs
    assert read_trace(Trace(path)).has_states is False
    assert read.table().layers == (0, 2)
    assert read.needed(2, read.passes[1]) == trace.needed(1, trace.passes[1])


def test_lockstep_gives_each_sequence_its_prompt_and_then_tokens_together():
    sequences = np.array([7, 7, 9, 9, 9, 7, 9, 7, 3])
    trace = trace_of(np.zeros((9, 1, 1), int), 2, sequences=sequences, num_prompt=1)
    assert [rows.tolist() for rows in trace.lockstep(1).passes] == [
        [8], [0], [1], [5], [7], [2], [3], [4], [6],
    ]  # fmt: skip
    assert [rows.tolist() for rows in trace.lockstep(3).passes] == [
        [8], [0], [2], [1, 3], [5, 4], [7, 6],
    ]  # fmt: skip


def test_of_rows_that_were_computed_again_the_last_counts():
    trace = trace_of(np.arange(4)[:, None, None], 4)
    trace.positions_R[:] = [0, 1, 0, 1]
    assert [rows.tolist() for rows in trace.lockstep(1).passes] == [[2], [3]]


def test_a_router_says_what_the_trace_does_of_rows_in_any_order():
    ids = uniform_ids(2, 6, 2, 5, 2)
    trace = trace_of(ids, 5, sequences=[0, 0, 1, 1, 1, 0], num_prompt=2)
    router = TraceRouter(trace)
    batch = router.enter(np.array([0, 1, 4, 5]))
    found = [(s.sequence, s.first_position, s.num_tokens, s.is_prompt) for s in batch.segments]
    assert found == [(0, 0, 2, True), (1, 2, 1, False), (0, 2, 1, False)]
    tokens = router.route(1, batch, batch.groups[0])
    assert np.array_equal(tokens.ids_TA, ids[[0, 1, 4, 5], 1])
    assert tokens.counts_E.sum() == 8 and tokens.scores_TE.shape == (4, 5)
    assert router.begin(batch) is None and router.end() is None

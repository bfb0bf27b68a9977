"""The schedule as ordinary code: what it asks of any runtime, and how rows are cut."""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windlass.ids import Home, Part, WeightKey
from windlass.schedule.batch import (
    CHUNK_TOKENS,
    Segment,
    is_capturable,
    make_batch,
    passes_of,
)
from windlass.schedule.passes import LayerShape, PassShape, run_draft, run_pass
from windlass.schedule.runtime import Routed

DENSE, EXPERTS = LayerShape(True, "dense"), LayerShape(True, "experts")


class RecordingRuntime:
    """A `Runtime` without tensors: notes every call, and gives experts in another order."""

    def __init__(self, experts, replayed=()):
        self.routed = experts
        self.replayed = replayed
        self.calls = []
        self.held = []
        self.most_blocks = 0

    def begin(self, batch):
        self.calls.append(("begin", batch.num_tokens))
        return "hidden"

    def join(self, weights, states, rows, batch):
        assert weights.part is Part.JOIN and weights in self.held
        self.calls.append(("join", states, *rows, batch.num_tokens))
        return "hidden"

    def enter_draft_head(self, weights, hidden, batch):
        assert weights.part is Part.JOIN and weights in self.held and hidden == "hidden"
        self.calls.append(("draft head", weights.layer))
        return "final"

    def prefetch(self, layer):
        assert all(key == WeightKey(Part.BLOCK, layer) for key in self.held)
        self.calls.append(("prefetch", layer))

    def replay(self, layer):
        assert not self.held, "a layer is replayed as a whole"
        return layer in self.replayed

    def replay_block(self, layer):
        assert not self.held, "nor is a block"
        return None

    @contextmanager
    def lease(self, key):
        self.held.append(key)
        blocks = [held for held in self.held if held.part is Part.BLOCK]
        self.most_blocks = max(self.most_blocks, len(blocks))
        try:
            yield key
        finally:
            self.held.remove(key)

    def arrivals(self, keys):
        last_first = keys[::-1]
        for arrived in (last_first[:1], last_first[1:]):
            self.held += arrived
            yield arrived
            for key in arrived:
                self.held.remove(key)

    def attend(self, layer, weights, hidden, rows):
        assert weights == WeightKey(Part.BLOCK, layer) and weights in self.held
        self.calls.append(("attend", layer, rows.first_token, rows.num_tokens))
        return layer, rows.first_token

    def attended(self, layer, weights, hidden, rows, begun):
        assert weights == WeightKey(Part.BLOCK, layer) and weights in self.held
        assert begun == (layer, rows.first_token)
        self.calls.append(("attended", layer, rows.first_token))

    def enter_experts(self, layer, weights, hidden, group):
        assert weights in self.held
        self.calls.append(("route", layer, group.first_token, group.num_tokens))
        return Routed(self.routed, None)

    def experts(self, layer, arrived, routed):
        assert all(key in self.held for key in arrived)
        self.calls.append(("experts", layer, *(key.index for key in arrived)))

    def leave_experts(self, layer, routed):
        self.calls.append(("combine", layer))

    def enter_dense(self, layer, weights, hidden, group):
        assert weights in self.held
        return group.first_token, group.num_tokens

    def dense(self, layer, weights, normed):
        assert weights == WeightKey(Part.FFN, layer) and weights in self.held
        self.calls.append(("dense", layer, *normed))

    def enter_head(self, hidden, batch):
        return "final"

    def head(self, weights, final):
        self.calls.append(("head", weights.index))

    def finish(self, final):
        return "logits"


def _segment(name, first, count, *, is_prompt=True, wants_logits=True):
    return Segment(
        sequence=name,
        token_ids=tuple(range(count)),
        first_position=first,
        pages=(0,),
        state_slot=-1,
        is_prompt=is_prompt,
        long_rope=False,
        wants_logits=wants_logits,
    )


def test_a_pass_runs_attention_by_micro_batch_and_each_expert_once():
    batch = make_batch([_segment(0, 0, 100), _segment(1, 0, 60)], micro_batch_tokens=128)
    runtime = RecordingRuntime(experts=(1, 4, 6))
    assert run_pass(runtime, PassShape((DENSE, EXPERTS), 2), batch) == "logits"
    assert not runtime.held
    assert runtime.calls == [
        ("begin", 160),
        ("prefetch", 0),
        ("attend", 0, 0, 100),
        ("attend", 0, 100, 60),
        ("attended", 0, 0),
        ("attended", 0, 100),
        ("dense", 0, 0, 160),
        ("prefetch", 1),
        ("attend", 1, 0, 100),
        ("attend", 1, 100, 60),
        ("attended", 1, 0),
        ("attended", 1, 100),
        ("route", 1, 0, 160),
        ("experts", 1, 6),
        ("experts", 1, 4, 1),
        ("combine", 1),
        ("prefetch", 2),
        ("head", 0),
        ("head", 1),
    ]


def test_the_layer_that_drafts_runs_alone_and_unforeseen():
    batch = make_batch([_segment(0, 0, 100)], micro_batch_tokens=64)
    runtime = RecordingRuntime(experts=(2, 3))
    shape = PassShape((DENSE, EXPERTS), 1, draft=EXPERTS)
    assert run_draft(runtime, shape, batch, "states", [3, 5]) == "logits"
    assert not runtime.held
    assert runtime.calls == [
        ("join", "states", 3, 5, 100), ("attend", 2, 0, 64), ("attend", 2, 64, 36),
        ("attended", 2, 0), ("attended", 2, 64), ("route", 2, 0, 100), ("experts", 2, 3),
        ("experts", 2, 2), ("combine", 2), ("draft head", 2), ("head", 0),
    ]  # fmt: skip
    assert shape.whole.layers == (DENSE, EXPERTS, EXPERTS)


def test_attention_of_the_next_layer_begins_before_other_groups_have_left():
    segments = [_segment(0, 0, 64), _segment(1, 0, 100), _segment(2, 0, 28)]
    batch = make_batch(segments, micro_batch_tokens=64, groups=2)
    assert [(g.first_token, g.num_tokens) for g in batch.groups] == [(0, 64), (64, 128)]
    runtime = RecordingRuntime(experts=(3,), replayed=(0, 1, 2))
    run_pass(runtime, PassShape((EXPERTS, DENSE, EXPERTS), 1), batch)
    assert not runtime.held and runtime.most_blocks == 2
    begins = [("attend", 0, 0, 64), ("attend", 0, 64, 64), ("attend", 0, 128, 64)]

    def experts(layer, first, rows):
        return [
            *(("attended", layer, at) for at in range(first, first + rows, 64)),
            ("route", layer, first, rows), ("experts", layer, 3), ("experts", layer),
            ("combine", layer),
        ]  # fmt: skip

    assert runtime.calls == [
        ("begin", 192), ("prefetch", 0), *begins,
        *experts(0, 0, 64), ("attend", 1, 0, 64),
        *experts(0, 64, 128), ("prefetch", 1), ("attend", 1, 64, 64), ("attend", 1, 128, 64),
        ("attended", 1, 0), ("dense", 1, 0, 64), ("attend", 2, 0, 64),
        ("attended", 1, 64), ("attended", 1, 128), ("dense", 1, 64, 128),
        ("prefetch", 2), ("attend", 2, 64, 64), ("attend", 2, 128, 64),
        *experts(2, 0, 64), *experts(2, 64, 128), ("prefetch", 3), ("head", 0),
    ]  # fmt: skip


def test_a_micro_batch_is_of_one_home():
    at_host = [replace(_segment(i, 0, n), home=Home.HOST) for i, n in ((0, 20), (1, 70))]
    batch = make_batch([*at_host, _segment(2, 0, 3), _segment(3, 0, 9)], micro_batch_tokens=64)
    found = [(one.home, one.num_tokens) for one in batch.micro_batches]
    assert found == [(Home.HOST, 20), (Home.HOST, 64), (Home.HOST, 6), (Home.DEVICE, 12)]
    one_token = [replace(_segment(0, 3, 1), home=home) for home in (Home.DEVICE, Home.HOST)]
    passes = [make_batch([one], micro_batch_tokens=64) for one in one_token]
    assert [is_capturable(one) for one in passes] == [True, False]


def test_an_error_in_one_group_gives_all_leases_back():
    class Fails(RecordingRuntime):
        def leave_experts(self, layer, routed):
            super().leave_experts(layer, routed)
            if len([call for call in self.calls if call[0] == "combine"]) == 2:
                raise ValueError("no more")

    batch = make_batch([_segment(0, 0, 130)], micro_batch_tokens=64, groups=3)
    runtime = Fails(experts=(0, 1))
    with pytest.raises(ValueError, match="no more"):
        run_pass(runtime, PassShape((EXPERTS, DENSE), 1), batch)
    assert runtime.most_blocks == 2
    assert [key for key in runtime.held if key.part is Part.BLOCK] == []


def test_layers_with_half_a_block_compute_that_half():
    batch = make_batch([_segment(0, 0, 64)], micro_batch_tokens=64)
    runtime = RecordingRuntime(experts=(0, 4))
    halves = LayerShape(True, "none"), LayerShape(False, "experts"), LayerShape(False, "dense")
    run_pass(runtime, PassShape(halves, 0), batch)
    assert not runtime.held
    assert [call for call in runtime.calls if call[0] != "prefetch"] == [
        ("begin", 64), ("attend", 0, 0, 64), ("attended", 0, 0), ("route", 1, 0, 64),
        ("experts", 1, 4), ("experts", 1, 0), ("combine", 1), ("dense", 2, 0, 64),
    ]  # fmt: skip


def test_a_pass_without_wanted_logits_does_not_touch_the_head():
    batch = make_batch([_segment(0, 0, 64, wants_logits=False)], micro_batch_tokens=64)
    runtime = RecordingRuntime(experts=(0,))
    run_pass(runtime, PassShape((EXPERTS,), 3), batch)
    assert not [call for call in runtime.calls if call[0] == "head"]


def test_a_replayed_layer_is_not_computed_again():
    batch = make_batch([_segment(0, 0, 64)], micro_batch_tokens=64)
    runtime = RecordingRuntime(experts=(0,), replayed=(0, 2))
    run_pass(runtime, PassShape((EXPERTS, DENSE, EXPERTS), 1), batch)
    assert [call for call in runtime.calls if call[0] != "prefetch"] == [
        ("begin", 64), ("attend", 1, 0, 64), ("attended", 1, 0), ("dense", 1, 0, 64),
        ("head", 0),
    ]  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 300), st.booleans()), min_size=1),
    st.integers(CHUNK_TOKENS, 400),
    st.integers(1, 4),
)
def test_micro_batches_hold_all_rows_in_order_and_cut_at_chunks(rows, limit, groups):
    segments = [
        _segment(i, CHUNK_TOKENS * first if is_prompt else 7 * first, count if is_prompt else 1,
                 is_prompt=is_prompt)
        for i, (first, count, is_prompt) in enumerate(rows)
    ]  # fmt: skip
    batch = make_batch(segments, micro_batch_tokens=limit, groups=groups)
    assert len(batch.groups) == min(groups, len(batch.micro_batches))
    ends = [group.first_token + group.num_tokens for group in batch.groups]
    assert [group.first_token for group in batch.groups] == [0, *ends[:-1]]
    assert all(
        group.first_token == group.micro_batches[0].first_token
        and group.num_tokens == sum(micro.num_tokens for micro in group.micro_batches)
        for group in batch.groups
    )
    assert batch.num_tokens == sum(s.num_tokens for s in segments)
    assert [m.first_token for m in batch.micro_batches] == [
        sum(m.num_tokens for m in batch.micro_batches[:i]) for i in range(len(batch.micro_batches))
    ]
    seen: dict[int, Any] = {}
    for micro in batch.micro_batches:
        assert 0 < micro.num_tokens == sum(s.num_tokens for s in micro.segments) <= limit
        for part in micro.segments:
            whole = segments[part.sequence]
            done = seen.get(part.sequence, 0)
            assert part.first_position == whole.first_position + done
            assert part.token_ids == whole.token_ids[done : done + part.num_tokens]
            assert done == 0 or part.first_position % CHUNK_TOKENS == 0
            seen[part.sequence] = done + part.num_tokens
    assert seen == {s.sequence: s.num_tokens for s in segments}
    last = [sum(s.num_tokens for s in segments[: i + 1]) - 1 for i in range(len(segments))]
    assert batch.logit_rows == last


def test_logits_of_guesses_follow_those_of_the_token_before_them():
    """Also where the micro-batches of a segment pass through the model one by one."""
    guessed = replace(_segment(0, 60, 9, is_prompt=False), num_drafts=6)
    others = [_segment(1, 0, 64, wants_logits=False), _segment(2, 64, 30)]
    batch = make_batch([others[0], guessed, others[1]], micro_batch_tokens=68)
    assert batch.logit_rows == [*range(66, 73), 102]
    parts = [s for micro in batch.micro_batches for s in micro.segments if s.sequence == 0]
    assert [(s.num_tokens, s.num_logits, s.num_drafts) for s in parts] == [(4, 2, 1), (5, 5, 4)]
    found = sum(len(one.logit_rows) for one in passes_of(batch, "model-based"))
    assert found == len(batch.logit_rows)

"""The schedule as ordinary code: what it asks of any runtime, and how rows are cut."""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from windlass.ids import Part, WeightKey
from windlass.schedule.batch import CHUNK_TOKENS, Segment, make_batch, passes_of
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

    def begin(self, batch):
        self.calls.append(("begin", batch.num_tokens))
        return "hidden"

    def join(self, weights, states, batch):
        assert weights.part is Part.JOIN and weights in self.held
        self.calls.append(("join", states, batch.num_tokens))
        return "hidden"

    def enter_draft_head(self, weights, hidden, batch):
        assert weights.part is Part.JOIN and weights in self.held and hidden == "hidden"
        self.calls.append(("draft head", weights.layer))
        return "final"

    def prefetch(self, layer):
        assert not self.held, "hinted while weights are leased"
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
        yield key
        self.held.remove(key)

    def arrivals(self, keys):
        last_first = keys[::-1]
        for group in (last_first[:1], last_first[1:]):
            self.held += group
            yield group
            for key in group:
                self.held.remove(key)

    def attention(self, layer, weights, hidden, rows):
        assert weights == WeightKey(Part.BLOCK, layer) and weights in self.held
        self.calls.append(("attention", layer, rows.first_token, rows.num_tokens))

    def enter_experts(self, layer, weights, hidden):
        assert weights in self.held
        self.calls.append(("route", layer))
        return Routed(self.routed, None)

    def experts(self, layer, group, routed):
        assert all(key in self.held for key in group)
        self.calls.append(("experts", layer, *(key.index for key in group)))

    def leave_experts(self, layer, hidden, routed):
        self.calls.append(("combine", layer))

    def enter_dense(self, layer, weights, hidden):
        return "normed"

    def dense(self, layer, weights, hidden, normed):
        assert weights == WeightKey(Part.FFN, layer) and weights in self.held
        self.calls.append(("dense", layer))

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
        ("attention", 0, 0, 100),
        ("attention", 0, 100, 60),
        ("dense", 0),
        ("prefetch", 1),
        ("attention", 1, 0, 100),
        ("attention", 1, 100, 60),
        ("route", 1),
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
    assert run_draft(runtime, shape, batch, "states") == "logits"
    assert not runtime.held
    assert runtime.calls == [
        ("join", "states", 100), ("attention", 2, 0, 64), ("attention", 2, 64, 36), ("route", 2),
        ("experts", 2, 3), ("experts", 2, 2), ("combine", 2), ("draft head", 2), ("head", 0),
    ]  # fmt: skip
    assert shape.whole.layers == (DENSE, EXPERTS, EXPERTS)


def test_layers_with_half_a_block_compute_that_half():
    batch = make_batch([_segment(0, 0, 64)], micro_batch_tokens=64)
    runtime = RecordingRuntime(experts=(0, 4))
    halves = LayerShape(True, "none"), LayerShape(False, "experts"), LayerShape(False, "dense")
    run_pass(runtime, PassShape(halves, 0), batch)
    assert not runtime.held
    assert [call for call in runtime.calls if call[0] != "prefetch"] == [
        ("begin", 64), ("attention", 0, 0, 64), ("route", 1), ("experts", 1, 4),
        ("experts", 1, 0), ("combine", 1), ("dense", 2),
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
        ("begin", 64), ("attention", 1, 0, 64), ("dense", 1), ("head", 0),
    ]  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 300), st.booleans()), min_size=1),
    st.integers(CHUNK_TOKENS, 400),
)
def test_micro_batches_hold_all_rows_in_order_and_cut_at_chunks(rows, limit):
    segments = [
        _segment(i, CHUNK_TOKENS * first if is_prompt else 7 * first, count if is_prompt else 1,
                 is_prompt=is_prompt)
        for i, (first, count, is_prompt) in enumerate(rows)
    ]  # fmt: skip
    batch = make_batch(segments, micro_batch_tokens=limit)
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

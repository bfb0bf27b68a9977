"""Lengths of answers learned while running, and what admission makes of them."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import engine_for, make_model, prompts, request, run_all
from sequences import PlainStarts
from windlass.device.host_memory import HostAllocator
from windlass.engine.admission import Admission, may_want
from windlass.engine.answer_lengths import OutputLengths
from windlass.engine.request import Request
from windlass.engine.sequence import QueuedSequence
from windlass.kvcache.kv_cache import KvCache
from windlass.kvcache.kv_tiers import KvTiers
from windlass.params import SamplingParams

PAGE_TOKENS = 32
MOST = 256  # tokens of an answer


def test_where_nothing_is_known_an_answer_takes_all():
    lengths = OutputLengths()
    assert lengths.chance(39, after=0, max_output=40) == 1


def test_lengths_count_relative_to_what_was_allowed():
    lengths = OutputLengths()
    for num_output, most in ((10, 100), (4, 20), (3, 10), (400, 1000)):
        lengths.observe(num_output, most)  # 10, 20, 30, 40 %
    # of the three that came to 15 tokens, and one more, two had more than 20
    assert lengths.chance(20, after=15, max_output=100) == pytest.approx(3 / 4)
    assert lengths.chance(40, after=0, max_output=100) == pytest.approx(1 / 5)
    assert lengths.chance(60, after=50, max_output=100) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=700), st.integers(0, 100),
       st.integers(0, 100))  # fmt: skip
def test_only_the_last_answers_count(outputs, after, more):
    lengths = OutputLengths()
    for num_output in outputs:
        lengths.observe(num_output, 100)
    recent = outputs[-512:]
    came = [one for one in recent if one >= after]
    went = [one for one in came if one > after + more]
    chance = lengths.chance(after + more, after=after, max_output=100)
    assert chance == pytest.approx((len(went) + 1) / (len(came) + 1))


def test_a_page_is_kept_as_far_as_it_is_likely_to_be_wanted():
    """A prompt of 20 tokens in a page of 32: the 13th token of its answer is never computed if it
    is the last."""
    kv = KvCache(
        [],
        HostAllocator(),
        dtype=torch.float32,
        num_pages=9,
        page_tokens=PAGE_TOKENS,
    )
    tiers = KvTiers(kv)
    admission = Admission(tiers, max_num_seqs=4, max_rows=68, long_rope_after=None)
    admission.add(
        QueuedSequence(Request("a", (1,) * 20, SamplingParams(max_tokens=40), ""), 0, 40, 60)
    )
    (row,), lengths = admission.compose(PlainStarts()), admission.lengths
    assert may_want(tiers, lengths, row.sequence) == 1
    for num_output in (13,) * 6 + (14,) * 3:
        admission.lengths.observe(num_output, 40)
    assert may_want(tiers, lengths, row.sequence) == pytest.approx((3 + 1) / (9 + 1))
    row.sequence.output_ids.extend([1] * 13)
    assert may_want(tiers, lengths, row.sequence) == 1  # it lacks one now
    admission._grow(row.sequence)
    assert may_want(tiers, lengths, row.sequence) == 0  # nor can it want a third
    admission.lengths.observe(5, 40)
    assert may_want(tiers, lengths, row.sequence) == 0


def _passes(draw, *, pages, learns, seed=0):
    """Passes and preemptions of a job of 120 requests whose answers have `draw` tokens."""
    chance = random.Random(seed)
    kv = KvCache(
        [],
        HostAllocator(),
        dtype=torch.float32,
        num_pages=pages,
        page_tokens=PAGE_TOKENS,
    )
    admission = Admission(KvTiers(kv), max_num_seqs=128, max_rows=640, long_rope_after=None)
    params, ends = SamplingParams(max_tokens=MOST), {}
    for i in range(120):
        one = Request(str(i), (1,) * chance.randint(32, 200), params, "")
        ends[str(i)] = max(1, min(MOST, int(draw(chance))))
        admission.add(QueuedSequence(one, 0, MOST, 1000))
    passes = 0
    while rows := admission.compose(PlainStarts()):
        passes += 1
        for choice, segment in rows:
            choice.num_computed += segment.num_tokens
            if segment.wants_logits:
                choice.output_ids.append(1)
                if len(choice.output_ids) == ends[choice.request.request_id]:
                    admission.remove(choice)
                    if learns:
                        admission.lengths.observe(len(choice.output_ids), MOST)
    return passes, admission.num_preemptions


@pytest.mark.parametrize("pages", [120, 300])
def test_less_is_kept_free_for_answers_that_are_short(pages):
    """A simulation: fewer passes, for hardly more that is computed again."""

    def job(draw):
        found = [[_passes(draw, pages=pages, learns=learns, seed=s) for s in range(2)]
                 for learns in (False, True)]  # fmt: skip
        return [[sum(column) for column in zip(*each, strict=True)] for each in found]

    without, learned = job(lambda chance: MOST * chance.expovariate(5))
    assert learned[0] < 0.99 * without[0] and learned[1] <= without[1] + 3
    without, learned = job(lambda chance: MOST)  # nothing to be learned
    assert learned == without
    without, learned = job(lambda chance: chance.gauss(MOST / 2, MOST / 10))
    assert learned[0] < without[0] and learned[1] <= without[1] + 3


def test_an_engine_learns_from_what_ended_by_itself(tmp_path):
    make_model("qwen3_moe", tmp_path)
    texts = prompts((9, 20, 30))
    with engine_for(tmp_path) as engine:
        lengths = engine._admission.lengths
        run_all(engine, [request("0", texts[0], max_tokens=6, n=2)])
        assert lengths.chance(39, after=0, max_output=40) == 1
        (first,) = run_all(engine, [request("1", texts[1], max_tokens=20)])["1"].outputs
        stop = [first.token_ids[3]]
        given: dict[str, Any] = {"stop_token_ids": stop, "max_tokens": 20}
        (again,) = run_all(engine, [request("2", texts[1], **given)])["2"].outputs
        assert again.finish_reason == "stop" and len(again.token_ids) <= 4
        # of four answers, and one more, three took all that they might
        assert lengths.chance(20, after=0, max_output=40) == pytest.approx(4 / 5)
        engine.add(request("3", texts[2], max_tokens=20))
        engine.step()
        engine.abort("3")
        assert lengths.chance(20, after=0, max_output=40) == pytest.approx(4 / 5)

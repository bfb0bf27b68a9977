"""Admission alone: requests of all sizes on few pages, with tokens out of nowhere."""

from hypothesis import given, settings
from hypothesis import strategies as st

from admission_machine import PAGE_TOKENS, Machine
from sequences import PlainStarts
from windlass.engine.bursts import Turns
from windlass.engine.pace import Pace
from windlass.engine.sequence import Sequence
from windlass.ids import Home
from windlass.prefetch.guard import WindowGuard
from windlass.schedule.batch import CHUNK_TOKENS

SIZES = st.tuples(st.integers(1, 150), st.integers(1, 90))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=12),
    arrivals=st.lists(st.integers(0, 30), min_size=12, max_size=12),
    spare=st.integers(0, 12),
    seqs=st.integers(1, 6),
    more_rows=st.integers(0, 70),
    has_states=st.booleans(),
    bursts=st.sampled_from(((0, 0), (0, 0), (1, 8), (5, 3), (16, 8))),
    homes=st.sampled_from((0, 0, 1, 2, 3)),
    is_paced=st.booleans(),
)
def test_everything_ends_whatever_comes(
    sizes, arrivals, spare, seqs, more_rows, has_states, bursts, homes, is_paced
):
    least = max(-(-(prompt + output) // PAGE_TOKENS) for prompt, output in sizes)
    machine = Machine(
        pages=least + spare, seqs=seqs, rows=seqs + CHUNK_TOKENS + more_rows,
        states=seqs * has_states, turns=Turns(*bursts),
        host_pages=(least + spare // 2) * (homes > 0), pace=Pace() if is_paced else None,
    )  # fmt: skip
    todo = sorted(zip(arrivals, sizes, strict=False), key=lambda one: one[0])
    now = 0
    while todo or machine.admission.running or machine.admission.waiting:
        while todo and todo[0][0] <= now:
            is_host = homes and len(todo) % homes == 0
            machine.add(*todo.pop(0)[1], home=Home.HOST if is_host else Home.DEVICE)
        now += 1
        if machine.admission.running or machine.admission.waiting:
            machine.step()
        assert now < 20_000, "no end in sight"
    assert sorted((c.num_prompt, len(c.output_ids)) for c in machine.finished) == sorted(sizes)
    assert machine.kv.num_free_pages == least + spare


def test_a_home_without_room_does_not_hold_up_the_other():
    """And who grows takes pages from younger ones of its own."""
    machine = Machine(pages=4, host_pages=20, seqs=8, rows=8 + 2 * CHUNK_TOKENS)
    for i in range(6):
        machine.add(16, 14, name=str(i), home=Home.HOST if i % 2 else Home.DEVICE)
    rows = machine.step()
    homes = [row.segment.home for row in rows]
    assert homes == [Home.HOST] * 3 + [Home.DEVICE], "those of the host first"
    assert [one.request.request_id for one in machine.admission.running] == ["0", "1", "3", "5"]
    while machine.admission.running or machine.admission.waiting:
        machine.step()
    names = [one.request.request_id for one in machine.finished]
    assert sorted(names) == list("012345") and [n for n in names if n in "024"] == list("024")


def _behind_a_large_one(pace, *, is_batch=False):
    """20 pages, 16 of them in use for long; one that wants 12 waits, and six that want two."""
    machine = Machine(pages=20, seqs=8, rows=8 + 2 * CHUNK_TOKENS, pace=pace)
    machine.add(16 * PAGE_TOKENS - 40, 41, name="first", is_batch=is_batch)
    machine.step()
    machine.admission.running[0].pages.extend(machine.kv.take_pages(5))  # all it will want
    machine.add(11 * PAGE_TOKENS, 2, name="large", is_batch=is_batch)
    for i in range(6):
        machine.add(PAGE_TOKENS, 8, name=str(i), is_batch=is_batch)
    for _ in range(3):
        machine.step()
    return machine, [one.request.request_id for one in machine.admission.running]


def test_small_ones_pass_one_that_waits_for_pages():
    machine, running = _behind_a_large_one(Pace())
    assert running == ["first", "0", "1"], "as many as there are pages for"
    while machine.admission.running or machine.admission.waiting:
        machine.step()
    assert len(machine.finished) == 8


def test_nobody_passes_where_the_order_is_that_of_a_file():
    assert _behind_a_large_one(None)[1] == ["first"]
    assert _behind_a_large_one(Pace(), is_batch=True)[1] == ["first"]


def test_a_large_one_is_passed_by_so_many_tokens_and_no_more():
    """Small ones never end; those that pass have as many tokens as the cache has positions."""
    machine = Machine(pages=20, seqs=4, rows=4 + 3 * CHUNK_TOKENS, pace=Pace())
    machine.add(12, 60, name="first")
    machine.step()
    machine.add(19 * PAGE_TOKENS, 2, name="large")
    begun = set()
    for i in range(200):
        machine.add(PAGE_TOKENS, 8, name=f"{i}")
        machine.step()
        begun |= {one.request.request_id for one in machine.admission.running}
        if "large" in begun:
            break
    assert "large" in begun, "starved"
    passed = len(begun - {"first", "large"})
    assert passed == 20 * PAGE_TOKENS // (PAGE_TOKENS + 8)


def test_nobody_passes_what_gave_way():
    machine = Machine(pages=12, seqs=4, rows=4 + CHUNK_TOKENS, pace=Pace())
    for i in range(3):
        machine.add(PAGE_TOKENS, 8 * PAGE_TOKENS, name=str(i))
    while not machine.admission.num_preemptions:
        machine.step()
    machine.add(1, 2, name="small")
    while any(isinstance(one, Sequence) for one in machine.admission.waiting):
        names = [one.request.request_id for one in machine.admission.running]
        assert "small" not in names
        machine.step()


def test_after_a_preemption_the_others_go_on():
    """One sequence has more tokens to compute again than a pass has rows."""
    machine = Machine(pages=100, seqs=4, rows=4 + CHUNK_TOKENS)
    for _ in range(3):
        machine.add(8, 300)
    machine.step()
    first = machine.admission.running[0]
    first.output_ids.extend(range(first.num_tokens, first.num_tokens + 200))
    rows = machine.step()
    assert [row.segment.num_tokens for row in rows] == [4 + CHUNK_TOKENS - 2, 1, 1]


def test_what_gave_way_returns_in_the_order_of_age_before_what_never_ran():
    machine = Machine(pages=12, seqs=4, rows=4 + CHUNK_TOKENS)
    for i in range(5):
        machine.add(PAGE_TOKENS, 8 * PAGE_TOKENS, name=str(i))
    machine.step()
    begun = [sequence.request.request_id for sequence in machine.admission.running]
    assert begun == ["0", "1", "2", "3"]
    while machine.admission.num_preemptions < 2:
        machine.step()
    assert [sequence.request.request_id for sequence in machine.admission.running] == ["0", "1"]
    assert [one.request.request_id for one in machine.admission.waiting] == ["2", "3", "4"]
    while machine.admission.running or machine.admission.waiting:
        machine.step()
    assert [c.request.request_id for c in machine.finished] == begun + ["4"]


def test_nothing_holds_pages_before_there_is_room_for_its_rows():
    machine = Machine(pages=100, seqs=4, rows=4 + CHUNK_TOKENS)
    machine.add(40, 5)
    machine.add(40, 5)
    machine.step()
    assert len(machine.admission.running) == 1
    machine.step()
    assert len(machine.admission.running) == 2


def test_no_page_is_kept_for_what_cannot_grow():
    machine = Machine(pages=4, seqs=8, rows=8 + CHUNK_TOKENS)
    for _ in range(4):
        machine.add(PAGE_TOKENS, 1)  # the last token is never computed: one page each
    assert len(machine.step()) == 4
    machine = Machine(pages=4, seqs=8, rows=8 + CHUNK_TOKENS)
    for _ in range(4):
        machine.add(PAGE_TOKENS, 2)  # two pages each, before long
    assert len(machine.step()) == 2
    machine.step()
    assert machine.admission.num_preemptions == 0


def test_a_dropped_request_leaves_nothing():
    machine = Machine(pages=30, seqs=2, rows=2 + CHUNK_TOKENS)
    requests = [machine.add(8, 50, name=str(i)) for i in range(4)]
    machine.step()
    machine.admission.drop(requests[0])
    machine.admission.drop(requests[3])
    assert [c.request for c in machine.admission.running] == [requests[1]]
    assert [c.request for c in machine.admission.waiting] == [requests[2]]
    machine.step()
    machine.admission.drop(requests[1])
    machine.admission.drop(requests[2])
    assert machine.kv.num_free_pages == 30
    assert machine.admission.compose(PlainStarts()) == []


def test_longrope_follows_what_a_choice_could_have_in_any_memory():
    machine = Machine(pages=30, seqs=3, rows=3 + CHUNK_TOKENS, long_rope_after=16)
    machine.add(8, 8)
    machine.add(8, 9)
    machine.add(8, 8, longest=17)  # would go on if there were more pages
    assert [row.segment.long_rope for row in machine.step()] == [False, True, True]
    assert [row.segment.long_rope for row in machine.step()] == [False, True, True]


def _decoders(machine):
    """Names of those that decode, pass by pass, to the end."""
    names = []
    while machine.admission.running or machine.admission.waiting:
        rows = machine.step()
        names.append(
            "".join(r.sequence.request.request_id for r in rows if not r.segment.is_prompt)
        )
    return names


def test_few_decode_one_after_the_other_in_bursts():
    """Who ends hands over at once, who is left alone goes on."""
    machine = Machine(pages=100, seqs=4, rows=128, turns=Turns(4, 3))
    for name, tokens in (("a", 11), ("b", 4), ("c", 9)):  # the first of them from the prompt
        machine.add(8, tokens, name=name)
    assert _decoders(machine)[1:] == [*"aaaa", *"bbb", *"cccc", *"aaaa", *"cccc", *"aa"]
    assert machine.admission.turns.num_passes == 19


def test_whoever_comes_waits_behind_those_who_are_there():
    machine = Machine(pages=100, seqs=4, rows=128, turns=Turns(3, 4))
    for name in "ab":
        machine.add(8, 30, name=name)
    machine.step()
    assert [row.sequence.request.request_id for row in machine.step()] == ["a"]
    machine.add(8, 30, name="c")
    rows = machine.step()  # its prompt does not wait
    assert [row.segment.is_prompt for row in rows] == [False, True]
    assert "".join(_decoders(machine)).startswith("abbbcccaaabbb")


def test_more_than_few_decode_together():
    machine = Machine(pages=100, seqs=4, rows=128, turns=Turns(3, 2))
    for name, tokens in (("a", 9), ("b", 9), ("c", 3)):
        machine.add(8, tokens, name=name)
    assert _decoders(machine)[1:] == ["abc", "abc", *"aaa", *"bbb", *"aaa", *"bbb"]


def test_a_turn_without_pages_goes_to_the_next_at_once():
    """The youngest has the turn, finds no page, and gives way."""
    machine = Machine(pages=4, seqs=2, rows=128, turns=Turns(12, 2))
    machine.add(PAGE_TOKENS, 2 * PAGE_TOKENS + 1, name="a")
    machine.add(PAGE_TOKENS, PAGE_TOKENS + 1, name="b")
    assert _decoders(machine)[1:] == [*"a" * 16, "", *"b" * 8]
    assert machine.admission.num_preemptions == 1


def _turns(passes, *, lockstep_s, burst_s, handover_s=0.0, nums=(4,)):
    """Passes of so many sequences, one number after the other, on a clock that says what a token
    takes, and what the first pass of a turn takes more; how often each sequence decoded."""
    turns = Turns(16, 4, WindowGuard(window=2))
    counts = dict.fromkeys(range(max(nums)), 0)
    for at in range(passes):
        num = nums[at * len(nums) // passes]
        chosen = turns.choose(range(num))
        for one in chosen:
            counts[one] += 1
        is_burst = len(chosen) == 1
        noise = 1 + 0.01 * (at % 3)
        seconds = (burst_s if is_burst else lockstep_s) * len(chosen) * noise
        seconds += handover_s * (is_burst and turns.left == 15)
        turns.took(len(chosen), seconds)
    return turns, counts


def test_bursts_that_win_go_on_and_lockstep_is_tried_ever_more_rarely():
    turns, counts = _turns(10_000, lockstep_s=1.3, burst_s=1.0)
    assert not turns.have_lost and turns.num_passes > 9_800
    assert max(counts.values()) - min(counts.values()) <= 16, "a trial takes no turn away"


def test_bursts_that_lose_are_given_up():
    turns, _ = _turns(10_000, lockstep_s=1.0, burst_s=1.3)
    assert turns.have_lost and turns.num_passes < 2_000, "of 34,000 tokens"
    turns, _ = _turns(10_000, lockstep_s=1.0, burst_s=0.9, handover_s=4.0)
    assert turns.have_lost, "what a sequence reads when its turn comes counts"
    turns, _ = _turns(10_000, lockstep_s=1.0, burst_s=0.9, handover_s=0.5)
    assert not turns.have_lost


def test_more_than_few_are_neither_measured_nor_in_turn():
    turns, counts = _turns(1_000, lockstep_s=1.0, burst_s=1.3, nums=(6,))
    assert set(counts.values()) == {1_000} and turns.num_passes == 0 and not turns.have_lost


def test_numbers_of_sequences_that_change_decide_nothing():
    turns, _ = _turns(2_000, lockstep_s=1.0, burst_s=1.3, nums=(4, 3) * 40)
    assert not turns.have_lost and turns.num_passes > 1_900


def test_separate_passes_come_in_waves():
    """All prompts that there are places for, pass by pass, then decoding to the last end."""
    machine = Machine(pages=100, seqs=4, rows=128, mixed_prefill_rows=0)
    for length in (2, 3, 5, 2, 2, 2):
        machine.add(100, length)
    kinds = []
    while machine.admission.running or machine.admission.waiting:
        rows = machine.admission.compose(PlainStarts())
        kinds.append({row.segment.is_prompt for row in rows})
        machine.take(rows)
    names = ["prompts" if kind == {True} else "decode" for kind in kinds]
    assert all(len(kind) == 1 for kind in kinds), "a mixed pass"
    assert names == ["prompts"] * 4 + ["decode"] * 4 + ["prompts"] * 2 + ["decode"]
    assert len(machine.finished) == 6

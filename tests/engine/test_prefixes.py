"""Prompts that begin alike: pages found, shared, kept and given back; the same bits as without."""

import random
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amounts import rarely, some
from engines import engine_for, kept_cells, make_model, prompts, request, run_all
from sharing_machine import LONG_AFTER, PAGE_TOKENS, Machine, alone
from windlass.engine import prompt_scores
from windlass.engine.outputs import RequestOutput
from windlass.engine.prompt_scores import KnownScores
from windlass.engine.sequence import Sequence
from windlass.kvcache.pages import PagePool, block_keys
from windlass.schedule.batch import CHUNK_TOKENS, Scoring
from windlass.schedule.passes import run_pass


@st.composite
def streams(draw):
    """Requests with the moments at which they come and, some of them, are given up."""
    chance = random.Random(draw(st.integers(0, 10**6)))
    headers = [[chance.randrange(9) for _ in range(chance.choice((0, 63, 64, 130, 200)))]
               for _ in range(draw(st.integers(1, 3)))]  # fmt: skip
    found: list[dict[str, Any]] = []
    for i in range(draw(st.integers(1, 14))):
        own = [chance.randrange(9) for _ in range(chance.choice((0, 1, 20, 64, 90)))]
        prompt = chance.choice(headers) + own or [1]
        arrival = chance.randrange(25)
        if found and chance.random() < 0.3:  # another turn of a chat
            before = chance.choice(found)
            answer = alone(before["prompt"], 0, before["max_output"], is_long=False)
            prompt = (before["prompt"] + answer + own[:20])[:400]
            arrival += 40 * chance.randrange(2)
        found.append({
            "name": str(i), "prompt": prompt, "max_output": chance.randint(1, 80),
            "n": chance.choice((1, 1, 1, 3)), "scored": chance.random() < 0.4,
            "longest": chance.choice((0, 0, 500)), "arrival": arrival,
            "leaves": arrival + chance.randint(1, 12) if chance.random() < 0.15 else None,
        })  # fmt: skip
    return sorted(found, key=lambda one: one["arrival"])


def _run(machine, stream):
    todo, now, open_requests = list(stream), 0, {}
    admission = machine.admission
    while todo or admission.running or admission.waiting:
        while todo and todo[0]["arrival"] <= now:
            one = todo.pop(0)
            given = {k: v for k, v in one.items() if k not in ("arrival", "leaves")}
            open_requests[one["name"]] = machine.add(**given), one["leaves"]
        for name, (one, leaves) in list(open_requests.items()):
            if leaves is not None and leaves <= now:
                admission.drop(one)
                admission.check()
                del open_requests[name]
        machine.step()
        now += 1
        assert now < 20_000, "no end in sight"
    machine.kv.check({})
    return open_requests


def _machine(stream, spare, seqs, more_rows, **options):
    longest = max(len(one["prompt"]) + one["max_output"] for one in stream)
    pages = -(-longest // PAGE_TOKENS) + spare
    return Machine(pages=pages, seqs=seqs, rows=seqs + CHUNK_TOKENS + more_rows, **options)


@settings(max_examples=some(50, of=120), deadline=None)
@given(streams(), st.integers(0, 20), st.integers(1, 6), st.sampled_from((0, 70, 300)),
       st.sampled_from((None, 0, 64, 100)), st.sampled_from((None, None, 0, 1, 3)))  # fmt: skip
def test_results_are_those_without_sharing_whatever_comes(
    stream, spare, seqs, more_rows, mixed, states
):
    """On as few pages as the longest request needs, and more; with states, and few to keep."""
    shared = _machine(stream, spare, seqs, more_rows, mixed=mixed, kept_states=states)
    kept = _run(shared, stream)
    for one in stream:
        longest = max(one["longest"], len(one["prompt"]) + one["max_output"])
        for index in range(one["n"] if one["name"] in kept else 0):
            sequence = shared.finished[one["name"], index]
            assert sequence.output_ids == alone(
                one["prompt"], index, one["max_output"], is_long=longest > LONG_AFTER
            )
    found = shared.admission.prompt_pages
    assert found.num_found <= found.num_asked
    assert shared.kv.num_free_pages == shared.kv.num_pages
    without = _machine(stream, spare, seqs, more_rows, shares=False, mixed=mixed)
    _run(without, stream)
    assert without.admission.prompt_pages.num_found == 0
    for key in set(without.finished) & set(shared.finished):
        assert without.finished[key].output_ids == shared.finished[key].output_ids


# --- what is found --------------------------------------------------------------------------------

HEADER = list(range(200))  # 192 tokens in three blocks may be shared


def _own(i, length=30):
    return [1000 + i] * length


@pytest.mark.parametrize("rows", [10 + CHUNK_TOKENS, 10 + 200, 4000])
def test_a_prefix_is_computed_once_also_while_it_is_computed(rows):
    """Ten come at once: in one pass, or with the first still in its prompt for several."""
    machine = Machine(pages=200, seqs=10, rows=rows)
    for i in range(10):
        machine.add(str(i), HEADER + _own(i), 1)
    num_passes = 0
    while machine.admission.running or machine.admission.waiting:
        machine.step()
        num_passes += 1
    assert machine.prompt_rows == 192 + 10 * (8 + 30)
    assert num_passes == 1 if rows == 4000 else num_passes > 1
    found = machine.admission.prompt_pages
    assert (found.num_asked, found.num_found) == (10 * 230, 9 * 192)


def test_each_block_of_a_newcomer_is_looked_up_once():
    machine = Machine(pages=200, seqs=10, rows=4000)
    find = machine.kv.pool.find
    names: list[object] = []

    def watched(name):
        names.append(name)
        return find(name)

    machine.kv.pool.find = watched  # type: ignore[method-assign]
    for i in range(3):
        machine.add(str(i), HEADER + _own(i), 1)
    machine.step()
    assert len(names) == 3 * 3 + 3  # and once more where the first names them


def test_a_later_wave_finds_what_nobody_holds_until_its_pages_are_needed():
    machine = Machine(pages=16, seqs=4, rows=1000)
    machine.add("0", HEADER + _own(0), 1)
    machine.step()
    assert not machine.admission.running and machine.kv.num_free_pages == 16
    machine.add("1", HEADER + _own(1), 1)
    machine.step()
    assert machine.prompt_rows == 230 + 38
    machine.add("2", _own(2, 500), 1)  # all pages
    machine.step()
    before = machine.prompt_rows
    machine.add("3", HEADER + _own(3), 1)
    machine.step()
    assert machine.prompt_rows == before + 230


def _found(pool, name):
    block = pool.find(name)
    assert block is not None
    return block


def test_what_was_used_longest_ago_is_forgotten_first_and_tails_before_heads():
    pool = PagePool(8)
    for name in "abc":
        pages = pool.take(2)
        pool.name(name, pages)
        _found(pool, name).is_full = True
        pool.give(pages)
    pool.hold(_found(pool, "a"))
    pool.give(list(_found(pool, "a").pages))  # now b is the oldest
    pool.take(4)
    assert [pool.find(name) is not None for name in "abc"] == [True, False, True]
    pool = PagePool(4)
    pages = pool.take(4)
    for name, part in (("head", pages[:2]), ("tail", pages[2:])):
        pool.name(name, part)
        _found(pool, name).is_full = True
    pool.give(pages)
    pool.take(1)
    assert pool.find("head") is not None and pool.find("tail") is None


def test_a_block_that_nobody_filled_is_not_kept():
    machine = Machine(pages=20, seqs=4, rows=4 + CHUNK_TOKENS)
    first = machine.add("0", HEADER + _own(0), 5)
    machine.step()  # one block of three
    machine.admission.drop(first)
    machine.admission.check()
    machine.add("1", HEADER + _own(1), 1)
    before = machine.prompt_rows
    while machine.admission.running or machine.admission.waiting:
        machine.step()
    assert machine.prompt_rows == before + 230 - CHUNK_TOKENS


def test_the_others_go_on_where_the_first_was_given_up():
    """It had computed one block of three; they hold the other two and compute them, once."""
    machine = Machine(pages=40, seqs=4, rows=4 + CHUNK_TOKENS)
    first = machine.add("0", HEADER + _own(0), 5)
    machine.step()
    for i in (1, 2):
        machine.add(str(i), HEADER + _own(i, 60), 1)
    machine.step()  # the first goes on; the others have not begun, or hold what it computes
    machine.admission.drop(first)
    machine.admission.check()
    while machine.admission.running or machine.admission.waiting:
        machine.step()
    assert machine.prompt_rows == 192 + 2 * 68


def test_choices_share_the_prompt_and_scored_ones_too():
    machine = Machine(pages=100, seqs=8, rows=4000)
    machine.add("0", HEADER, 3, n=4)
    machine.step()
    assert machine.prompt_rows == 200 + 3 * 8
    machine = Machine(pages=100, seqs=8, rows=4000)
    machine.add("0", HEADER, 3, n=4, scored=True)  # only the first sequence scores
    machine.add("1", HEADER, 3, scored=True)
    machine.step()
    assert machine.prompt_rows == 200 + 3 * 8 + 8
    assert machine.admission.prompt_pages.num_asked == 5 * 200


def _rows(machine, name, prompt, **options):
    """Rows of the prompt that are computed, some time after all others."""
    before = machine.prompt_rows
    machine.add(name, prompt, 1, **options)
    while machine.admission.running or machine.admission.waiting:
        machine.step()
    return machine.prompt_rows - before


def test_a_scored_prompt_computes_rows_that_nobody_scored_before_this_token():
    machine = Machine(pages=100, seqs=8, rows=4000)
    assert _rows(machine, "0", HEADER) == 200
    assert _rows(machine, "1", HEADER, scored=True) == 200  # pages are known, scores are not
    assert len(machine.kv.pool._named) == 3  # computed again where they were
    assert _rows(machine, "2", HEADER, scored=True) == 8
    assert _rows(machine, "3", [*HEADER[:192], 5], scored=True) == 65  # what follows is another
    assert _rows(machine, "4", [*HEADER[:192], 5, 5], scored=True) == 2
    assert _rows(machine, "5", HEADER[:192], scored=True) == 64  # its last token is computed
    assert _rows(machine, "6", HEADER, scored=True, longest=LONG_AFTER + 1) == 200
    machine.admission.restart()  # a pass has failed
    assert _rows(machine, "7", HEADER, scored=True) == 200


@pytest.mark.parametrize("start, others", [(192, 72), (193, 8), (199, 8), (128, 136)])
def test_rows_before_the_first_that_is_scored_need_no_scores(start, others):
    machine = Machine(pages=100, seqs=8, rows=4000)
    assert _rows(machine, "0", HEADER) == 200
    assert _rows(machine, "1", HEADER, scored=True, start=start) == others
    assert _rows(machine, "2", HEADER, scored=True, start=start) == 8
    assert _rows(machine, "3", HEADER, scored=True) == 200
    pages = machine.admission.prompt_pages
    assert pages.num_asked == 4 * 200


def test_what_is_known_of_scores_is_bounded():
    known, scoring = KnownScores(), Scoring(top=20)
    first = known.begin("first", scoring)
    kept = prompt_scores._MOST // (CHUNK_TOKENS * 21)
    for i in range(kept - 1):
        known.begin(i, scoring)
    assert known.find("first") is first
    known.begin("one more", scoring)
    assert known.find("first") is first and known.find(0) is None and known.find(1) is not None
    assert known.begin("first", scoring) is not first
    assert known.find(2) is not None
    known.forget_all()
    assert known.find("first") is None


def test_the_last_token_of_a_prompt_is_always_computed():
    machine = Machine(pages=100, seqs=8, rows=4000)
    machine.add("0", HEADER[:128], 3, n=2)
    machine.step()
    assert machine.prompt_rows == 128 + CHUNK_TOKENS
    machine.add("1", HEADER, 1)  # for a longer prompt its last block counts too
    machine.step()
    assert machine.prompt_rows == 128 + CHUNK_TOKENS + 72


def test_longrope_positions_are_shared_among_themselves_only():
    machine = Machine(pages=100, seqs=8, rows=4000)
    machine.add("0", HEADER, 1)
    machine.add("1", HEADER, 1, longest=500)
    machine.step()
    assert machine.prompt_rows == 400
    machine.add("2", HEADER, 1, longest=600)
    machine.step()
    assert machine.prompt_rows == 408


def test_keys_tell_all_that_came_before():
    one = block_keys([*range(64), *range(64)], 64)
    assert len(one) == 2 and one[0] != one[1]
    assert block_keys(range(64), 64) == one[:1] and block_keys(range(63), 64) == ()
    other = block_keys([1, *range(1, 64), *range(64)], 64)
    assert other[0] != one[0] and other[1] != one[1]
    assert block_keys([256, *range(63)], 64) != block_keys([1, *range(63)], 64)


def test_what_is_left_of_a_prompt_decides_whether_it_fits():
    machine = Machine(pages=100, seqs=4, rows=4 + CHUNK_TOKENS)
    machine.add("0", HEADER, 1)
    while machine.admission.running or machine.admission.waiting:
        machine.step()
    machine.add("1", HEADER + [5] * 30, 1)
    machine.add("2", HEADER + [6] * 10, 1)  # 18 left, in a pass with room for 30
    assert [row.segment.num_tokens for row in machine.step()] == [38, 18]


def _admitted(machine):
    """Names in the order in which requests are admitted, where each ends in its first pass."""
    order = []
    while machine.admission.running or machine.admission.waiting:
        order += [row.sequence.request.request_id for row in machine.step()]
    return order


def test_prompts_that_begin_alike_are_admitted_one_after_the_other():
    for shares in (False, True):
        machine = Machine(pages=8, seqs=9, rows=4000, shares=shares)
        for i in range(3):
            machine.add(f"a{i}", HEADER + _own(i), 1)
            machine.add(f"b{i}", [7] * 100 + _own(i), 1)
            machine.add(f"c{i}", HEADER[:128] + [8] * 64 + _own(i), 1)
        order = _admitted(machine)
        if shares:  # a2 is more like a1 than c0 is, which is more like a2 than b0 is
            assert order == ["a0", "a1", "a2", "c0", "c1", "c2", "b0", "b1", "b2"]
        else:
            assert order == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]


def test_nothing_is_passed_over_for_long():
    machine = Machine(pages=8, seqs=3, rows=4000)
    for i, name in enumerate(["a0", "b0", *(f"a{i}" for i in range(1, 9))]):
        machine.add(name, ([7] * 200 if name == "b0" else HEADER) + _own(i), 1)
    assert _admitted(machine)[:6] == ["a0", "a1", "a2", "a3", "b0", "a4"]


def test_what_gave_way_is_not_passed_over():
    machine = Machine(pages=30, seqs=4, rows=4000, ends=False)
    for i, name in enumerate("abc"):
        machine.add(name, ([7] * 200 if name == "b" else HEADER) + _own(i), 9)
    machine.step()
    assert [one.request.request_id for one in machine.admission.running] == ["a", "c", "b"]
    machine.admission.restart()
    machine.step()
    assert [one.request.request_id for one in machine.admission.running] == ["a", "c", "b"]


def test_admission_counts_shared_pages_once():
    """Six pages of a header and two for each: room for six, or one without sharing."""
    for shares, running in ((True, 6), (False, 2)):
        machine = Machine(pages=18, seqs=10, rows=4000, shares=shares, ends=False)
        for i in range(10):
            machine.add(str(i), HEADER[:192] + _own(i, 40), 20)
        machine.step()
        assert len(machine.admission.running) == running


@pytest.mark.parametrize("mixed", [None, 0, 64, 100])
def test_prompt_rows_beside_decoding_are_bounded(mixed):
    machine = Machine(pages=200, seqs=8, rows=8 + 500, shares=False, mixed=mixed)
    machine.add("0", [1] * 10, 6)
    machine.step()
    machine.step()  # decodes: the wave is full
    assert machine.prompt_rows == 10
    machine.add("1", [2] * 300, 6)
    machine.step()
    assert machine.prompt_rows == 10 + {None: 300, 0: 0, 64: 64, 100: 64}[mixed]
    while machine.admission.running or machine.admission.waiting:
        machine.step()
    assert machine.prompt_rows == 310


@settings(max_examples=some(6, of=20), deadline=None)  # of a tenth of a second each
@given(st.integers(0, 10**6), st.sampled_from((None, 0, 64)), st.booleans())
def test_at_the_smallest_budget_all_end_before_long(seed, mixed, shares):
    """Every sequence grows to all the pages there are, so each drives the others out: none is
    computed again more often than there are others to give way to."""
    chance = random.Random(seed)
    machine = Machine(pages=8, seqs=6, rows=6 + CHUNK_TOKENS, mixed=mixed, shares=shares,
                      ends=False)  # fmt: skip
    lengths = chance.sample((1, 31, 64, 120, 150, 200), 6)
    for i, length in enumerate(lengths):
        machine.add(str(i), [7 + i % 2] * length, 8 * PAGE_TOKENS - length)
    num_passes = rows = 0
    while machine.admission.running or machine.admission.waiting:
        rows += sum(row.segment.num_tokens for row in machine.step())
        num_passes += 1
    assert len(machine.finished) == 6
    assert machine.admission.num_preemptions > 0 or mixed == 0
    assert machine.admission.num_preemptions < 15  # 6 * 5 / 2
    total = sum(sequence.num_tokens for sequence in machine.finished.values())
    assert num_passes <= total and rows <= 2 * total


# --- real models ----------------------------------------------------------------------------------

# heads, sinks and windows, latent attention, LongRoPE; rows as stored and as int8
MODELS = [("qwen3_moe", "auto"), ("deepseek_v3", "auto"), ("phimoe", "auto"), ("gpt_oss", "int8"),
          *rarely([("gpt_oss", "auto"), ("deepseek_v3", "int8")])]  # fmt: skip


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def engine_of(request, tmp_path_factory):
    family, kv_cache_dtype = request.param
    path = tmp_path_factory.mktemp(family)
    make_model(family, path, dtype=torch.bfloat16)
    return partial(engine_for, path, kv_cache_dtype=kv_cache_dtype)


def _wanted():
    """Requests with two headers, one inside a block; several sequences, scores, sampling."""
    first, second = prompts((140, 70), seed=1)
    own = prompts((30, 3, 70, 1, 12, 40))
    sampled = {"temperature": 0.9, "seed": 5}
    return [
        request("0", first + own[0], max_tokens=40, logprobs=2),
        request("1", second + own[1], max_tokens=50, logprobs=2, **sampled),
        request("2", first + own[2], max_tokens=30, logprobs=2, n=3, **sampled),
        request("3", first[:128], max_tokens=20, logprobs=2),
        request("4", first + own[3], max_tokens=3, logprobs=2, prompt_logprobs=0, n=2, **sampled),
        request("5", second + own[4], max_tokens=30, logprobs=2, prompt_logprobs=3),
        request("6", first[:128], max_tokens=20, logprobs=2),
        request("7", first + own[5], max_tokens=4, logprobs=2, prompt_logprobs=0),
        request("8", first + own[5], max_tokens=1, prompt_logprobs=1, prompt_logprob_start=150),
        request("9", second + own[0], max_tokens=2, prompt_logprobs=3),
    ]


def _bits(results):
    return {
        name: (
            [(c.token_ids, c.cumulative_logprob, c.logprobs, c.finish_reason) for c in one.outputs],
            one.prompt_logprobs,
        )
        for name, one in results.items()
    }


def test_keys_and_values_of_a_prompt_do_not_depend_on_its_chunks(engine_of):
    """In one pass, in chunks of 64 and 128 rows, in small micro-batches, beside others, and after
    another sequence has computed the first 128 rows."""
    (header, own) = prompts((150, 77), seed=3)
    one = request("one", header + own, max_tokens=4)
    other = request("other", header + own[:9], max_tokens=4)
    found = []
    for rows, micro, before in ((512, 512, []), (72, 64, []), (140, 100, []), (512, 65, [other]),
                                (72, 64, [other])):  # fmt: skip
        with engine_of(max_num_batched_tokens=rows, micro_batch_size=micro) as engine:
            for each in [*before, one]:
                engine.add(each)
            chosen: list[Sequence] = []
            while not chosen or chosen[0].in_prompt:
                engine.step()
                chosen = [c for c in engine._admission.running if c.request is one]
            assert chosen[0].num_cached == (128 if before else 0)
            found.append(kept_cells(engine, chosen[0], chosen[0].num_prompt))
    assert found[0] and all(tensor.float().abs().sum() > 0 for tensor in found[0])
    for got in found[1:]:
        assert all(map(torch.equal, got, found[0]))


@pytest.fixture(scope="module")
def without(engine_of):
    """Results of all requests with nothing shared, and the engine's counts."""
    with engine_of(enable_prefix_caching=False) as engine:
        assert "shared prompt prefixes not looked for" in engine.plan.lines()[-1]
        results = run_all(engine, _wanted())
        return results, engine.stats()


@pytest.mark.parametrize("rows", [72, 1000])
def test_bits_are_those_without_sharing(engine_of, without, rows):
    expected, counts = without
    assert all(one.num_cached_tokens == 0 for one in expected.values())
    assert (counts.prefix_cache_queries, counts.prefix_cache_hits) == (0, 0)
    with engine_of(max_num_batched_tokens=rows) as engine:
        assert "shared prompt prefixes computed once" in engine.plan.lines()[-1]
        results = run_all(engine, _wanted())
        stats = engine.stats()
        again = run_all(engine, _wanted())  # after all have ended
        later = engine.stats()
    assert _bits(results) == _bits(again) == _bits(expected)
    # of 0, 2 (three sequences), the second of 4, and 7: blocks of the first header but one time
    assert stats.prefix_cache_hits >= 5 * 128
    assert stats.prompt_tokens + stats.prefix_cache_hits == counts.prompt_tokens
    assert later.prefix_cache_hits >= 2 * stats.prefix_cache_hits
    cached = {name: one.num_cached_tokens for name, one in results.items()}
    assert (cached["4"], cached["7"], cached["8"]) == (0, 128, 128)


@pytest.mark.parametrize("pages", [8, 10])
def test_bits_are_those_without_sharing_on_few_pages(engine_of, without, pages):
    """As few as the longest request takes: one runs nearly alone. With two more they compete."""
    with engine_of(max_num_batched_tokens=140) as engine:
        kv = engine._admission._kv.device
        kv.num_pages, kv.pool = pages, PagePool(pages)  # as if others had the rest
        results = run_all(engine, _wanted())
        stats = engine.stats()
        engine.check()
    assert stats.prefix_cache_hits > 0 and (stats.num_preemptions > 0 or pages == 8)
    assert _bits(results) == _bits(without[0])


def test_a_pass_that_failed_leaves_nothing_to_be_found(engine_of, without, monkeypatch):
    with engine_of() as engine:
        calls = []

        def failing(runtime, shape, batch):
            calls.append(batch)
            if len(calls) in (1, 3):
                raise OSError("the disk is gone")
            return run_pass(runtime, shape, batch)

        monkeypatch.setattr("windlass.engine.engine.run_pass", failing)
        for one in _wanted():
            engine.add(one)
        results: dict[str, RequestOutput] = {}
        while engine.has_work:
            try:
                results |= {one.request_id: one for one in engine.step().finished}
            except OSError:
                assert not engine._admission.running
            engine.check()
        assert len(calls) > 3
    assert _bits(results) == _bits(without[0])

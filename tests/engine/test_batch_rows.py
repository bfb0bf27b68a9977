"""Sequences of batches beside others: they have what those leave, and lose nothing."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from admission_machine import PAGE_TOKENS, Machine
from engines import engine_for, make_model, prompts, request, run_all
from windlass.engine.bursts import Turns
from windlass.engine.outputs import RequestOutput
from windlass.schedule.batch import CHUNK_TOKENS

SIZES = st.tuples(st.integers(1, 150), st.integers(1, 60))


def names(rows):
    return [row.sequence.request.request_id for row in rows]


@settings(max_examples=30, deadline=None)
@given(
    batch=st.lists(SIZES, min_size=1, max_size=8),
    others=st.lists(st.tuples(st.integers(0, 60), SIZES), max_size=6),
    spare=st.integers(0, 12),
    seqs=st.integers(1, 5),
    more_rows=st.integers(0, 70),
    has_states=st.booleans(),
    bursts=st.sampled_from(((0, 0), (5, 3))),
    mixed=st.sampled_from((None, CHUNK_TOKENS)),
)
def test_all_end_and_others_run_as_if_there_were_no_batch(
    batch, others, spare, seqs, more_rows, has_states, bursts, mixed
):
    """Passes until others have ended: none more than without a batch."""
    sizes = [*batch, *(size for _, size in others)]
    pages = max(-(-(prompt + output) // PAGE_TOKENS) for prompt, output in sizes) + spare

    def ends(with_batch):
        machine = Machine(
            pages=pages, seqs=seqs, rows=seqs + CHUNK_TOKENS + more_rows, states=seqs * has_states,
            turns=Turns(*bursts), mixed_prefill_rows=mixed,
        )  # fmt: skip
        for size in batch if with_batch else ():
            machine.add(*size, name="b", is_batch=True)
        todo = sorted(others, key=lambda one: one[0])
        now, ended = 0, []
        while todo or machine.admission.running or machine.admission.waiting:
            while todo and todo[0][0] <= now:
                machine.add(*todo.pop(0)[1], name="o")
            now += 1
            if machine.admission.running or machine.admission.waiting:
                before = len(machine.finished)
                machine.step()
                ended += [now] * sum(
                    not sequence.is_batch for sequence in machine.finished[before:]
                )
            assert now < 20_000, "no end in sight"
        assert machine.kv.num_free_pages == pages
        wanted = [*batch * with_batch, *(size for _, size in others)]
        assert sorted((c.num_prompt, len(c.output_ids)) for c in machine.finished) == sorted(wanted)
        return ended

    alone, beside = ends(with_batch=False), ends(with_batch=True)
    if mixed is None:
        assert all(b <= a for a, b in zip(alone, beside, strict=True))


def test_who_comes_has_a_place_pages_and_rows_in_the_same_pass():
    machine = Machine(pages=8, seqs=2, rows=2 + CHUNK_TOKENS)
    for name in "ab":
        machine.add(3 * PAGE_TOKENS, 8, name=name, is_batch=True)
    machine.add(8, 8, name="c", is_batch=True)
    while len(machine.admission.running) < 2 or any(c.in_prompt for c in machine.admission.running):
        machine.step()
    machine.add(CHUNK_TOKENS - 8, 4, name="now")  # all pages, and a place
    assert names(machine.step()) == ["now"]
    assert machine.admission.num_preemptions == 2
    assert [one.request.request_id for one in machine.admission.waiting] == ["a", "b", "c"]
    machine.add(8, 2, name="next")
    while machine.admission.running or machine.admission.waiting:
        machine.step()
    assert [c.request.request_id for c in machine.finished] == ["now", "next", "a", "b", "c"]


def test_a_long_prompt_of_a_batch_waits_for_the_rows_that_are_left():
    machine = Machine(pages=100, seqs=3, rows=3 + CHUNK_TOKENS)
    machine.add(6 * CHUNK_TOKENS, 2, name="long", is_batch=True)
    machine.step()
    machine.add(CHUNK_TOKENS, 3, name="now")
    assert names(machine.step()) == ["now"]
    assert names(machine.step()) == ["now", "long"]
    assert machine.admission.num_preemptions == 0


def test_in_bursts_a_batch_has_no_turn_while_others_decode():
    machine = Machine(pages=100, seqs=4, rows=128, turns=Turns(3, 4))
    machine.add(8, 20, name="b", is_batch=True)
    for _ in range(3):
        machine.step()
    machine.add(8, 5, name="x")
    machine.add(8, 5, name="y")
    machine.step()
    decoded = [names(machine.step()) for _ in range(8)]
    assert decoded == [["x"]] * 3 + [["y"]] * 3 + [["x"], ["y"]]
    assert names(machine.step()) == ["b"]


def test_a_wave_of_a_batch_is_not_waited_for():
    machine = Machine(pages=100, seqs=2, rows=128, mixed_prefill_rows=0)
    for name in "ab":
        machine.add(8, 30, name=name, is_batch=True)
    machine.step()
    machine.step()
    machine.add(8, 2, name="now")
    assert names(machine.step()) == ["now"]
    assert names(machine.step()) == ["now", "a"]


def test_what_gave_way_has_the_same_bits(tmp_path):
    """On a model: two places, three batch requests, others that come again and again."""
    make_model("qwen3_moe", tmp_path)
    batch = [
        replace(
            request(f"b{i}", p, max_tokens=24, temperature=0.9, seed=i, logprobs=2), is_batch=True
        )
        for i, p in enumerate(prompts((70, 9, 20)))
    ]
    others = [request(f"o{i}", p, max_tokens=4) for i, p in enumerate(prompts([40] * 6, seed=1))]
    with engine_for(tmp_path, max_num_seqs=2) as engine:
        alone = run_all(engine, batch)
    results: dict[str, RequestOutput] = {}
    left, steps = list(others), 0
    with engine_for(tmp_path, max_num_seqs=2) as engine:
        for one in batch:
            engine.add(one)
        while engine.has_work:
            if steps % 5 == 3 and left:
                engine.add(left.pop())
                engine.add(left.pop())
                waiting = engine.stats()
                assert waiting.waiting - waiting.waiting_batch == 2
                assert waiting.running_batch == waiting.running
                results |= {one.request_id: one for one in engine.step().finished}
                assert engine.stats().running_batch == 0  # both began in that pass
            results |= {one.request_id: one for one in engine.step().finished}
            engine.check()
            steps += 1
        assert engine.stats().num_preemptions >= 4
    assert len(results) == 9
    for name, output in alone.items():
        assert results[name].outputs == output.outputs

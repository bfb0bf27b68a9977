"""Passes by counts against the engine's own admission, pass by pass."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from admission_machine import PAGE_TOKENS, Machine
from amounts import some
from sequences import PlainStarts
from sharing_machine import Machine as Sharing
from windlass.engine.bursts import Turns
from windlass.perf.job_passes import Limits, compose
from windlass.perf.op_cost import Seen, seen_by
from windlass.schedule.batch import CHUNK_TOKENS
from windlass.workload import Workload

SIZES = st.tuples(st.integers(1, 150), st.integers(1, 90))


def _engine_passes(sizes, limits):
    """(decode rows, positions they see, prompt rows, positions, logits) of each pass."""
    machine = Machine(
        pages=limits.num_pages, seqs=limits.max_seqs, rows=limits.max_rows,
        mixed_prefill_rows=limits.mixed_prefill_rows,
        turns=Turns(limits.burst_tokens, limits.burst_max_seqs),
    )  # fmt: skip
    for prompt, output in sizes:
        machine.add(prompt, output)
    passes = []
    while machine.admission.waiting or machine.admission.running:
        counts = [0, 0, 0, 0, 0]
        rows = machine.admission.compose(PlainStarts())
        machine.take(rows)
        for _, segment in rows:
            at = 2 if segment.is_prompt else 0
            last = segment.first_position + segment.num_tokens
            counts[at] += segment.num_tokens
            counts[at + 1] += sum(range(segment.first_position + 1, last + 1))
            counts[4] += segment.wants_logits
        passes.append(tuple(counts))
    return passes


@settings(max_examples=some(50, of=150), deadline=None)
@given(
    st.lists(SIZES, min_size=1, max_size=14), st.integers(1, 8), st.integers(0, 200),
    st.integers(0, 60), st.sampled_from((None, None, 0, 64, 128)),
    st.sampled_from(((0, 0), (1, 8), (5, 3), (16, 8))),
)  # fmt: skip
def test_the_same_passes_as_the_engine(sizes, seqs, more_rows, more_pages, mixed, bursts):
    least = max(-(-(p + o - 1) // PAGE_TOKENS) for p, o in sizes)
    limits = Limits(
        seqs + CHUNK_TOKENS + more_rows, seqs, least + more_pages, PAGE_TOKENS, mixed, *bursts
    )
    expected = _engine_passes(sizes, limits)
    at = 0
    for run in compose(Workload(*zip(*sizes, strict=True)), limits):
        group, at = expected[at : at + run.repeats], at + run.repeats
        assert len(group) == run.repeats
        seen = run.seen
        for counts in group:
            assert counts[0] == seen.decode_rows and counts[2] == seen.prompt_rows
            assert counts[4] == run.num_logits
        assert seen.decode_positions == pytest.approx(sum(c[1] for c in group) / run.repeats)
        assert seen.prompt_positions == pytest.approx(sum(c[3] for c in group) / run.repeats)
    assert at == len(expected)


@example([(1, 1)] * 3, 192, 2, 0, None)  # the second waits for the first to have computed all
@settings(max_examples=some(20, of=60), deadline=None)
@given(
    st.lists(SIZES, min_size=1, max_size=14), st.sampled_from((0, 40, 64, 130, 192)),
    st.integers(1, 8), st.sampled_from((0, 64, 200, 3000)), st.sampled_from((None, None, 0, 64)),
)  # fmt: skip
def test_rows_of_prompts_that_begin_alike_are_those_of_the_engine(sizes, header, seqs, more, mixed):
    """With pages for all: whose pages are counted as if nothing was shared."""
    machine = Sharing(pages=1000, seqs=seqs, rows=seqs + CHUNK_TOKENS + more, mixed=mixed,
                      ends=False)  # fmt: skip
    for i, (own, output) in enumerate(sizes):
        machine.add(str(i), [*range(header), *[-1 - i] * own], output, longest=1000)
    seen, num_passes = Seen(0, 0.0, 0, 0.0), 0
    while machine.admission.waiting or machine.admission.running:
        seen += seen_by([segment for _, segment in machine.step()])
        num_passes += 1
    found = header // CHUNK_TOKENS * CHUNK_TOKENS
    lengths = [(header + p, o, found if i else 0) for i, (p, o) in enumerate(sizes)]
    limits = Limits(seqs + CHUNK_TOKENS + more, seqs, 1000, PAGE_TOKENS, mixed)
    runs = list(compose(Workload(*zip(*lengths, strict=True)), limits))
    assert sum(r.repeats for r in runs) == num_passes
    assert sum(r.repeats * r.seen.prompt_rows for r in runs) == seen.prompt_rows
    assert sum(r.repeats * r.seen.decode_rows for r in runs) == seen.decode_rows
    near = pytest.approx
    assert sum(r.repeats * r.seen.prompt_positions for r in runs) == near(seen.prompt_positions)
    assert sum(r.repeats * r.seen.decode_positions for r in runs) == near(seen.decode_positions)


def test_equal_passes_are_one_run():
    runs = list(compose(Workload.from_lengths(64, 1000, 8), Limits(1024, 8, 10_000, 32)))
    assert sum(run.repeats for run in runs) == 1000
    assert len(runs) == 2
    limits = Limits(1024, 8, 10_000, 32, burst_tokens=16, burst_max_seqs=8)
    bursts = list(compose(Workload.from_lengths(64, 1000, 8), limits))
    assert sum(run.repeats for run in bursts) == 8 * 999 + 1 and len(bursts) == 8 * 63 + 1

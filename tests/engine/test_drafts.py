"""Guesses out of a text, and whether they pay: on made-up clocks, without a model."""

import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admission_machine import PAGE_TOKENS, Machine
from drafters import Eager, Oracle
from planning import SPECS, sizes_of
from sequences import PlainStarts
from windlass.engine.bursts import Turns
from windlass.engine.draft_costs import Chances, RowCost, most_useful
from windlass.engine.drafting import Drafting
from windlass.engine.drafts import Guess, PromptLookup, bytes_per_known_token
from windlass.engine.request import Request
from windlass.engine.sequence import QueuedSequence
from windlass.errors import UsageError
from windlass.params import SamplingParams
from windlass.phases import PhaseStats
from windlass.planner.budget import bytes_here, make_plan
from windlass.planner.constraints import PlanConstraints
from windlass.schedule.batch import CHUNK_TOKENS, Segment
from windlass.speculative import SpeculativeConfig
from windlass.units import GIB

CONFIG = SpeculativeConfig(method="ngram")


# --- prompt lookup --------------------------------------------------------------------------------


def _searched(tokens: list[int], count: int) -> Guess:
    """The same by looking everywhere."""
    for n in (3, 2, 1):
        for place in range(len(tokens) - 1, n - 1, -1):
            if len(tokens) > n and tokens[place - n : place] == tokens[-n:]:
                found = tokens[place:]
                while len(found) < count:
                    found = found + found
                return Guess(tuple(found[:count]), n)
    return Guess((), 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 20))
def test_a_guess_is_what_followed_last(tokens, count, first):
    lookup = PromptLookup(CONFIG)
    lookup.extend(tokens[:first])
    for token in tokens[first:]:
        lookup.extend([token])
    assert lookup.guess(count) == _searched(tokens, count)


def test_a_long_text_is_known_at_once_and_grows_quickly():
    chance = random.Random(0)
    text = [chance.randrange(1000) for _ in range(100_000)]
    lookup = PromptLookup(CONFIG)
    begin = time.process_time()
    lookup.extend(text)
    right = 0
    for place in range(50_000, 50_400):
        lookup.extend([text[place]])
        right += lookup.guess(4).token_ids == tuple(text[place + 1 : place + 5])
    assert right > 0.75 * 400  # the rest: another entry has its place in the table
    assert time.process_time() - begin < 5.0  # looking everywhere takes minutes
    arrays = [lookup._tokens, *lookup._tables.values()]
    taken = sum(one.buffer_info()[1] * one.itemsize for one in arrays)
    assert taken <= bytes_per_known_token(CONFIG) * len(lookup._tokens)


def test_known_many_at_once_or_one_by_one_is_the_same():
    chance = random.Random(1)
    text = [chance.randrange(20) for _ in range(900)]
    one, all_of_it = PromptLookup(CONFIG), PromptLookup(CONFIG)
    all_of_it.extend(text)
    for token in text:
        one.extend([token])
    assert one._tables == all_of_it._tables and one.guess(4) == all_of_it.guess(4) != Guess((), 0)


# --- what is said of them -------------------------------------------------------------------------


def test_bounds_are_those_of_vllm():
    read = SpeculativeConfig.read
    assert read('{"method": "ngram"}') == read(
        {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3,
         "prompt_lookup_min": 1}
    )  # fmt: skip
    assert read({"method": "ngram", "prompt_lookup_max": 4}).prompt_lookup_min == 4
    assert read({"method": "ngram", "prompt_lookup_min": 2}).prompt_lookup_max == 2
    assert read({"method": "mtp"}) == read({"method": "mtp", "num_speculative_tokens": 1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "speculative_config: not readable as JSON"),
        ([], r"speculative_config: got \[\], allowed an object"),
        ({}, "speculative_config: method is missing: allowed ngram, mtp"),
        ({"method": "eagle"}, "method: got 'eagle', allowed ngram, mtp"),
        ({"method": "mtp", "num_speculative_tokens": 2}, "got 2, allowed 1 with method mtp"),
        ({"method": "mtp", "prompt_lookup_max": 2}, "prompt_lookup_min: allowed with method"),
        ({"method": "ngram", "model": "x"}, "unknown key: model"),
        ({"method": "ngram", "num_speculative_token": 1}, "did you mean num_speculative_tokens"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "got 0, allowed an integer from 1 to"),
        ({"method": "ngram", "num_speculative_tokens": True}, "got True"),
        ({"method": "ngram", "prompt_lookup_max": 0}, "prompt_lookup_max: got 0"),
        ({"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3}, "from 1 to 2"),
    ],
)
def test_what_is_not_known_is_one_error(given, message):
    with pytest.raises(UsageError, match=message):
        SpeculativeConfig.read(given)


# --- chances and costs ----------------------------------------------------------------------------


def test_a_new_sequence_is_believed_what_others_did():
    everyone = Chances()
    assert everyone.of(3, 0) == 0.0  # nothing is known: nothing is computed
    first = Chances(everyone)
    for _ in range(100):
        first.add(3, 0, True)
        first.add(1, 0, False)
    assert Chances(everyone).of(3, 0) > 0.9 and Chances(everyone).of(1, 0) == 0.0
    for _ in range(50):
        first.add(3, 0, False)
    assert first.of(3, 0) < 0.15


def test_as_many_as_bring_most():
    assert most_useful([0.9, 0.8, 0.7], 0.0) == 3
    assert most_useful([0.9, 0.8, 0.1], 0.5) == 2
    assert most_useful([0.5], 0.5) == 0  # at its cost a guess brings nothing
    assert most_useful([], 0.1) == 0


def test_before_a_row_is_measured_its_cost_follows_the_link():
    costs, hopes = [], []
    for waiting in (0.0, 0.5, 1.0):
        cost = RowCost(1)
        for _ in range(10):
            cost.add(1.0, waiting, 0)
        assert not cost.is_measured
        costs.append(cost.value())
        hopes.append(cost.hoped)
    assert costs == pytest.approx([0.5, 0.715, 0.93])
    assert hopes == pytest.approx([0.2, 0.429, 0.744])
    for _ in range(10):
        cost.add(1.5, 0.0, 2)
    assert cost.is_measured and cost.value() == pytest.approx(0.25)


# --- the guard, on a made-up clock ----------------------------------------------------------------


class _Wrong:
    def extend(self, token_ids):
        pass

    def guess(self, count):
        return Guess((999,) * count, 1)


ANSWER = [random.Random(7).randrange(900) for _ in range(3000)]


def _seconds(make, row_cost, *, noise=0.2, later=0.0, stall=0.0, tokens=2000):
    """What `tokens` take, a plain pass taking a second. `later`: what a guessed row adds to each of
    the ten passes after it. `stall`: what others hold up three passes of a hundred, not counted."""
    chance = random.Random(3)
    request = Request("r", (1, 2), SamplingParams(max_tokens=5000), "")
    sequence = PlainStarts().start(QueuedSequence(request, 0, 5000, 5000))
    sequence.number = 0
    sequence.output_ids = [ANSWER[0]]
    drafting = Drafting(4, make)
    total, trail = 0.0, [0] * 10
    while len(sequence.output_ids) < tokens:
        drafts = drafting.propose(sequence)
        place = len(sequence.output_ids)
        right = next((i for i, t in enumerate(drafts) if t != ANSWER[place + i]), len(drafts))
        sequence.output_ids += ANSWER[place : place + right + 1]
        seconds = 1 + row_cost * len(drafts) + later * sum(trail)
        seconds *= 1 + noise * chance.uniform(-1, 1)
        total += seconds
        seconds += stall * (chance.random() < 0.03)
        trail = [*trail[1:], len(drafts)]
        segment = Segment(
            sequence=0, token_ids=(0, *drafts), first_position=place, pages=(), state_slot=-1,
            is_prompt=False, long_rope=False, wants_logits=True, num_drafts=len(drafts),
        )  # fmt: skip
        drafting.count(len(drafts), right)
        drafting.passed([segment], PhaseStats(seconds=seconds, output_tokens=right + 1))
    return total, drafting.stats()


def _perfect(wrong=0.0):
    return lambda: Oracle({(1, 2): ANSWER}, wrong=wrong)


def test_guesses_that_are_always_wrong_are_never_computed():
    total, stats = _seconds(_Wrong, 0.1)
    assert stats.proposed == 0 and stats.accepted == 0 and stats.note.startswith("off")
    assert total == pytest.approx(2000, rel=0.01)


@pytest.mark.parametrize("stall", [0.0, 20.0])
def test_guesses_that_are_right_are_computed_where_rows_are_cheap(stall):
    total, stats = _seconds(_perfect(), 0.1, stall=stall)
    assert total < 2000 * 1.12 * (1 + 4 * 0.1) / 5  # within an eighth of the best there is
    assert stats.accepted == stats.proposed > 1400 and not stats.note.startswith("off")


@pytest.mark.parametrize(("wrong", "row_cost"), [(0.0, 1.3), (0.3, 1.0), (0.5, 0.6), (0.8, 0.4)])
def test_guesses_do_not_lose_where_rows_are_dear(wrong, row_cost):
    """Tried again ever less often."""
    total, stats = _seconds(_perfect(wrong), row_cost)
    assert total < 2000 * 1.03
    assert stats.proposed > 0 and stats.note.startswith("off")


def test_what_a_guess_costs_passes_after_it_is_noticed():
    """Rows cost nothing themselves, but every pass after them: they take memory from others."""
    total, stats = _seconds(_perfect(0.6), 0.0, later=0.06)
    assert total < 2000 * 1.05 and stats.proposed > 0


@pytest.mark.parametrize("wrong", [0.2, 0.5])
def test_few_are_computed_where_few_are_right(wrong):
    """The first guess pays, the fourth does not."""
    total, stats = _seconds(_perfect(wrong), 0.3)
    assert total < 2000 / (1.3 if wrong == 0.2 else 1.05)


# --- admission ------------------------------------------------------------------------------------


class _Positions:
    """Right guesses on a machine whose tokens are their positions, spoilt now and then."""

    def __init__(self):
        self.known = 0

    def extend(self, token_ids):
        self.known += len(token_ids)

    def guess(self, count):
        wrong = self.known % 3
        return Guess(tuple(self.known + i + (i == wrong) for i in range(count)), 1)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 90)), min_size=1, max_size=10),
    spare=st.integers(0, 12),
    seqs=st.integers(1, 6),
    more_rows=st.integers(0, 70),
    most=st.integers(1, 16),
    mixed=st.sampled_from((None, 64)),
    bursts=st.sampled_from(((0, 0), (0, 0), (5, 4))),
)
def test_everything_ends_whatever_is_guessed(sizes, spare, seqs, more_rows, most, mixed, bursts):
    least = max(-(-(prompt + output) // PAGE_TOKENS) for prompt, output in sizes)
    drafting = Eager(most, _Positions)
    machine = Machine(
        pages=least + spare, seqs=seqs, rows=seqs + CHUNK_TOKENS + more_rows,
        mixed_prefill_rows=mixed, drafting=drafting, turns=Turns(*bursts),
    )  # fmt: skip
    for size in sizes:
        machine.add(*size)
    steps = 0
    while machine.admission.running or machine.admission.waiting:
        before = machine.admission.num_preemptions
        rows = machine.step()
        drafted = sum(row.segment.num_drafts for row in rows)
        assert drafted <= max(16, seqs)
        if drafted and machine.admission.num_preemptions == before:
            assert sum(row.segment.num_tokens for row in rows) <= machine.rows
        steps += 1
        assert steps < 5000, "no end in sight"
    assert sorted((c.num_prompt, len(c.output_ids)) for c in machine.finished) == sorted(sizes)
    assert machine.kv.num_free_pages == least + spare
    assert not drafting._followers


def test_nobody_gives_way_for_a_guess():
    """Two sequences have all pages: guesses stay within those that they hold."""
    machine = Machine(pages=4, seqs=2, rows=2 + 2 * CHUNK_TOKENS, drafting=Eager(16, _Positions))
    for _ in range(2):
        machine.add(PAGE_TOKENS - 3, PAGE_TOKENS + 2)
    machine.step()
    rows = machine.step()
    assert [row.segment.num_drafts for row in rows] == [2, 2]  # the first takes no page more
    while machine.admission.running:
        machine.step()
    assert machine.admission.num_preemptions == 0


def test_prompts_keep_room_for_a_chunk():
    machine = Machine(pages=200, seqs=4, rows=4 + CHUNK_TOKENS, drafting=Eager(16, _Positions))
    machine.add(8, 60)
    machine.step()
    machine.add(300, 5)
    rows = machine.step()
    assert [row.segment.num_tokens for row in rows] == [4, CHUNK_TOKENS]


def test_logits_and_tables_of_guesses_are_part_of_the_plan():
    spec = SPECS["qwen3-moe-1b"]
    plain = sizes_of(spec)
    guessing = replace(plain, drafts=8, draft_bytes_per_token=bytes_per_known_token(CONFIG))
    for seqs, rows in ((1, 8), (4, 16), (64, 64)):
        wanted = PlanConstraints(max_num_seqs=seqs, max_num_batched_tokens=256, kv_pages=100)
        more_seqs = replace(wanted, max_num_seqs=seqs + rows)
        host, more = (make_plan(spec, one, 8 * GIB, wanted).host for one in (plain, guessing))
        as_many = make_plan(spec, plain, 8 * GIB, more_seqs).host
        assert host.activation_bytes < more.activation_bytes == as_many.activation_bytes
        assert more.kv_page_bytes == host.kv_page_bytes
        known = 100 * 32 * guessing.draft_bytes_per_token
        plan = make_plan(spec, plain, 8 * GIB, wanted)
        grown = bytes_here(plan, spec, guessing) - bytes_here(plan, spec, plain)
        assert grown == more.activation_bytes - host.activation_bytes + known

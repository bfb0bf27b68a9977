"""Chats of several turns: each turn reads what is new, to the bits of one that reads all."""

import pytest
import torch

from amounts import rarely
from engines import engine_for, kept_cells, make_model, prompts, request, run_all
from sharing_machine import Machine
from windlass.schedule.batch import CHUNK_TOKENS

# heads in groups, latent attention, windows and sinks; recurrent layers, of which no generated row
# is found: a state is kept at the last block of a prompt
CHATS = [("qwen3_moe", (128, 192)), ("deepseek_v3", (128, 192)), ("gpt_oss", (128, 192)),
         ("qwen3_next", (64, 128)),
         *rarely([("nemotron_h", (64, 128)), ("lfm2_moe", (64, 128))])]  # fmt: skip
MESSAGES = prompts((100, 20, 20), seed=4)
ANSWERS = (40, 40, 20)


def _chat(engine, turns=3):
    """What `turns` give, and the prompt rows that each has computed."""
    history: list[int] = []
    found = []
    for turn, message in enumerate(MESSAGES[:turns]):
        history += message
        before = engine.stats().prompt_tokens
        one = request(
            str(turn), history, max_tokens=ANSWERS[turn], logprobs=3, temperature=0.8, seed=turn
        )
        (output,) = run_all(engine, [one]).values()
        history += output.outputs[0].token_ids
        rows = engine.stats().prompt_tokens - before
        found.append((rows, output.num_cached_tokens, output.outputs[0]))
    return found


def _bits(turns):
    return [(one.token_ids, one.logprobs, one.cumulative_logprob) for _, _, one in turns]


@pytest.mark.parametrize("rows", [72, *rarely([512])])
@pytest.mark.parametrize("case", CHATS)
def test_a_turn_computes_what_is_new_to_the_same_bits(case, rows, tmp_path):
    family, cached = case
    make_model(family, tmp_path)
    with engine_for(tmp_path, enable_prefix_caching=False) as engine:
        expected = _chat(engine)
    lengths = [100, 160, 220]
    assert [rows for rows, _, _ in expected] == lengths
    with engine_for(tmp_path, max_num_batched_tokens=rows, max_num_seqs=4) as engine:
        found = _chat(engine)
    assert _bits(found) == _bits(expected)
    skipped = [0, *cached]
    assert [count for _, count, _ in found] == skipped
    assert [count for count, _, _ in found] == [
        length - less for length, less in zip(lengths, skipped, strict=True)
    ]


def test_torch_computes_the_answer_again(tmp_path):
    """Its tiles of prompts are products of other shapes: what was generated is not found."""
    make_model("qwen3_moe", tmp_path)
    with engine_for(tmp_path, moe_backend="torch") as engine:
        assert [count for _, count, _ in _chat(engine, turns=2)] == [0, 64]


@pytest.mark.parametrize("case", [
    ("deepseek_v3", {}), ("gpt_oss", {"kv_cache_dtype": "int8"}),
    ("qwen3_moe", {"dtype": "bfloat16"}),
    *rarely([("gemma4_text", {}), ("phimoe", {}), ("deepseek_v3", {"dtype": "bfloat16"})]),
])  # fmt: skip
def test_generated_rows_have_the_bits_of_a_prompts(case, tmp_path):
    """What naming them rests on, of every row and layer."""
    family, kept = case
    make_model(family, tmp_path)
    (prompt,) = prompts((70,))
    tokens = list(prompt)
    found = []
    for count in (100, 2):
        with engine_for(tmp_path, enable_prefix_caching=False, **kept) as engine:
            engine.add(request("0", tokens, max_tokens=count))
            engine.step()
            (sequence,) = engine._admission.running
            while sequence.num_computed < 168:
                engine.step()
            found.append(kept_cells(engine, sequence, sequence.num_computed))
            tokens = [*prompt, *sequence.output_ids][:168]
    assert found[0] and all(tensor.float().abs().sum() > 0 for tensor in found[0])
    for generated, read in zip(*found, strict=True):
        assert torch.equal(generated[:168], read[:168])


# --- recurrent models -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [
    ("qwen3_next", 512), ("nemotron_h", 72),
    *rarely([("qwen3_next", 72), ("nemotron_h", 512), ("lfm2_moe", 512)]),
])  # fmt: skip
def test_prompts_that_begin_alike_go_on_from_where_they_part(case, tmp_path):
    """In one pass or several: the first computes all, the second too and keeps the state where it
    parts from the first, the others go on from there; choices share the whole prompt."""
    family, rows = case
    make_model(family, tmp_path)
    header, *own = prompts((130, 70, 9, 3, 64, 1))
    wanted = [request(str(i), header + one, max_tokens=3, logprobs=2) for i, one in enumerate(own)]
    wanted.append(
        request("n", header[:129], max_tokens=3, logprobs=2, n=3, temperature=1.0, seed=3)
    )
    found = []
    for caching in (False, True):
        with engine_for(
            tmp_path, enable_prefix_caching=caching, max_num_batched_tokens=rows, max_num_seqs=6
        ) as engine:
            results = run_all(engine, wanted)
            found.append({name: [(c.token_ids, c.logprobs) for c in one.outputs]
                          for name, one in results.items()})  # fmt: skip
            computed = engine.stats().prompt_tokens
            cached = {name: one.num_cached_tokens for name, one in results.items()}
    assert found[0] == found[1]
    assert cached["0"] == 0 and sum(cached.values()) >= 3 * 128
    assert computed <= sum(130 + len(one) for one in own) + 3 * 129 - 5 * 128


def test_the_state_used_longest_ago_is_given_up_first():
    """Two slots, three chats: the second turn of the one whose state has gone computes all."""
    machine = Machine(pages=100, seqs=4, rows=1000, kept_states=2)

    def turn(name, prompt):
        before = machine.prompt_rows
        machine.add(name, prompt, 1)
        machine.step()
        return machine.prompt_rows - before

    chats = [[10 + i] * (2 * CHUNK_TOKENS + 9) for i in range(3)]
    assert [turn(str(i), chats[i]) for i in (0, 1)] == [137, 137]
    assert turn("2", chats[0] + [1] * 9) == 9 + 9
    assert turn("3", chats[2]) == 137  # its state takes the place of the second's
    assert turn("4", chats[0] + [2] * 9) == 9 + 9
    assert turn("5", chats[1] + [1] * 9) == 137 + 9


def test_pages_that_go_take_their_state_along():
    machine = Machine(pages=16, seqs=4, rows=1000, kept_states=8)
    first = [5] * (2 * CHUNK_TOKENS + 9)
    for name, prompt, rows in (("0", first, 137), ("1", first, 9), ("2", [6] * 500, 500),
                               ("3", first, 137)):  # fmt: skip
        before = machine.prompt_rows
        machine.add(name, prompt, 1)
        machine.step()
        assert machine.prompt_rows == before + rows


def test_answers_are_found_by_the_next_turn_alone_where_they_are_whole():
    machine = Machine(pages=100, seqs=4, rows=1000, ends=False)
    prompt = [7] * 40
    machine.add("0", prompt, 90)
    while machine.admission.running or machine.admission.waiting:
        machine.step()
    answer = machine.finished["0", 0].output_ids
    for name, tokens, rows in (
        ("whole", prompt + answer + [1], 131 - 128),
        ("two tokens less", prompt + answer[:-3] + [1], 128 - 64),
        ("another answer", [*prompt, *answer[:5], 99, *answer[6:]], 130),
    ):
        before = machine.prompt_rows
        machine.add(name, tokens, 1)
        machine.step()
        assert machine.prompt_rows == before + rows, name

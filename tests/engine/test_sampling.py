"""Sampler against slow twins: the order of operations, logprobs, and the draw itself."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from windlass.engine.outputs import NOT_FINITE, NOTHING_ALLOWED
from windlass.engine.sampling import (
    Likeliest,
    Sampled,
    Sampler,
    choice_seed,
    derive_seed,
    uniform,
)
from windlass.errors import RequestError
from windlass.params import SamplingParams


def sampler(
    vocab_size: int,
    *,
    prompt: tuple[int, ...] = (),
    seed: int = 0,
    eos: tuple[int, ...] = (),
    **params: Any,
) -> Sampler:
    return Sampler(
        SamplingParams(**params),
        prompt_token_ids=prompt,
        seed=seed,
        vocab_size=vocab_size,
        eos_token_ids=eos,
    )


def logits(vocab_size: int, *, seed: int = 0, scale: float = 2.0, steps: int = 0) -> torch.Tensor:
    """Random logits; with `steps`, rounded so that many are equal."""
    values = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    return (values * steps).round() / steps if steps else values


def kept_by_full_sort(row: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """The slow twin of temperature, min_p, top_k and top_p: everything in Python floats."""
    values = row.tolist()
    highest = max(values)
    weights = {i: math.exp((v - highest) / params.temperature) for i, v in enumerate(values)}
    kept = [
        i
        for i in weights
        if values[i] >= highest + params.temperature * math.log(params.min_p or 1e-300)
    ]
    if params.top_k:
        kth = sorted(values, reverse=True)[min(params.top_k, len(values)) - 1]
        kept = [i for i in kept if values[i] >= kth]
    total = sum(weights[i] for i in kept)
    nucleus: dict[int, float] = {}
    for i in sorted(kept, key=lambda i: (-values[i], i)):
        if nucleus and sum(nucleus.values()) >= params.top_p * total:
            break
        nucleus[i] = weights[i]
    return nucleus


def frequencies(row: torch.Tensor, draws: int, **params: Any) -> dict[int, float]:
    one = sampler(row.numel(), **params)
    counts: dict[int, int] = {}
    for _ in range(draws):
        token_id = one.sample(row).token_id
        counts[token_id] = counts.get(token_id, 0) + 1
    return {token_id: count / draws for token_id, count in counts.items()}


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    row = torch.tensor([0.0, 3.0, 1.0, 3.0])
    assert sampler(4, temperature=0).sample(row) == Sampled(1)


@settings(deadline=None, max_examples=60)
@given(
    data=st.integers(0, 2**20), temperature=st.sampled_from([0.2, 1.0, 3.0]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0]), top_k=st.sampled_from([0, 1, 3, 50, 10**6]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]), steps=st.sampled_from([0, 1]),
)  # fmt: skip
def test_only_tokens_the_slow_twin_keeps_are_drawn(
    data: int, temperature: float, top_p: float, top_k: int, min_p: float, steps: int
) -> None:
    row = logits(700, seed=data, steps=steps)
    given_params: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
    }
    nucleus = kept_by_full_sort(row, SamplingParams(**given_params))
    one = sampler(700, seed=data, **given_params)
    drawn = {one.sample(row).token_id for _ in range(40)}
    assert drawn <= set(nucleus)


@pytest.mark.parametrize(
    "params",
    [
        {}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    ],
)  # fmt: skip
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    row = logits(40, seed=3, scale=1.5)
    nucleus = kept_by_full_sort(row, SamplingParams(**params))
    total = sum(nucleus.values())
    seen = frequencies(row, 4000, **params)
    assert set(seen) <= set(nucleus)
    for token_id, weight in nucleus.items():
        expected = weight / total
        error = math.sqrt(expected * (1 - expected) / 4000)
        assert abs(seen.get(token_id, 0.0) - expected) < 5 * error + 1e-9


def test_a_draw_over_many_blocks_matches_the_plain_cumulative_sum() -> None:
    row = logits(5000, seed=5, scale=1.0)
    cumulative = torch.softmax(row.double(), 0).cumsum(0)
    one = sampler(5000, seed=11)
    for step in range(300):
        token_id = one.sample(row).token_id
        target = uniform(11, step)
        below = float(cumulative[token_id - 1]) if token_id else 0.0
        assert below - 1e-6 <= target <= float(cumulative[token_id]) + 1e-6


def test_the_edges_of_a_draw_never_leave_the_kept_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.full((2000,), -math.inf)
    row[[700, 1300]] = torch.tensor([1.0, 1.0])
    for number, expected in ((0.0, 700), (1.0 - 2**-53, 1300), (1.0, 1300)):
        monkeypatch.setattr("windlass.engine.sampling.uniform", lambda *_, n=number: n)
        assert sampler(2000).sample(row).token_id == expected


def test_a_seeded_sequence_is_the_same_beside_any_others_and_threads() -> None:
    rows = torch.stack([logits(3000, seed=i) for i in range(12)])
    alone = sampler(3000, seed=5, top_p=0.95)
    expected = [alone.sample(row.clone()).token_id for row in rows]
    beside = [sampler(3000, seed=s, top_p=0.95) for s in (1, 5, 9)]
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        again = sampler(3000, seed=5, top_p=0.95)
        assert [again.sample(row).token_id for row in rows] == expected
        torch.set_num_threads(before)
    mixed = []
    for row in rows:
        mixed.append([s.sample(row).token_id for s in beside][1])
    assert mixed == expected
    assert len(set(expected)) > 3


def test_seeds_are_stable_and_depend_on_each_part() -> None:
    # written down once: a changed value would change every stored job
    assert derive_seed(0, "row-1", 0) == 3608181575389778046
    assert uniform(3608181575389778046, 3) == 0.4732658686786073
    seeds = {derive_seed(r, k, c) for r in (0, 1) for k in ("a", "b", "a/1") for c in (0, 1, 2)}
    assert len(seeds) == 18
    fixed = SamplingParams(seed=7)
    one = choice_seed(fixed, run_seed=1, seed_key="x", choice=0)
    assert one == choice_seed(fixed, run_seed=2, seed_key="y", choice=0)
    assert one != choice_seed(fixed, run_seed=1, seed_key="x", choice=1)
    free = SamplingParams()
    assert choice_seed(free, run_seed=1, seed_key="x", choice=0) == derive_seed(1, "x", 0)


def test_uniform_numbers_are_uniform() -> None:
    numbers = [uniform(1, step) for step in range(4000)]
    assert all(0.0 <= number < 1.0 for number in numbers)
    for tenth in range(10):
        share = sum(tenth / 10 <= number < (tenth + 1) / 10 for number in numbers) / 4000
        assert abs(share - 0.1) < 0.02


def test_penalties_follow_vllm() -> None:
    row = torch.tensor([2.0, -2.0, 1.0, 0.5, 0.0])
    one = sampler(
        5, prompt=(1, 1, 3), temperature=0, repetition_penalty=2.0, frequency_penalty=0.3,
        presence_penalty=0.2,
    )  # fmt: skip
    # step 0: only the prompt counts, only for repetition: 2, -4, 1, 0.25, 0
    assert one.sample(row).token_id == 0
    # step 1: id 0: 2 / 2 - 0.3 - 0.2 = 0.5, so id 2 wins with 1
    assert one.sample(row).token_id == 2
    # step 2: id 2: 1 / 2 - 0.5 = 0, id 0 still 0.5
    assert one.sample(row).token_id == 0
    # step 3: id 0: 1 - 0.6 - 0.2 = 0.2; id 3: 0.25 from the prompt's repetition alone
    assert one.sample(row).token_id == 3
    assert row.tolist() == [2.0, -2.0, 1.0, 0.5, 0.0]  # the row is left as it was
    # a negative logit is multiplied: -1 becomes -2
    negative = sampler(2, prompt=(0,), temperature=0, repetition_penalty=2.0)
    assert negative.sample(torch.tensor([-1.0, -1.5])).token_id == 1


def test_min_tokens_masks_eos_and_stop_ids_until_reached() -> None:
    row = torch.tensor([5.0, 4.0, 3.0, 2.0])
    one = sampler(4, temperature=0, min_tokens=2, eos=(0, 99), stop_token_ids=[1])
    assert [one.sample(row).token_id for _ in range(3)] == [2, 2, 0]


def test_bias_and_allowed_ids() -> None:
    row = torch.tensor([5.0, 4.0, 3.0, 2.0])
    assert sampler(4, temperature=0, logit_bias={3: 10}).sample(row).token_id == 3
    assert sampler(4, temperature=0, logit_bias={0: -100}).sample(row).token_id == 1
    assert sampler(4, temperature=0, allowed_token_ids=[2, 3]).sample(row).token_id == 2
    # a bias does not bring back what is not allowed
    both: dict[str, Any] = {"allowed_token_ids": [2, 3], "logit_bias": {0: 100, 3: 5}}
    assert sampler(4, temperature=0, **both).sample(row).token_id == 3
    drawn = {sampler(4, seed=s, allowed_token_ids=[1, 3]).sample(row).token_id for s in range(60)}
    assert drawn == {1, 3}


class Texts:
    """Token 7 is a part of a character."""

    def token_bytes(self, token_id: int) -> bytes:
        return b"\xe4" if token_id == 7 else b"x"


def test_logprobs_are_of_the_raw_row_and_ranked() -> None:
    row = logits(1000, seed=2)
    expected = torch.log_softmax(row.double(), 0)
    one = sampler(
        1000, temperature=0, logit_bias={7: 100}, repetition_penalty=1.5, logprobs=3, prompt=(7,)
    )
    sampled = one.sample(row)
    assert sampled.token_id == 7
    assert sampled.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    assert sampled.rank == int((row > row[7]).sum()) + 1
    best = torch.topk(row, 3).indices.tolist()
    assert [token_id for token_id, _, _ in sampled.top] == best
    assert [rank for _, _, rank in sampled.top] == [1, 2, 3]
    for token_id, logprob, _ in sampled.top:
        assert logprob == pytest.approx(float(expected[token_id]), abs=1e-5)
    step = sampled.as_logprobs(Texts())
    assert list(step) == [7, *best]
    assert step[7].decoded_token == "\ufffd" and step[7].rank == sampled.rank
    assert step[7].token_bytes == b"\xe4" and step[best[0]].decoded_token == "x"


def test_logprobs_of_equal_tokens_none_and_all() -> None:
    row = torch.tensor([1.0, 2.0, 2.0, 0.0])
    sampled = sampler(4, temperature=0, logprobs=-1).sample(row)
    assert [token_id for token_id, _, _ in sampled.top] == [1, 2, 0, 3]
    assert sum(math.exp(logprob) for _, logprob, _ in sampled.top) == pytest.approx(1.0)
    assert list(sampled.as_logprobs(Texts())) == [
        1,
        2,
        0,
        3,
    ]  # the drawn one is not there twice
    assert sampler(4, temperature=0, logprobs=0).sample(row).top == ()
    assert sampler(4, temperature=0, logprobs=9).sample(row).top == sampled.top
    assert sampler(4, temperature=0).sample(row).logprob is None
    equal = sampler(4, temperature=0, logprobs=2, logit_bias={2: 1}).sample(row)
    assert (equal.token_id, equal.rank) == (2, 2)


def test_bad_requests_fail_alone_and_say_why() -> None:
    for params in ({"logit_bias": {4: 1}}, {"allowed_token_ids": [1, 4]}):
        (name,) = params
        with pytest.raises(RequestError, match=f"{name}: got token id 4, allowed below 4"):
            sampler(4, **params)
    impossible = sampler(4, allowed_token_ids=[2])
    with pytest.raises(RequestError, match="leave no token") as caught:
        impossible.sample(torch.tensor([1.0, 1.0, -math.inf, 1.0]))
    assert caught.value.code == NOTHING_ALLOWED
    for bad in (math.nan, math.inf):
        with pytest.raises(RequestError, match="not finite") as caught:
            sampler(4).sample(torch.tensor([0.0, bad, 1.0, 2.0]))
        assert caught.value.code == NOT_FINITE


def test_constraints_that_leave_no_token_are_refused_before_any_pass() -> None:
    stops: dict[str, Any] = {"eos": (2, 99), "stop_token_ids": [1]}
    with pytest.raises(
        RequestError, match="only ids that end the text, and min_tokens 3"
    ) as caught:
        sampler(4, min_tokens=3, allowed_token_ids=[2, 1], **stops)
    assert caught.value.param == "allowed_token_ids"
    sampler(4, min_tokens=0, allowed_token_ids=[2, 1], **stops)
    sampler(4, min_tokens=3, allowed_token_ids=[2, 3], **stops)


@pytest.mark.parametrize(
    ("params", "is_enough"),
    [
        ({}, True),
        (dict(temperature=0.5), False),
        (dict(logprobs=0), False),
        (dict(logit_bias={1: 2.0}), False),
        (dict(allowed_token_ids=[1]), False),
        (dict(presence_penalty=0.1), False),
        (dict(min_tokens=1), False),  # the end of the text is not to be drawn yet
        (dict(min_tokens=1, stop_token_ids=[3]), False),
    ],
)
def test_where_the_likeliest_token_is_all_that_is_asked(params, is_enough):
    one = sampler(4, eos=(2,), **(dict(temperature=0) | params))
    assert one.takes_likeliest == is_enough
    one.sample(torch.tensor([1.0, 5.0, 4.0, 5.0]))
    assert one.takes_likeliest == (is_enough or "min_tokens" in params)
    if one.takes_likeliest:
        assert one.sample(Likeliest(1, 5.0)) == Sampled(1)
        for wrong in (math.nan, math.inf, -math.inf):
            with pytest.raises(RequestError, match="not finite"):
                one.sample(Likeliest(1, wrong))

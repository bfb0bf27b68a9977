"""From one row of logits to one token. One `Sampler` per sequence; it never sees other rows.

Arithmetic is numpy's on the row alone, single-threaded, so that a token depends on the row's bits
and on (seed, step) and on nothing else: not on the batch, the order of rows or restarts.

Order, as in vLLM: what a grammar allows, allowed ids, min_tokens, logit_bias, penalties,
temperature, min_p, top_k, top_p, draw. Logprobs are of the raw logits, before all of these (vLLM's
default, `raw_logprobs`).
Suffix legend: V vocabulary, K tokens that may still be drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from windlass.engine.outputs import NOT_FINITE, NOTHING_ALLOWED, Logprob
from windlass.errors import RequestError
from windlass.params import SamplingParams

Floats = NDArray[np.floating[Any]]
Ids = NDArray[np.int64]

_DRAW_BLOCK = 512  # weights per partial sum of a draw: a row of 152k needs 300 sums, then 512


class TokenTexts(Protocol):
    """What a token is in UTF-8: a part of a character perhaps."""

    def token_bytes(self, token_id: int) -> bytes: ...


class Likeliest(NamedTuple):
    """All that is asked of a row of logits where nothing but the likeliest token can be drawn. Of
    equal ones it is the first, and where there is a NaN the logit is one."""

    token_id: int
    logit: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """One drawn token. `logprob`, `rank` and `top` are empty where no logprobs were asked for;
    `top` holds (token id, logprob, rank) of the most likely tokens, best first."""

    token_id: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float, int], ...] = ()

    def as_logprobs(self, tokenizer: TokenTexts) -> dict[int, Logprob]:
        """vLLM's dict of this step: the drawn token first, then the most likely ones."""
        assert self.logprob is not None, "the request did not ask for logprobs"
        step: dict[int, Logprob] = {}
        for token_id, logprob, rank in ((self.token_id, self.logprob, self.rank), *self.top):
            data = tokenizer.token_bytes(token_id)
            text = data.decode("utf-8", "replace")
            step.setdefault(token_id, Logprob(logprob, rank, text, data))
        return step


def derive_seed(run_seed: int, seed_key: str, choice: int) -> int:
    """A 64-bit seed that depends on these three and nothing else (stable across versions)."""
    name = f"{run_seed}/{choice}/{seed_key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(name, digest_size=8, person=b"windlass-seed").digest(), "big")


def choice_seed(params: SamplingParams, *, run_seed: int, seed_key: str, choice: int) -> int:
    """The seed of one choice: of the request's own `seed` alone where it has one."""
    if params.seed is not None:
        return derive_seed(params.seed, "", choice)
    return derive_seed(run_seed, seed_key, choice)


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1) of one step: a pure function, 53 bits."""
    bits = blake2b(f"{seed}/{step}".encode(), digest_size=8, person=b"windlass-draw").digest()
    return (int.from_bytes(bits, "big") >> 11) * 2.0**-53


class Sampler:
    """Draws the tokens of one sequence, in order. Raises RequestError: when made, for ids outside
    the vocabulary and constraints that contradict each other; in `sample`, with code NOT_FINITE or
    NOTHING_ALLOWED."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_token_ids: Sequence[int],
        seed: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        self._params = params
        self._seed = seed
        self._vocab_size = vocab_size
        self._step = 0
        self._counts: dict[int, int] = {}  # of output tokens, for presence and frequency
        self._seen: dict[int, None] = {}  # prompt and output, for repetition
        if params.repetition_penalty != 1.0:
            self._seen = dict.fromkeys(prompt_token_ids)
        stops = {*params.stop_token_ids, *eos_token_ids}
        self._stop_ids = np.array(sorted(t for t in stops if t < vocab_size), dtype=np.int64)
        self._allowed = self._checked("allowed_token_ids", params.allowed_token_ids or ())
        if params.min_tokens and self._allowed.size and stops.issuperset(self._allowed.tolist()):
            raise RequestError(
                f"allowed_token_ids: got only ids that end the text, and min_tokens "
                f"{params.min_tokens}, which allows none of them yet",
                param="allowed_token_ids",
            )
        self._bias_ids = self._checked("logit_bias", tuple(params.logit_bias))
        self._biases = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._has_penalties = (
            params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
            or params.repetition_penalty != 1.0
        )

    @property
    def takes_likeliest(self) -> bool:
        """Whether `Likeliest` is enough for all tokens that are still to be drawn, unless a grammar
        forbids some."""
        params = self._params
        return (
            params.is_greedy
            and params.logprobs is None
            and not (self._has_penalties or self._allowed.size or self._bias_ids.size)
            and not self._is_too_short
        )

    def sample(
        self, row: torch.Tensor | Likeliest, grammar_V: NDArray[np.bool_] | None = None
    ) -> Sampled:
        """The next token from fp32 logits (V,), which are left as they are, or where it
        `takes_likeliest`, from that. `grammar_V`: the tokens that a grammar allows."""
        if isinstance(row, Likeliest):
            assert self.takes_likeliest and grammar_V is None, "more is asked of a row"
            _check_finite(row.logit)
            self._record(row.token_id)
            return Sampled(row.token_id)
        raw_V = row.detach().numpy()
        assert raw_V.shape == (self._vocab_size,) and raw_V.dtype == np.float32, raw_V.shape
        best = int(raw_V.argmax())  # a NaN counts as the maximum
        _check_finite(raw_V[best])
        own_V = self._constrained(raw_V, grammar_V)
        if own_V is not raw_V:
            best = int(own_V.argmax())
            if own_V[best] == -np.inf:
                raise RequestError(
                    "structured_outputs, allowed_token_ids, min_tokens and logit_bias leave no"
                    " token to draw",
                    code=NOTHING_ALLOWED,
                )
        token_id = best if self._params.is_greedy else self._draw(own_V, float(own_V[best]))
        self._record(token_id)
        if self._params.logprobs is None:
            return Sampled(token_id)
        return _with_logprobs(raw_V, token_id, self._params.logprobs)

    def _checked(self, name: str, token_ids: Sequence[int]) -> Ids:
        bad = [token_id for token_id in token_ids if token_id >= self._vocab_size]
        if bad:
            raise RequestError(
                f"{name}: got token id {bad[0]}, allowed below {self._vocab_size}", param=name
            )
        return np.array(token_ids, dtype=np.int64)

    @property
    def _is_too_short(self) -> bool:
        return self._step < self._params.min_tokens and self._stop_ids.size > 0

    def _record(self, token_id: int) -> None:
        self._step += 1
        if self._has_penalties:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
            self._seen[token_id] = None

    def _constrained(self, raw_V: Floats, grammar_V: NDArray[np.bool_] | None) -> Floats:
        """Grammar, allowed ids, min_tokens, bias and penalties; a copy only where one acts."""
        too_short = self._is_too_short
        penalised = self._has_penalties and bool(self._counts or self._seen)
        is_free = grammar_V is None
        if is_free and not (too_short or penalised or self._allowed.size or self._bias_ids.size):
            return raw_V
        if self._allowed.size:
            logits_V = np.full_like(raw_V, -np.inf)
            logits_V[self._allowed] = raw_V[self._allowed]
        else:
            logits_V = raw_V.copy()
        if grammar_V is not None:
            logits_V[~grammar_V] = -np.inf
        if too_short:
            logits_V[self._stop_ids] = -np.inf
        logits_V[self._bias_ids] += self._biases
        if penalised:
            self._penalise(logits_V)
        return logits_V

    def _penalise(self, logits_V: Floats) -> None:
        params = self._params
        if params.repetition_penalty != 1.0:
            ids = np.fromiter(self._seen, dtype=np.int64, count=len(self._seen))
            seen = logits_V[ids]
            factor = np.float32(params.repetition_penalty)
            logits_V[ids] = np.where(seen > 0, seen / factor, seen * factor)
        ids = np.fromiter(self._counts, dtype=np.int64, count=len(self._counts))
        counts = np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
        logits_V[ids] -= np.float32(params.frequency_penalty) * counts
        logits_V[ids] -= np.float32(params.presence_penalty)

    def _draw(self, logits_V: Floats, highest: float) -> int:
        """Inverse of the cumulative distribution over the kept tokens in order of their ids, which
        moves less than an order by probability when low bits of the logits differ."""
        top = np.float32(highest)
        per_degree = np.float32(1.0 / self._params.temperature)
        kept = _above_floor(logits_V, highest, self._params)
        weights_K = np.exp(((logits_V if kept is None else logits_V[kept]) - top) * per_degree)
        if self._params.top_p < 1.0:
            inside = _nucleus(weights_K, self._params.top_p)
            weights_K = weights_K[inside]
            kept = inside if kept is None else kept[inside]
        place = _place(weights_K, uniform(self._seed, self._step))
        return place if kept is None else int(kept[place])


def _check_finite(logit: Any) -> None:
    if not np.isfinite(logit):
        raise RequestError("the model's logits are not finite", code=NOT_FINITE)


def _above_floor(logits_V: Floats, highest: float, params: SamplingParams) -> Ids | None:
    """Ids that min_p and top_k keep, ascending; None where they keep all. Tokens equal to the k-th
    are all kept, as in vLLM."""
    floor = -np.inf
    if 0 < params.top_k < logits_V.size:
        kth = logits_V.size - params.top_k
        floor = float(np.partition(logits_V, kth)[kth])
    if params.min_p > 0.0:  # probability at least min_p times the highest
        floor = max(floor, highest + params.temperature * math.log(params.min_p))
    if floor == -np.inf:
        return None
    return np.flatnonzero(logits_V >= np.float32(min(floor, highest)))


def _nucleus(weights_K: Floats, top_p: float) -> Ids:
    """Places, ascending, of the smallest set of most likely tokens whose probability reaches
    `top_p`. Of tokens equal to the last one, those with the lowest ids."""
    total = float(weights_K.sum(dtype=np.float64))
    # Tokens under this weight together hold less than 1 - top_p: no need to sort them.
    likely = weights_K[weights_K >= np.float32((1.0 - top_p) * total / weights_K.size * 0.999)]
    descending = np.sort(likely)[::-1]
    reached = np.cumsum(descending, dtype=np.float64)
    last = min(int(np.searchsorted(reached, top_p * total)), descending.size - 1)
    above = np.flatnonzero(weights_K > descending[last])
    equal = np.flatnonzero(weights_K == descending[last])[: last + 1 - above.size]
    return np.sort(np.concatenate((above, equal)))


def _place(weights_K: Floats, number: float) -> int:
    """The place whose share of the cumulative weight holds `number` in [0, 1)."""
    starts = np.arange(0, weights_K.size, _DRAW_BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights_K, starts, dtype=np.float64))
    target = min(number * blocks[-1], np.nextafter(blocks[-1], 0.0))  # the product may round up
    block = int(np.searchsorted(blocks, target, side="right"))  # it has some weight
    before = blocks[block - 1] if block else 0.0
    inside = weights_K[starts[block] : starts[block] + _DRAW_BLOCK]
    reached = before + np.cumsum(inside, dtype=np.float64)
    place = int(np.searchsorted(reached, target, side="right"))
    if place == inside.size:  # rounding: the block's last token that has any weight
        place = int(np.flatnonzero(inside)[-1])
    return int(starts[block]) + place


def _with_logprobs(raw_V: Floats, token_id: int, num_top: int) -> Sampled:
    # in fp64, as those of prompts (decoder/score.py): the same bits once they are fp32
    highest = np.float64(raw_V.max())
    log_total = np.log(np.exp(raw_V - highest).sum())
    drawn = raw_V[token_id]

    def logprob(token: int) -> float:
        return float(np.float32(raw_V[token] - highest - log_total))

    rank = int(np.count_nonzero(raw_V > drawn)) + 1
    rank += int(np.count_nonzero(raw_V[:token_id] == drawn))
    top = _most_likely(raw_V, raw_V.size if num_top == -1 else min(num_top, raw_V.size))
    return Sampled(
        token_id,
        logprob(token_id),
        rank,
        tuple((int(t), logprob(t), place + 1) for place, t in enumerate(top)),
    )


def _most_likely(raw_V: Floats, count: int) -> Ids:
    """The `count` best ids, best first; of equal ones the lowest id first."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    kth = raw_V.size - count
    candidates = np.flatnonzero(raw_V >= np.partition(raw_V, kth)[kth])
    order = np.argsort(-raw_V[candidates], kind="stable")
    return candidates[order][:count]

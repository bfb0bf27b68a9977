"""Drafters that know too much, or nothing, and what is asked with them, for tests."""

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines import engine_for, prompts, request, run_all
from families import VOCAB
from windlass.engine.drafting import Drafting
from windlass.engine.drafts import Guess, LayerGuess
from windlass.engine.engine_stats import EngineStats
from windlass.engine.outputs import RequestOutput
from windlass.engine.request import Request
from windlass.engine.sequence import Sequence as EngineSequence


class Oracle:
    """Knows how texts go on: `answers` of prompts. Each token of a guess is spoilt with
    probability `wrong`."""

    def __init__(
        self, answers: Mapping[tuple[int, ...], Sequence[int]], *, wrong: float = 0.0, seed: int = 0
    ) -> None:
        self._answers = answers
        self._wrong = wrong
        self._chance = random.Random(seed)
        self._known: list[int] = []

    def extend(self, token_ids: Iterable[int]) -> None:
        self._known += token_ids

    def guess(self, count: int) -> Guess:
        for prompt, answer in self._answers.items():
            told = self._known[len(prompt) :]
            if tuple(self._known[: len(prompt)]) == prompt and told == list(answer[: len(told)]):
                following = answer[len(told) : len(told) + count]
                spoilt = (abs(t - (self._chance.random() < self._wrong)) for t in following)
                return Guess(tuple(spoilt), 1)
        return Guess((self._known[-1],) * count, 2)


class Eager(Drafting):
    """Computes all that is guessed, whatever it costs."""

    def propose(self, sequence: EngineSequence) -> tuple[int, ...]:
        return self._follow(sequence).drafter.guess(self.most).token_ids

    @property
    def wants_guesses(self) -> bool:
        return True


class Corrected(Eager):
    """What a layer guesses, but every other guess is what comes: `answers` by request and place."""

    def __init__(self, results: Mapping[str, RequestOutput]) -> None:
        super().__init__(1, LayerGuess, is_heard=True)
        self._results = results
        self.numbers: dict[int, str] = {}  # of sequences: their requests

    def hear(self, sequence: EngineSequence, token_id: int) -> None:
        outputs = self._results[sequence.request.request_id].outputs
        self.numbers[sequence.number] = sequence.request.request_id
        place, answer = len(sequence.output_ids), outputs[sequence.queued.index].token_ids
        is_right = place % 2 and place < len(answer)
        super().hear(sequence, answer[place] if is_right else token_id)


def varied_requests() -> list[Request]:
    """What a sampler, a text and a limit can do to an answer."""
    texts = prompts([5, 70, 9, 30, 12, 80, 7, 11, 6, 64], seed=3)
    drawn = {"temperature": 0.9, "seed": 5}
    asked: list[dict[str, Any]] = [
        {"logprobs": 3, "max_tokens": 30},
        {"logprobs": 2, **drawn},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3, **drawn},
        {"logit_bias": {7: 4.0, 8: 4.0}, "logprobs": 0, **drawn},
        {"min_tokens": 9, "stop_token_ids": list(range(0, VOCAB, 3)), "ignore_eos": False},
        {"n": 2, "logprobs": 1, "prompt_logprobs": 0, **drawn},
        {"stop": ["w2", "w31"], "max_tokens": 40, **drawn},
        {"max_tokens": 2},
        {"max_tokens": 1},
        {"allowed_token_ids": [4, 5, 6], "top_k": 2, "temperature": 0.7, "seed": 1},
    ]
    return [
        request(f"{i}", text, **{"max_tokens": 20, **more})
        for i, (text, more) in enumerate(zip(texts, asked, strict=True))
    ]


def bits(results: dict[str, RequestOutput]) -> dict[str, object]:
    return {name: (one.outputs, one.prompt_logprobs) for name, one in results.items()}


def answers(
    path: Path, requests: list[Request], *, left_pages: int | None = None, **options: Any
) -> tuple[dict[str, RequestOutput], EngineStats]:
    """Bits of the results, and the engine's counters."""
    with engine_for(path, max_model_len=160, **options) as engine:
        kv = engine._admission._kv.device
        held = kv.take_pages(kv.num_free_pages - left_pages) if left_pages else []
        results = run_all(engine, requests, check=not held)
        kv.give_pages(held)
        engine.check()
        return results, engine.stats()

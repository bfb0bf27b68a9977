"""Perplexity of a text under a checkpoint, through the engine. All windows are computed together,
so that weights which do not fit into memory are read as rarely as in a batch job."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from math import exp
from pathlib import Path

from windlass.build.open import open_engine
from windlass.engine.engine import Engine
from windlass.engine.request import WINDOW, Request
from windlass.errors import RequestError, UsageError
from windlass.models.registry import read_spec
from windlass.options import EngineOptions, read_config, resolve_model
from windlass.params import SamplingParams
from windlass.units import MIB, counted, format_bytes

_LONGEST_TEXT = 64 * MIB


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Of `num_tokens` tokens, whose log-probabilities sum to `logprob`."""

    logprob: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return exp(-self.logprob / self.num_tokens)


def read_text(path: Path) -> str:
    """A file to measure. Raises UsageError."""
    try:
        size = path.stat().st_size
        if size > _LONGEST_TEXT:
            raise UsageError(
                f"text: {path} has {format_bytes(size)}, allowed {format_bytes(_LONGEST_TEXT)}"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"text: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"text: {path}: not UTF-8: {error}") from error
    if not text.strip():
        raise UsageError(f"text: {path} is empty")
    return text


def check_window(model: str, window: int) -> None:
    """Raises UsageError where the model cannot have as many tokens, and one more."""
    longest = read_spec(read_config(resolve_model(model)))[0].max_positions - 1
    if window > longest:
        raise UsageError(f"window: got {window}, allowed 2 to {longest} for this model")


def measure(
    options: EngineOptions,
    text: str,
    *,
    window: int,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """The text in windows that do not overlap; the first token of each is only read. `on_step`
    gets how many tokens are computed, and of how many."""
    with closing(open_engine(replace(options, max_model_len=window + 1))) as engine:
        ids = engine.tokenizer.encode(text)
        if len(ids) < 2:
            raise UsageError(f"text: got {counted(len(ids), 'token')}, allowed 2 or more")
        return _measure(engine, _windows(ids, window), on_step)


def _windows(ids: Sequence[int], window: int) -> list[tuple[int, ...]]:
    """A last window of one token, which nothing would be known of, is left out."""
    parts = [tuple(ids[first : first + window]) for first in range(0, len(ids), window)]
    return [part for part in parts if len(part) > 1]


def _measure(
    engine: Engine, windows: list[tuple[int, ...]], on_step: Callable[[int, int], None]
) -> Perplexity:
    params = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=0, prompt_logprob_ranks=False,
        detokenize=False, ignore_eos=True,
    )  # fmt: skip
    total, done, logprob, count = sum(map(len, windows)), 0, 0.0, 0
    waiting = iter(enumerate(windows))
    in_engine = 0
    while done < total:
        for index, ids in islice(waiting, WINDOW * engine.capacity - in_engine):
            engine.add(Request(str(index), ids, params, seed_key=str(index)))
            in_engine += 1
        for output in engine.step().finished:
            if output.error is not None:
                raise RequestError(f"text: {output.error}")
            assert output.prompt_logprobs is not None, "they were asked for"
            found = [
                step[token].logprob
                for token, step in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
                if step is not None
            ]
            logprob, count = logprob + sum(found), count + len(found)
            in_engine -= 1
            done += len(output.prompt_token_ids)
        on_step(done, total)
    return Perplexity(logprob, count)

"""How long the sequences of a job are, and how much of its prompts they share, from its file and
before anything runs: what the planner plans for. Of a large job, evenly spaced rows stand for all;
what only rows near each other share is not seen then."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from windlass.batch.jobfile import JobFile, JobRow
from windlass.engine.text_limits import LONG_TEXT
from windlass.errors import RequestError, UsageError
from windlass.kvcache.pages import block_keys, readable_blocks
from windlass.params import SamplingParams
from windlass.protocol.openai import ChatTokenizer, Prompt, ServedModel
from windlass.protocol.rows import read_row
from windlass.schedule.batch import CHUNK_TOKENS
from windlass.workload import USUAL_OUTPUT, Job, Workload, expected_output

_MOST_ROWS = 256  # that are tokenised
_NUM_PIECES = 16  # of a long text that are


class _Sequence(NamedTuple):
    """Tokens of prompt and answer; the keys of the prompt's blocks, by which others find them; and
    those by which it finds blocks that it may read."""

    prompt: int
    output: int
    keys: tuple[Hashable, ...]
    wanted: tuple[Hashable, ...]


class _Glance:
    """A tokenizer for lengths: of a long text it takes pieces that stand for the rest."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self.render_chat = tokenizer.render_chat
        self.decode = tokenizer.decode

    def encode(
        self, text: str, *, add_special_tokens: bool = True, at_most: int | None = None
    ) -> list[int]:
        if len(text) <= LONG_TEXT:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        size, step = LONG_TEXT // _NUM_PIECES, len(text) // _NUM_PIECES
        ids = [
            token_id
            for start in range(0, step * _NUM_PIECES, step)
            for token_id in self._tokenizer.encode(
                text[start : start + size], add_special_tokens=False
            )
        ]
        count = len(ids) * len(text) // LONG_TEXT
        if at_most is not None:
            count = min(count, at_most + 1)
        return (ids * (count // max(1, len(ids)) + 1))[:count]


def job_lengths(
    job: JobFile, wanted: "np.ndarray[Any, np.dtype[np.bool_]]", model: ServedModel
) -> Job | None:
    """Of the rows where `wanted` is true; rows that will be refused do not count. None where none
    is left."""
    open_rows = np.flatnonzero(wanted)
    count = min(len(open_rows), _MOST_ROWS)
    kept = np.zeros(len(wanted), dtype=np.bool_)
    kept[open_rows[np.arange(count) * len(open_rows) // max(count, 1)]] = True
    model = replace(model, tokenizer=_Glance(model.tokenizer))
    rows: list[list[_Sequence]] = []
    is_bounded = True
    # by map, which holds no row while the next is read
    for own, has_limit in map(lambda row: _of_row(row, model), job.rows(kept)):
        rows.append(own)
        is_bounded &= has_limit
    found = _shared(rows)
    if not found:
        return None
    total = round(len(found) * len(open_rows) / count)
    prompts: list[int] = []
    outputs: list[int] = []
    shared: list[int] = []  # three of numbers that most share: one of tuples is large
    last = -1
    for place in (i * len(found) // total for i in range(total)):
        one, first, others = found[place]
        prompts.append(one.prompt)
        outputs.append(one.output)
        shared.append(others if place == last else first)
        last = place
    return Job(Workload(tuple(prompts), tuple(outputs), tuple(shared)), is_bounded)


def _shared(rows: list[list[_Sequence]]) -> list[tuple[_Sequence, int, int]]:
    """Each sequence; the tokens at its beginning that earlier ones compute; and those that the next
    of many like it finds: what it shares with any other row, or with earlier ones of its own.

    As engine/prompt_pages.py has it, where blocks are found as long as the job lasts. (LongRoPE's
    two kinds of positions count as one: each computes a common beginning once.)"""
    num_rows = Counter(key for row in rows for key in {key for one in row for key in one.keys})
    seen: set[Hashable] = set()
    found: list[tuple[_Sequence, int, int]] = []
    for row in rows:
        here: set[Hashable] = set()
        for one in row:
            # a key stands for all tokens up to its block's end: those known come first
            first = sum(key in seen for key in one.wanted)
            others = sum(key in here or num_rows[key] > 1 for key in one.wanted)
            found.append((one, first * CHUNK_TOKENS, others * CHUNK_TOKENS))
            here.update(one.keys)
            seen.update(one.keys)
    return found


def _of_row(row: JobRow, model: ServedModel) -> tuple[list[_Sequence], bool]:
    """Its sequences, and whether the row limits its answers."""
    if row.malformed is not None or row.endpoint is None or row.body is None:
        return [], True
    try:
        api = read_row(row.endpoint, row.body, model, key="", created=0).api
    except (RequestError, UsageError):
        return [], True
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    limited = model.default_params.max_tokens is not None or any(
        row.body.get(name) is not None for name in names
    )
    sequences: list[_Sequence] = []
    for prompt in api.prompts:
        expected = expected_output(prompt.params.max_tokens)
        if not limited:  # the rest of the context
            expected = min(expected, USUAL_OUTPUT)
        length, keys = len(prompt.token_ids), block_keys(prompt.token_ids, CHUNK_TOKENS)
        readable = keys[: readable_blocks(length, CHUNK_TOKENS)]
        own = first = _Sequence(length, expected, keys, readable)
        if prompt.params.prompt_logprobs is not None:
            of_scores = _keys_of_scores(prompt, readable)
            first = own._replace(keys=(*keys, *of_scores), wanted=of_scores)
        sequences += [first, *[own] * (prompt.params.n - 1)]
    return sequences, limited


def _keys_of_scores(prompt: Prompt, keys: tuple[bytes, ...]) -> tuple[Hashable, ...]:
    """Of blocks with the log-probabilities of what follows their rows, the next block's first token
    among it (engine/prompt_pages.py)."""
    params, following = prompt.params, prompt.token_ids[CHUNK_TOKENS::CHUNK_TOKENS]
    told = params.prompt_logprobs or 1, params.prompt_logprob_ranks
    return tuple((*pair, *told) for pair in zip(keys, following, strict=True))


def file_lengths(
    path: Path, tokenizer: ChatTokenizer, longest: int, params: SamplingParams
) -> Workload:
    """Of all rows of a file, whichever models they name. `params`: of rows that name none.
    UsageError where none can run."""
    job = JobFile(path)
    every = np.ones(len(job), dtype=np.bool_)
    names = {str(row.body.get("model")) for row in job.rows(every) if row.body is not None}
    model = ServedModel(tuple(sorted(names)), tokenizer, longest, params)
    found = job_lengths(job, every, model)
    if found is None:
        raise UsageError(f"{path}: no row can run")
    return found.workload

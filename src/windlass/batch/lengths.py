"""How long the sequences of a job are, from its file and before anything runs: what the planner
plans for. Of a large job, evenly spaced rows stand for all."""

from pathlib import Path
from typing import Any

import numpy as np

from windlass.batch.jobfile import JobFile, Row
from windlass.errors import RequestError, UsageError
from windlass.params import SamplingParams
from windlass.protocol.openai import ChatTokenizer, ServedModel, parse_body
from windlass.workload import USUAL_OUTPUT, Job, Workload, expected_output

_MOST_ROWS = 256  # that are tokenised


def job_lengths(
    job: JobFile, wanted: "np.ndarray[Any, np.dtype[np.bool_]]", model: ServedModel
) -> Job | None:
    """Of the rows where `wanted` is true; rows that will be refused do not count. None where none
    is left."""
    open_rows = np.flatnonzero(wanted)
    count = min(len(open_rows), _MOST_ROWS)
    kept = np.zeros(len(wanted), dtype=np.bool_)
    kept[open_rows[np.arange(count) * len(open_rows) // max(count, 1)]] = True
    lengths: list[tuple[int, int]] = []
    is_bounded = True
    for row in job.rows(kept):
        own, has_limit = _of_row(row, model)
        lengths += own
        is_bounded &= has_limit
    if not lengths:
        return None
    total = round(len(lengths) * len(open_rows) / count)
    spread = [lengths[i * len(lengths) // total] for i in range(total)]
    prompts, outputs = zip(*spread, strict=True)
    return Job(Workload(prompts, outputs), is_bounded)


def _of_row(row: Row, model: ServedModel) -> tuple[list[tuple[int, int]], bool]:
    """Prompt and answer of each sequence, and whether the row limits its answers."""
    if row.malformed is not None or row.endpoint is None or row.body is None:
        return [], True
    try:
        api = parse_body(row.endpoint, row.body, model)
    except (RequestError, UsageError):
        return [], True
    limited = any(
        row.body.get(name) is not None for name in ("max_tokens", "max_completion_tokens")
    )
    lengths = []
    for prompt in api.prompts:
        expected = expected_output(prompt.params.max_tokens)
        if not limited:  # the rest of the context, or what the checkpoint's defaults say
            expected = min(expected, USUAL_OUTPUT)
        lengths += [(len(prompt.token_ids), expected)] * prompt.params.n
    return lengths, limited


def file_lengths(path: Path, tokenizer: ChatTokenizer, longest: int) -> Workload:
    """Of all rows of a file, whichever models they name. UsageError where none can run."""
    job = JobFile(path)
    every = np.ones(len(job), dtype=np.bool_)
    names = {str(row.body.get("model")) for row in job.rows(every) if row.body is not None}
    model = ServedModel(tuple(sorted(names)), tokenizer, longest, SamplingParams())
    found = job_lengths(job, every, model)
    if found is None:
        raise UsageError(f"{path}: no row can run")
    return found.workload

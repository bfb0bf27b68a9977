"""Finds the best settings of an engine: from a sensible start, one change after the other is tried
on a short job and kept where it is faster. Knows no case of the comparison but its size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from peers import launch
from peers.job import Job
from peers.launch import Outcome
from peers.models import Model, at_once

_TIMEOUT_S = 400.0
_FASTER = 0.98  # a difference below this is no reason to change
_START: dict[str, dict[str, Any]] = {
    "llama.cpp": {
        "n_batch": 2048, "n_ubatch": 512, "flash_attn": 1, "kv_unified": False,
        "extra_buffers": True, "load_mode": "mmap",
    },
    "transformers": {
        "dtype": "bfloat16", "experts": "grouped_mm", "experts_decode": "grouped_mm",
        "cache": "static", "chunk_tokens": 8192,
    },
    "windlass": {},  # its planner chooses
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What settings are chosen for."""

    sequences: int
    prompt_tokens: int
    output_tokens: int
    threads: int


def changes(engine: str, form: str, sequences: int) -> Iterator[dict[str, Any]]:
    """What is tried, in this order."""
    is_many = sequences > 1
    if engine == "llama.cpp":
        yield {"flash_attn": 0}
        if is_many:
            yield {"n_ubatch": 2048}
            yield {"n_ubatch": 1024}
            yield {"kv_unified": True}
        if form != "bf16":
            yield {"extra_buffers": False}
    if engine == "transformers":
        yield {"dtype": "float32"}
        yield {"experts": "eager"}
        yield {"experts_decode": "eager"}
        if not is_many:  # copies the weights of every token's experts
            yield {"experts_decode": "batched_mm"}
        yield {"cache": "dynamic"}
        if is_many:
            yield {"chunk_tokens": 2048}


def best_settings(model: Model, engine: str, form: str, size: Size) -> dict[str, Any]:
    """The settings, the seconds they took, and all that was tried."""
    tried: list[dict[str, Any]] = []

    def seconds(settings: dict[str, Any]) -> float:
        outcome = try_settings(model, engine, form, settings=settings, size=size)
        taken = float("inf")
        if outcome.result is not None:
            steps = max(1, min(SHORT.output_tokens, size.output_tokens) - 1)
            more = (size.output_tokens - 1) / steps
            taken = outcome.result["prefill_s"] + outcome.result["decode_s"] * more
        tried.append({"settings": settings, "status": outcome.status,
                      "seconds": None if outcome.result is None else taken})  # fmt: skip
        return taken

    best = _descend(_START[engine], changes(engine, form, size.sequences), seconds)
    fastest = min((each["seconds"] for each in tried if each["seconds"] is not None), default=None)
    return {"settings": best, "seconds": fastest, "tried": tried,
            "status": "failed" if fastest is None else "ok"}  # fmt: skip


def _descend(
    start: dict[str, Any],
    steps: Iterator[dict[str, Any]],
    seconds: Callable[[dict[str, Any]], float],
) -> dict[str, Any]:
    best, best_s = start, seconds(start)
    for change in steps:
        candidate = best | change
        if (candidate_s := seconds(candidate)) < _FASTER * best_s:
            best, best_s = candidate, candidate_s
    return best


def try_settings(
    model: Model, engine: str, form: str, *, settings: dict[str, Any], size: Size
) -> Outcome:
    """A short job with these settings."""
    job = make_job(model, engine, form, settings=settings, size=size)
    if job is None:
        return no_room(model, engine, form, settings)
    return launch.run(engine, job, _TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Most:
    """What a job may take: seconds of each phase, tokens of an answer."""

    prefill_s: float
    decode_s: float
    output_tokens: int = 16


SHORT = Most(15.0, 10.0)  # enough to compare settings


def make_job(
    model: Model,
    engine: str,
    form: str,
    *,
    settings: dict[str, Any],
    size: Size,
    most: Most | None = None,
) -> Job | None:
    """The job of an engine at a size; None where memory holds not even one sequence."""
    most = most or SHORT
    output_tokens = min(most.output_tokens, size.output_tokens)
    together = size.sequences
    if engine != "windlass":
        together = at_once(
            model, engine, settings.get("dtype", form),
            tokens=size.prompt_tokens + size.output_tokens, sequences=size.sequences,
        )  # fmt: skip
        if not together:
            return None
    return Job(
        model=str(model.file(engine, form)), vocab_size=model.config["vocab_size"],
        threads=size.threads, sequences=size.sequences, at_once=together,
        prompt_tokens=size.prompt_tokens, output_tokens=output_tokens,
        prefill_limit_s=most.prefill_s, decode_limit_s=most.decode_s, settings=settings,
    )  # fmt: skip


def no_room(model: Model, engine: str, form: str, settings: dict[str, Any]) -> Outcome:
    needs = model.weight_bytes(engine, settings.get("dtype", form)) / 1e9
    has = launch.memory_budget() / 1e9
    message = f"does not fit: weights of {needs:.1f} GB, {has:.1f} GB of memory"
    return Outcome(status="no room", message=message)

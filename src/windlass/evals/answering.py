"""Answers until a stop string, as lm-eval's tasks ask for them. Knows no harness."""

from collections.abc import Mapping
from typing import Any

from windlass.errors import UsageError
from windlass.params import SamplingParams

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def stops(wanted: Mapping[str, Any]) -> list[str]:
    """The strings that end an answer."""
    until = wanted.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text]


def sampling_params(
    wanted: Mapping[str, Any], *, usual_length: int, stops_early: bool
) -> SamplingParams:
    """Of a task's `generation_kwargs`. `stops_early`: whether stop strings end the answer at once;
    they are cut off later otherwise. Raises UsageError for what Windlass does not apply."""
    rest = {name: value for name, value in wanted.items() if name not in (*_LENGTHS, "until")}
    lengths = [wanted[name] for name in _LENGTHS if wanted.get(name) is not None]
    does_sample = rest.pop("do_sample", None)
    temperature = float(rest.pop("temperature", 1.0 if does_sample else 0.0))
    try:
        return SamplingParams(
            max_tokens=int(lengths[0]) if lengths else usual_length,
            temperature=0.0 if does_sample is False else temperature,
            stop=stops(wanted) if stops_early else (),
            **rest,
        )
    except TypeError as error:
        raise UsageError(f"generation_kwargs: {error}") from error


def cut(text: str, wanted: Mapping[str, Any], think_end: str | None) -> str:
    """The answer behind the reasoning that `think_end` ends, up to the first stop string."""
    if think_end is not None:
        text = text.rpartition(think_end)[2].lstrip()
    for stop in stops(wanted):
        text = text.partition(stop)[0]
    return text

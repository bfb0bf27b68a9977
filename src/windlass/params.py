"""Sampling parameters of one request: vLLM's names and defaults. Knows no tensors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from windlass.errors import UsageError
from windlass.structured import StructuredOutputs

GREEDY_BELOW = 1e-5  # temperatures under it mean argmax, as in vLLM
MAX_CHOICES = 16384  # vLLM's VLLM_MAX_N_SEQUENCES: one request must not fill the machine

MAX_LOGPROBS = 20  # OpenAI's and vLLM's limit for alternatives of one token

_TOO_LARGE = 1e30  # stays finite in the sampler's fp32

# Fields of vLLM that Windlass does not apply: accepted at their default, else refused.
_UNSUPPORTED = (
    "repetition_detection", "thinking_token_budget", "flat_logprobs",
    "logprob_token_ids", "prompt_logprob_token_ids", "bad_words",
    "stream_interval", "skip_reading_prefix_cache", "extra_args",
)  # fmt: skip

# generation_config.json's names -> ours. As in vLLM, `do_sample` is not read.
_GENERATION_CONFIG = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens",
}  # fmt: skip


class RequestOutputKind(Enum):
    """What a stream of outputs carries each time: all so far, only what is new, only the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is decoded. Every field is checked here, once; a wrong one raises UsageError.

    After construction `stop` and `stop_token_ids` are tuples (None becomes ()), `logit_bias` has
    int keys (None becomes {}), `top_k` is 0 for "all", `allowed_token_ids` is a tuple or None,
    `structured_outputs` (a mapping is read) a StructuredOutputs or None.
    `max_tokens` None means the rest of the context. `prompt_logprobs`: alternatives of each token
    of the prompt. `prompt_logprob_start`: the first whose log-probability is wanted. Without
    `prompt_logprob_ranks` only ranks of tokens among the alternatives are told; all need the
    output projection twice.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    repetition_detection: object = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    thinking_token_budget: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    logprob_token_ids: Sequence[int] | None = None
    prompt_logprob_token_ids: Sequence[int] | None = None
    prompt_logprob_start: int | None = None
    prompt_logprob_ranks: bool = True
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None
    logit_bias: Mapping[int, float] = None  # type: ignore[assignment]  # None becomes {}
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    skip_reading_prefix_cache: bool | None = None
    extra_args: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._refuse_unsupported()
        self._check_choice()
        self._check_length()
        self._check_stop()
        self._check_constraints()

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any], **given: Any) -> "SamplingParams":
        """The checkpoint's `generation_config.json` as defaults under the fields `given`."""
        own = {
            ours: config[theirs]
            for theirs, ours in _GENERATION_CONFIG.items()
            if config.get(theirs) is not None
        }
        return cls(**{**own, **given})

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def structure(self) -> StructuredOutputs | None:
        """`structured_outputs`, as it was read."""
        found = self.structured_outputs
        assert found is None or isinstance(found, StructuredOutputs), "it was read"
        return found

    def _refuse_unsupported(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in _UNSUPPORTED:
            value = getattr(self, name)
            empty = isinstance(value, (list, tuple, dict)) and not value
            if value != defaults[name] and not empty:
                raise UsageError(
                    f"{name}: got {value!r}, allowed only {defaults[name]!r}: not supported yet"
                )

    def _check_choice(self) -> None:
        _integer("n", self.n, 1, MAX_CHOICES)
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _integer("top_k", self.top_k, -1)
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above_low=True)
        if self.seed is not None:
            _integer("seed", self.seed)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, -1)
        if self.prompt_logprobs is not None:
            _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _boolean("prompt_logprob_ranks", self.prompt_logprob_ranks)
        if self.prompt_logprob_start is not None:
            _integer("prompt_logprob_start", self.prompt_logprob_start, 0)
            if self.prompt_logprobs is None:
                raise _wrong("prompt_logprob_start", self.prompt_logprob_start,
                             "only beside prompt_logprobs")  # fmt: skip

    def _check_length(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(
                f"min_tokens: got {self.min_tokens}, allowed at most max_tokens={self.max_tokens}"
            )

    def _check_stop(self) -> None:
        stop = _strings("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        for name in (
            "ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens",
            "spaces_between_special_tokens",
        ):  # fmt: skip
            _boolean(name, getattr(self, name))
        if stop and not self.detokenize:
            raise UsageError(f"stop: got {list(stop)!r}, allowed only with detokenize=True")

    def _check_constraints(self) -> None:
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.structured_outputs is not None:
            read = StructuredOutputs.read(self.structured_outputs)
            object.__setattr__(self, "structured_outputs", read)
        if self.allowed_token_ids is not None:
            allowed = _ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise UsageError("allowed_token_ids: got an empty list, allowed at least one id")
            object.__setattr__(self, "allowed_token_ids", allowed)
        if not isinstance(self.output_kind, RequestOutputKind):
            raise _wrong("output_kind", self.output_kind, "a RequestOutputKind")


def _wrong(name: str, value: object, allowed: str) -> UsageError:
    return UsageError(f"{name}: got {value!r}, allowed {allowed}")


def _integer(name: str, value: object, low: int | None = None, high: int | None = None) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool)
    if not ok or (low is not None and value < low) or (high is not None and value > high):  # type: ignore[operator]
        text = "an integer"
        if low is not None:
            text += f" from {low}" + (f" to {high}" if high is not None else " up")
        raise _wrong(name, value, text)


def _number(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    ok = ok and abs(value) < _TOO_LARGE  # type: ignore[arg-type]  # false for NaN too
    if not ok or not low <= value <= high or (above_low and value == low):  # type: ignore[operator]
        text = f"a number {'above' if above_low else 'from'} {low:g}"
        raise _wrong(name, value, text + (f" to {high:g}" if math.isfinite(high) else " up"))


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _wrong(name, value, "True or False")


def _strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(s, str) and s for s in items):
        raise _wrong(name, value, "a string or a list of strings, none empty")
    return tuple(items)


def _ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple, set, frozenset, range)):
        raise _wrong(name, value, "a list of token ids")
    for token_id in value:
        _integer(name, token_id, 0)
    return tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)


def _biases(value: object) -> dict[int, float]:
    if value is None:
        return {}
    allowed = "an object of token id -> number from -100 to 100"
    if not isinstance(value, Mapping):
        raise _wrong("logit_bias", value, allowed)
    result: dict[int, float] = {}
    for key, bias in value.items():
        if not str(key).isdecimal():  # JSON objects have string keys
            raise _wrong("logit_bias", {key: bias}, allowed)
        if not isinstance(bias, (int, float)) or isinstance(bias, bool):
            raise _wrong("logit_bias", {key: bias}, allowed)
        if not -100 <= bias <= 100:  # vLLM's are clamped; a clamp would be silent
            raise _wrong("logit_bias", {key: bias}, allowed)
        result[int(key)] = float(bias)
    return result

"""OpenAI's `/v1/chat/completions` and `/v1/completions`: bodies to prompts and parameters. Knows
the tokenizer's interface, no engine, no HTTP and no files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

from windlass.engine.text_limits import most_chars
from windlass.errors import RequestError, UsageError
from windlass.params import MAX_LOGPROBS, SamplingParams
from windlass.protocol.answers import AnswerForm
from windlass.protocol.chat import Chat, read_chat
from windlass.protocol.delivery import Delivery, read_delivery
from windlass.protocol.fields import only, optional, refuse_unknown, shorten
from windlass.protocol.response_format import read_response_format
from windlass.protocol.served import ChatTokenizer as ChatTokenizer  # for those who take bodies
from windlass.protocol.served import ServedModel as ServedModel
from windlass.protocol.served import encoded
from windlass.units import counted

MAX_SEQUENCES = 128  # prompts times n of one body: OpenAI's limit for n
COMPLETION_MAX_TOKENS = 16  # where a completion names none; in chat: the rest of the context

# Handed to SamplingParams as they are; it checks types and ranges.
SAMPLING = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "min_tokens", "stop", "stop_token_ids", "ignore_eos",
    "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens",
    "logit_bias", "allowed_token_ids", "bad_words", "structured_outputs", "thinking_token_budget",
    "prompt_logprobs",
)  # fmt: skip
# Read and without effect on any token.
_NO_EFFECT: dict[str, type] = {
    "user": str, "metadata": dict, "store": bool, "service_tier": str, "safety_identifier": str,
    "prompt_cache_key": str, "prompt_cache_retention": str, "cache_salt": str, "request_id": str,
    "prediction": dict,
}  # fmt: skip
# Fields at the values with which they ask for nothing, and why other values are refused.
_NOTHING: dict[str, tuple[tuple[object, ...], str]] = {
    "use_beam_search": ((False,), "allowed only false: not supported"),
    "length_penalty": ((1, 1.0), "allowed only 1, without beam search"),
    "priority": ((0,), "allowed only 0: rows of a job are equal"),
    "vllm_xargs": (({},), "not supported"),
}  # fmt: skip
_NOTHING_CHAT: dict[str, tuple[tuple[object, ...], str]] = {
    "echo": ((False,), "not supported in chat: allowed only false"),
    "add_special_tokens": ((False,), "allowed only false: the template writes special tokens"),
    "modalities": ((["text"],), "allowed only ['text']: not supported"),
    "functions": (([],), "not supported, allowed tools"),
    "function_call": (("none", "auto"), "not supported, allowed tools"),
    "documents": (([],), "not supported, allowed in chat_template_kwargs"),
}
_COMMON = (*SAMPLING, *_NO_EFFECT, *_NOTHING, "model", "max_tokens", "logprobs", "best_of",
           "stream", "stream_options", "return_token_ids", "response_format",
           "truncate_prompt_tokens", "return_tokens_as_token_ids")  # fmt: skip
_CHAT = frozenset(
    (*_COMMON, *_NOTHING_CHAT, "messages", "max_completion_tokens", "top_logprobs", "tools",
     "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "add_generation_prompt",
     "continue_final_message", "reasoning_effort", "verbosity", "include_reasoning")
)  # fmt: skip
_COMPLETION = frozenset((*_COMMON, "prompt", "add_special_tokens", "echo"))


class Endpoint(StrEnum):
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a body. A completions body may hold several. `echo`: what its answer begins
    with, where the body has that."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    echo: "Echo | None" = None


class Echo(NamedTuple):
    """A prompt as text, and its first token, of which nothing else is known."""

    text: str
    first: str


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """A checked body. Choice `c` of prompt `p` is number `p * n + c` of the response.
    `form`: how its text is read, in chat."""

    endpoint: Endpoint
    model: str
    prompts: tuple[Prompt, ...]
    delivery: Delivery = Delivery()
    form: AnswerForm = AnswerForm()


def parse_body(
    endpoint: Endpoint, body: Mapping[str, Any], model: ServedModel, *, may_stream: bool = False
) -> ApiRequest:
    """Checks a body of chat or completions and turns it into tokens. Raises RequestError (also for
    a wrong model, with code `model_not_found`)."""
    is_chat = endpoint is Endpoint.CHAT
    check_model(body, model)
    _refuse_unsupported(body, is_chat=is_chat)
    delivery = read_delivery(body, may_stream=may_stream)
    params = _sampling_params(body, model.default_params, is_chat=is_chat)
    delivery = delivery._replace(prompt_logprobs=params.prompt_logprobs)
    if delivery.echo and params.logprobs is not None:
        if delivery.stream and params.n > 1:
            raise RequestError(
                f"n: got {params.n}, allowed 1 in a stream with echo and logprobs", param="n"
            )
        wanted = max(params.logprobs, params.prompt_logprobs or 0)
        has_ranks = params.prompt_logprobs is not None
        params = replace(params, prompt_logprobs=wanted, prompt_logprob_ranks=has_ranks)
    of_prompt = delivery.echo or (not is_chat and delivery.prompt_logprobs is not None)
    limit = _Limit(
        asked=_max_tokens(body, is_chat=is_chat, least=0 if of_prompt else 1),
        default=model.default_params.max_tokens,
        in_all=model.max_model_len,
        why=model.limited_by and f", {model.limited_by}",
    )
    field = "messages" if is_chat else "prompt"
    num_chars = text_chars(endpoint, body)
    if num_chars > most_chars(model.max_model_len):  # before anything is made of it
        raise RequestError(
            f"prompt has {num_chars} characters, which are more than {model.max_model_len} tokens,"
            f" the limit{limit.why}",
            param=field,
            code="context_length_exceeded",
        )
    most = _kept_tokens(body, limit)
    chat = read_chat(body, model, is_cut=most is not None) if is_chat else None
    form = chat.form if chat else AnswerForm()
    prompts = [chat.token_ids] if chat else _prompts(body, model, is_cut=most is not None)
    prompts = prompts if most is None else [ids[-most:] for ids in prompts]
    _check_sequences(len(prompts), params.n)
    params = _with_structure(params, body, chat)
    return ApiRequest(
        endpoint=endpoint,
        model=model.names[0],
        prompts=tuple(
            Prompt(
                tuple(ids),
                _fit(params, limit, len(ids), field),
                _echo(ids, model.tokenizer, delivery) if delivery.echo else None,
            )
            for ids in prompts
        ),
        delivery=delivery._replace(has_output=limit.asked != 0),
        form=form,
    )


def _with_structure(
    params: SamplingParams, body: Mapping[str, Any], chat: Chat | None
) -> SamplingParams:
    """What the answer must be, by whichever field says it. Marks that are read are shown."""
    wanted = {
        "structured_outputs": params.structure,
        "response_format": read_response_format(body),
        "tool_choice": chat.calls if chat else None,
    }
    given = {name: one for name, one in wanted.items() if one is not None}
    if len(given) > 1:
        name = next(iter(given))
        raise RequestError(f"{name}: allowed only without {' and '.join([*given][1:])}", param=name)
    found = next(iter(given.values()), None)
    if chat is None:
        return replace(params, structured_outputs=found)
    if found is not None:
        found = replace(found, after=chat.form.free_until)
    shows = params.skip_special_tokens and not chat.form.shows_special
    return replace(params, structured_outputs=found, skip_special_tokens=shows)


def _echo(token_ids: Sequence[int], tokenizer: ChatTokenizer, delivery: Delivery) -> Echo:
    first = tokenizer.decode(token_ids[:1], skip_special_tokens=False)
    return Echo(
        tokenizer.decode(token_ids, skip_special_tokens=False),
        f"token_id:{token_ids[0]}" if delivery.names_ids and token_ids else first,
    )


def _kept_tokens(body: Mapping[str, Any], limit: "_Limit") -> int | None:
    """How many of a prompt's tokens, the last ones, are kept; None for all."""
    most = optional(body, "truncate_prompt_tokens", int)
    if most is None:
        return None
    if most == -1:  # what the answer leaves
        return max(1, limit.in_all - (limit.asked or 1))
    if most < 1:
        raise RequestError(
            f"truncate_prompt_tokens: got {most}, allowed -1 for as many as fit, or 1 or more",
            param="truncate_prompt_tokens",
        )
    return most


def text_chars(endpoint: Endpoint, body: Mapping[str, Any]) -> int:
    """Characters of what a body's prompt is made of: all texts of its messages or input, or the
    longest text of a completion. No value of the body need be right."""
    chat = endpoint is not Endpoint.COMPLETIONS
    names = {Endpoint.CHAT: "messages", Endpoint.COMPLETIONS: "prompt", Endpoint.RESPONSES: "input"}
    left: list[Any] = [body.get(names[endpoint])]
    sizes = [0]
    while left:
        value = left.pop()
        if isinstance(value, str):
            sizes.append(len(value))
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
    return sum(sizes) if chat else max(sizes)


def check_model(body: Mapping[str, Any], model: ServedModel) -> None:
    """Raises RequestError where the body names another model."""
    name = optional(body, "model", str)
    if name is not None and name not in model.names:
        raise RequestError(
            f"The model {shorten(name)} does not exist, allowed {' or '.join(model.names)}",
            param="model",
            code="model_not_found",
        )


def _check_sequences(num_prompts: int, n: int) -> None:
    if num_prompts * n > MAX_SEQUENCES:
        times = "" if num_prompts == 1 else f" for each of {num_prompts} prompts"
        raise RequestError(
            f"n: got {n}{times}, allowed {MAX_SEQUENCES} sequences in all: use several requests",
            param="n" if num_prompts == 1 else "prompt",
        )


def _refuse_unsupported(body: Mapping[str, Any], *, is_chat: bool) -> None:
    refuse_unknown(body, _CHAT if is_chat else _COMPLETION)
    for name, (nothing, why) in {**_NOTHING, **(_NOTHING_CHAT if is_chat else {})}.items():
        only(body, name, nothing, why)
    for name, kind in _NO_EFFECT.items():
        optional(body, name, kind)
    # best_of = n means what leaving it out means
    only(body, "best_of", (body.get("n") or 1,), "allowed only the value of n")


def _sampling_params(
    body: Mapping[str, Any], defaults: SamplingParams, *, is_chat: bool
) -> SamplingParams:
    given = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    if given.get("stop") == "":
        del given["stop"]
    given["logprobs"] = _chat_logprobs(body) if is_chat else _logprobs(body, "logprobs")
    # the length is settled per prompt, and must not fail min_tokens against a default here
    given["max_tokens"] = None
    try:
        return replace(defaults, **given)
    except UsageError as error:
        raise _as_request_error(error) from error
    except OverflowError as error:  # an integer with hundreds of digits where a number is due
        raise RequestError(f"a number is too large: {error}") from error


def _as_request_error(error: UsageError) -> RequestError:
    """SamplingParams' messages begin with the field's name."""
    return RequestError(str(error), param=str(error).partition(":")[0])


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    wanted = optional(body, "logprobs", bool)
    top = _logprobs(body, "top_logprobs")
    if top and not wanted:
        raise RequestError("top_logprobs: allowed only with logprobs: true", param="top_logprobs")
    return (top or 0) if wanted else None


def _logprobs(body: Mapping[str, Any], name: str) -> int | None:
    number = optional(body, name, int)
    if number is not None and not 0 <= number <= MAX_LOGPROBS:
        raise RequestError(f"{name}: got {number}, allowed 0 to {MAX_LOGPROBS}", param=name)
    return number


def _max_tokens(body: Mapping[str, Any], *, is_chat: bool, least: int) -> int | None:
    """The length the body asks for, at least `least`; None if it does not say."""
    names = ("max_completion_tokens", "max_tokens") if is_chat else ("max_tokens",)
    given = {name: value for name in names if (value := optional(body, name, int)) is not None}
    for name, value in given.items():
        if value < least:
            raise RequestError(f"{name}: got {value}, allowed at least {least}", param=name)
    if len(set(given.values())) > 1:
        raise RequestError(
            "max_tokens: differs from max_completion_tokens, its newer name: give one",
            param="max_tokens",
        )
    return next(iter(given.values()), None)


def _prompts(body: Mapping[str, Any], model: ServedModel, *, is_cut: bool) -> list[list[int]]:
    prompt = body.get("prompt")
    special = optional(body, "add_special_tokens", bool)
    if isinstance(prompt, str) or is_token_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(
            f"prompt: got {shorten(prompt)}, allowed a string, token ids or an array of these",
            param="prompt",
        )
    result = []
    for i, item in enumerate(prompt):
        if isinstance(item, str):
            result.append(
                encoded(item, model, "prompt", special=special is not False, is_cut=is_cut)
            )
        elif is_token_ids(item):
            result.append(item)
        else:
            raise RequestError(
                f"prompt[{i}]: got {shorten(item)}, allowed a string or token ids", param="prompt"
            )
    return result


def is_token_ids(value: object) -> bool:
    """Whether `value` is a list of integers, not empty."""
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


class _Limit(NamedTuple):
    """Lengths in tokens: what the body asks for, what the checkpoint names for bodies that do not
    say, both None where nothing is said; a prompt and its answer together, and why no more."""

    asked: int | None
    default: int | None
    in_all: int
    why: str


def _fit(params: SamplingParams, limit: _Limit, num_prompt: int, field: str) -> SamplingParams:
    """`params` with the `max_tokens` of one prompt of `num_prompt` tokens."""
    if num_prompt == 0:
        raise RequestError(f"{field}: got no tokens, allowed at least one", param=field)
    rest, length = limit.in_all - num_prompt, limit.asked
    if rest < 1 or (length is not None and length > rest):
        asked = "" if rest < 1 else f" and {length} more are asked for"
        raise RequestError(
            f"prompt has {counted(num_prompt, 'token')}{asked}, limit {limit.in_all}{limit.why}",
            param=field,
            code="context_length_exceeded",
        )
    if length is None:
        own = rest if field == "messages" else COMPLETION_MAX_TOKENS
        length = min(rest, limit.default or own)
    try:
        return replace(params, max_tokens=max(1, length))  # the prompt alone: one is computed
    except UsageError as error:
        raise _as_request_error(error) from error

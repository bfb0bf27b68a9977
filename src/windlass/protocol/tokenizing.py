"""`/tokenize` and `/detokenize`, as vLLM has them: bodies to bodies."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from windlass.errors import RequestError
from windlass.protocol.chat import read_chat
from windlass.protocol.fields import optional, refuse_unknown, required, shorten
from windlass.protocol.openai import ServedModel, check_model, is_token_ids

_TOKENIZE = ("model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "tools",
             "tool_choice", "chat_template_kwargs", "return_token_strs",
             "continue_final_message")  # fmt: skip


class WholeTokenizer(Protocol):
    """What detokenising needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


def tokenized(body: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """The ids of a `prompt`, or of `messages` by the chat template. Raises RequestError."""
    refuse_unknown(body, _TOKENIZE)
    check_model(body, model)
    if (body.get("prompt") is None) == (body.get("messages") is None):
        raise RequestError("prompt: allowed one of prompt and messages", param="prompt")
    if body.get("messages") is not None:
        ids = read_chat(body, model).token_ids
    else:
        special = optional(body, "add_special_tokens", bool)
        text = required(body, "prompt", str)
        ids = model.tokenizer.encode(text, add_special_tokens=special is not False)
    found = {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids}
    texts = None
    if optional(body, "return_token_strs", bool):
        texts = [model.tokenizer.decode([one], skip_special_tokens=False) for one in ids]
    return {**found, "token_strs": texts}


def detokenized(
    body: Mapping[str, Any], model: ServedModel, tokenizer: WholeTokenizer
) -> dict[str, Any]:
    """The text of `tokens`. Raises RequestError."""
    refuse_unknown(body, ("model", "tokens"))
    check_model(body, model)
    ids: Any = body.get("tokens")
    if not (ids == [] or is_token_ids(ids)):
        raise RequestError(f"tokens: got {shorten(ids)}, allowed token ids", param="tokens")
    most = tokenizer.vocab_size
    bad = [one for one in ids if not 0 <= one < most]
    if bad:
        raise RequestError(f"tokens: got {bad[0]}, allowed below {most}", param="tokens")
    return {"prompt": tokenizer.decode(ids, skip_special_tokens=False)}

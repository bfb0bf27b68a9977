"""One sequence: a choice of a request, its tokens, text and place in memory. Mutable; one owner,
the engine. Knows pages as numbers, no tensors but the row of logits it is given."""

from dataclasses import dataclass, field

import torch

from windlass.engine.outputs import CompletionOutput, Logprob
from windlass.engine.sampling import Sampler
from windlass.engine.sequence import Delta, Request
from windlass.engine.text import TextStream
from windlass.engine.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class Choice:
    """`num_computed` positions have their keys and values in `pages`; the rest of `token_ids` is
    still to be computed. `max_output` is at least 1."""

    request: Request
    index: int
    max_output: int
    sampler: Sampler
    text: TextStream | None  # None: the request does not want text
    eos_token_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)  # prompt, then output
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    state_slot: int = -1
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids.extend(self.request.prompt_token_ids)
        if self.request.params.logprobs is not None:
            self.cumulative_logprob = 0.0

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def max_total(self) -> int:
        """Tokens of prompt and output at most; positions that may be cached are one fewer."""
        return self.num_prompt + self.max_output

    @property
    def in_prompt(self) -> bool:
        """Whether the next row to compute is a prompt token."""
        return self.num_computed < self.num_prompt

    def advance(self, logits_V: torch.Tensor, tokenizer: Tokenizer) -> Delta:
        """Samples the next token of this choice and decides whether it ends here."""
        sampled = self.sampler.sample(logits_V)
        token = sampled.token_id
        self.token_ids.append(token)
        if sampled.logprob is not None and self.cumulative_logprob is not None:
            self.cumulative_logprob += sampled.logprob
            self.logprobs.append(sampled.as_logprobs(tokenizer.token_bytes))
        new_text = self._decide(token)
        return Delta(self.request.request_id, self.index, new_text, (token,))

    def _decide(self, token: int) -> str:
        """Sets `finish_reason` where the token ends the choice; returns the text to show.

        The sampler gives no end-of-sequence or stop token before `min_tokens`, and the text stream
        no stop string.
        """
        params = self.request.params
        shows = True  # whether the token is part of the text
        if token in self.eos_token_ids and not params.ignore_eos:
            self.finish_reason, shows = "stop", False
        elif token in params.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token
            shows = params.include_stop_str_in_output
        new_text = ""
        if self.text is not None and shows:
            new_text = self.text.push(token)
            if self.text.stop_hit is not None:
                self.finish_reason, self.stop_reason = "stop", self.text.stop_hit
        if self.finish_reason is None and len(self.token_ids) >= self.max_total:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.text is not None:
            new_text += self.text.finish()
        return new_text

    def output(self) -> CompletionOutput:
        """The choice as it stands."""
        return CompletionOutput(
            index=self.index,
            text=self.text.text if self.text is not None else "",
            token_ids=tuple(self.output_ids),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=tuple(self.logprobs) if self.request.params.logprobs is not None else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

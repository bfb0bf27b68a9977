"""What an engine asks of a request, and what it makes of one that passes. Any thread may ask
while passes run."""

from dataclasses import dataclass

from windlass.engine.grammars import Constraint, Grammars
from windlass.engine.request import Request
from windlass.engine.sampling import Sampler, choice_seed
from windlass.engine.sequence import QueuedSequence
from windlass.errors import RequestError
from windlass.ids import Home, HomeShares
from windlass.kvcache.kv_tiers import content_name, home_of
from windlass.kvcache.pages import block_keys
from windlass.schedule.batch import CHUNK_TOKENS
from windlass.units import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRules:
    """Limits in tokens. `longest`: those of a sequence where memory has no end, by what the user or
    the model allows. `limited_by`: why `max_model_len` is no more, where that is special.
    `seed`: of requests without one. `shares`: of homes, as the plan has them."""

    max_model_len: int
    longest: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    seed: int
    prefix_caching: bool
    grammars: Grammars
    limited_by: str = ""
    shares: HomeShares = HomeShares()

    def check(self, request: Request) -> None:
        """Raises RequestError if the request cannot run here."""
        params, num_prompt = request.params, len(request.prompt_token_ids)
        if not num_prompt:
            raise RequestError("prompt has no tokens, allowed at least 1", param="prompt")
        room = self.max_model_len - num_prompt
        if room < 1 or (params.max_tokens is not None and params.max_tokens > room):
            wanted = "" if params.max_tokens is None else f" and max_tokens {params.max_tokens}"
            why = self.limited_by and f", {self.limited_by}"
            raise RequestError(
                f"prompt has {counted(num_prompt, 'token')}{wanted}, limit {self.max_model_len}"
                f" in all{why}",
                param="prompt" if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        ids = request.prompt_token_ids
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise RequestError(
                f"prompt token ids: allowed 0 to {self.vocab_size - 1}", param="prompt"
            )
        if (params.prompt_logprob_start or 0) >= num_prompt:
            raise RequestError(
                f"prompt_logprob_start: got {params.prompt_logprob_start}, allowed a place in the"
                f" prompt, 0 to {num_prompt - 1}",
                param="prompt_logprob_start",
            )
        self.sampler(request, 0)  # checks the ids that the parameters name
        if params.structure is not None:
            self.grammars.check(params.structure)

    def queued(self, request: Request) -> list[QueuedSequence]:
        """The `n` sequences of a request that was checked."""
        params, num_prompt = request.params, len(request.prompt_token_ids)
        max_output, longest = self.max_model_len - num_prompt, self.longest
        if params.max_tokens is not None:
            max_output, longest = params.max_tokens, num_prompt + params.max_tokens
        keys: tuple[bytes, ...] = ()
        if self.prefix_caching:
            keys = block_keys(request.prompt_token_ids, CHUNK_TOKENS)
        home = Home.DEVICE
        if any(self.shares):  # one for all: they share the prompt
            home = home_of(_home_name(request), *self.shares)
        return [
            QueuedSequence(request, index, max_output, longest, keys, home)
            for index in range(params.n)
        ]

    def sampler(self, request: Request, index: int) -> Sampler:
        """Draws the tokens of sequence `index`; RequestError for ids outside the vocabulary."""
        return Sampler(
            request.params,
            prompt_token_ids=request.prompt_token_ids,
            seed=choice_seed(
                request.params, run_seed=self.seed, seed_key=request.seed_key, choice=index
            ),
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
        )

    def constraint(self, request: Request) -> Constraint | None:
        """Of a sequence of a request that was checked."""
        wanted = request.params.structure
        return None if wanted is None else Constraint(self.grammars, wanted)


def _home_name(request: Request) -> str:
    """What decides where its sequences are."""
    if request.is_named:
        return request.seed_key
    return content_name(request.prompt_token_ids, request.params.seed)

"""`--model windlass` of lm-eval-harness: its requests over one `LLM`, each kind as one job."""

from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval.models  # the harness's own, which it forgets where another is registered before
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from windlass.errors import UsageError
from windlass.evals.answering import cut, sampling_params
from windlass.evals.jobs import Jobs
from windlass.evals.scoring import Pair, Score, scores
from windlass.llm import LLM

_OWN = ("max_length", "max_gen_toks", "add_bos_token", "prefix_token_id", "think_end_token",
        "enable_thinking", "chat_template_args")  # fmt: skip

TokenisedPair = tuple[tuple[str, str], list[int], list[int]]


class WindlassLM(TemplateLM):  # type: ignore[misc]  # lm_eval is not there for the types
    """A model by `pretrained`, a folder or a name on the hub, and keywords of `LLM`.

    `max_length`: tokens that a text may have, at most those that the engine reads. `max_gen_toks`:
    of answers whose task says nothing. `add_bos_token`: None for what the checkpoint says.
    `prefix_token_id`: what empty contexts are (BOS, else EOS). `think_end_token`: the text that
    ends reasoning, which is cut off; `enable_thinking` and `chat_template_args` are for the
    template. `batch_size` and `max_batch_size` are not read, passes are planned; nor is `device`,
    which the harness names unasked.
    """

    def __init__(
        self,
        pretrained: str = "demo",
        *,
        batch_size: object = None,
        max_batch_size: object = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        own = {name: options.pop(name, None) for name in _OWN}
        if own["max_length"] is not None:
            options["max_model_len"] = int(own["max_length"]) + 1  # and a token to be generated
        llm = LLM(pretrained, **options)
        self._jobs = Jobs(llm)
        self._model = pretrained
        self._tokens = llm.get_tokenizer()
        self._facts = self._tokens.facts()
        self._max_gen_toks = int(own["max_gen_toks"] or 256)
        self._add_bos: bool | None = own["add_bos_token"]
        self._think_end: str | None = own["think_end_token"]
        self._variables: dict[str, Any] = dict(own["chat_template_args"] or {})
        if own["enable_thinking"] is not None:
            self._variables["enable_thinking"] = own["enable_thinking"]
        self._prefix: int | None = own["prefix_token_id"]

    # --- tokens -----------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        return self._jobs.max_model_len - 1

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def eot_token_id(self) -> int:
        found = self._special_id("eos_token")
        if found is None:
            found = next(iter(self._tokens.eos_token_ids), None)
        if found is None:
            raise UsageError("prefix_token_id is missing: the tokenizer has neither BOS nor EOS")
        return found

    @property
    def prefix_token_id(self) -> int:
        if self._prefix is not None:
            return self._prefix
        found = self._special_id("bos_token")
        return self.eot_token_id if found is None else found

    def _special_id(self, name: str) -> int | None:
        text = self._facts[name]
        ids = [] if text is None else self._tokens.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            bos = self._facts["bos_token"]
            has_bos = bos is not None and string.startswith(bos)
            add_special_tokens = not has_bos and self._add_bos is not False
        return self._tokens.encode(string, add_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        return f"{self._model}-{self._tokens.digest}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        found: str | None = self._facts["chat_template"] if chat_template else None
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self._tokens.render_chat(
            chat_history, add_generation_prompt=add_generation_prompt, variables=self._variables
        )
        if add_generation_prompt:
            return text
        # the last message is gone on with: nothing that ends it may follow
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    # --- requests ---------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenisedPair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        keys = [key for key, _, _ in requests]
        pairs = [Pair(context, continuation) for _, context, continuation in requests]
        return [
            (score.logprob, score.is_greedy)
            for score in self._scores("loglikelihood", keys, pairs, is_quiet=disable_tqdm)
        ]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows = [list(self._windows(request.args[0])) for request in requests]
        flat = [pair for pairs in windows for pair in pairs]
        found = iter(self._scores("", [], flat, is_quiet=disable_tqdm))
        totals = [sum(next(found).logprob for _ in pairs) for pairs in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> Iterator[Pair]:
        """All tokens, each in one continuation."""
        for window in get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length - 1,
            context_len=1,
        ):
            yield Pair(*make_disjoint_window(window))

    def _scores(
        self, kind: str, keys: Sequence[tuple[str, str]], pairs: Sequence[Pair], *, is_quiet: bool
    ) -> list[Score]:
        """Of each pair; what has a key is in the harness's cache as soon as it is known."""
        found: dict[int, Score] = {}
        with tqdm(total=len(pairs), disable=is_quiet, desc="Scoring") as bar:

            def note(place: int, score: Score) -> None:
                found[place] = score
                bar.update()
                if keys:
                    self.cache_hook.add_partial(kind, keys[place], tuple(score))

            scores(self._jobs, pairs, note)
        return [found[place] for place in range(len(pairs))]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda place: requests[place].args[0])
        contexts, params = [], []
        for place in order:
            context, wanted = requests[place].args
            own = sampling_params(
                wanted, usual_length=self._max_gen_toks, stops_early=self._think_end is None
            )
            room = self._jobs.max_model_len - (own.max_tokens or 0)
            if room < 1:
                raise UsageError(
                    f"max_gen_toks: got {own.max_tokens}, allowed less than the longest text, "
                    f"{self._jobs.max_model_len} tokens"
                )
            contexts.append(self.tok_encode(context)[-room:])
            params.append(own)
        with tqdm(total=len(order), disable=disable_tqdm, desc="Generating") as bar:
            for number, output in self._jobs.results(contexts, params):
                request = requests[order[number]]
                text = cut(output.outputs[0].text, request.args[1], self._think_end)
                texts[order[number]] = text
                self.cache_hook.add_partial("generate_until", request.args, text)
                bar.update()
        return texts


def register() -> None:
    """The harness knows the model by its name from now on."""
    assert "hf" in lm_eval.models.MODEL_MAPPING, "its own are there"
    register_model("windlass")(WindlassLM)

"""Lists of prompts through one `LLM`, and whose each result is."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from windlass.engine.outputs import RequestOutput
from windlass.errors import RequestError
from windlass.params import SamplingParams
from windlass.plan import Plan

Prompt = Mapping[str, Any]


class Answering(Protocol):
    """What is needed of `LLM`."""

    @property
    def plan(self) -> Plan: ...

    def generate_iter(
        self, prompts: Iterable[Prompt], sampling_params: Iterable[SamplingParams]
    ) -> Iterator[RequestOutput]: ...


class Jobs:
    """Owns `llm`, in which nobody else's prompts may be: results have the number of their prompt
    among all that it was ever given."""

    def __init__(self, llm: Answering) -> None:
        self._llm = llm
        self._num_given = 0

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._llm.plan.max_model_len

    def results(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> Iterator[tuple[int, RequestOutput]]:
        """The place of each prompt and its result, as they end. Raises RequestError where one
        failed."""
        first, self._num_given = self._num_given, self._num_given + len(prompts)
        given = ({"prompt_token_ids": list(tokens)} for tokens in prompts)
        for output in self._llm.generate_iter(given, params):
            if output.error is not None:
                raise RequestError(output.error)
            yield int(output.request_id) - first, output

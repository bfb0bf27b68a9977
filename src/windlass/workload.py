"""What a job asks for: the lengths of all its sequences. A pure description; who reads a job file
or guesses lengths is elsewhere."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from windlass.errors import UsageError

USUAL_OUTPUT = 256  # tokens of an answer without a limit of its own
_LONG_OUTPUT = 2048  # a limit beyond which answers rarely go


def expected_output(max_tokens: int | None) -> int:
    """Tokens of an answer that may have `max_tokens`; None where nothing limits it."""
    return USUAL_OUTPUT if max_tokens is None else min(max_tokens, _LONG_OUTPUT)


@dataclass(frozen=True)  # sums are kept, so without slots
class Workload:
    """One entry for each sequence of the job, in the order of the job; a request with `n` choices
    has `n`. Lengths in tokens; `output_tokens` is what is expected or, at most, allowed.
    `shared_tokens`: how many at the beginning of each prompt earlier ones compute, where prompts
    that begin alike are computed once; empty where nothing is shared."""

    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    shared_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt_tokens or len(self.prompt_tokens) != len(self.output_tokens):
            raise UsageError(
                f"workload: got {len(self.prompt_tokens)} prompts and {len(self.output_tokens)}"
                " outputs, allowed one of each per sequence, and at least one sequence"
            )
        for name, lengths in (("prompt", self.prompt_tokens), ("output", self.output_tokens)):
            if min(lengths) < 1:
                raise UsageError(
                    f"workload: {name} length: got {min(lengths)}, allowed 1 or more tokens"
                )
        if self.shared_tokens:
            self._check_shared()

    def _check_shared(self) -> None:
        if len(self.shared_tokens) != self.num_sequences:
            raise UsageError(
                f"workload: got {len(self.shared_tokens)} numbers of shared tokens, allowed none or"
                f" {self.num_sequences}, one per sequence"
            )
        for prompt, _, shared in self.lengths():
            if not 0 <= shared < prompt:  # the last token of a prompt is always computed
                raise UsageError(
                    f"workload: shared tokens: got {shared}, allowed 0 to {prompt - 1} of a prompt"
                    f" of {prompt}"
                )

    @classmethod
    def from_lengths(cls, prompt: int, output: int, count: int) -> "Workload":
        """`count` sequences of the same lengths."""
        return cls((prompt,) * count, (output,) * count)

    def evenly(self, count: int) -> "Workload":
        """`count` of the sequences, evenly chosen."""
        kept = [i * self.num_sequences // count for i in range(count)]
        lengths = (self.prompt_tokens, self.output_tokens, self.shared_tokens)
        return Workload(*(tuple(own[i] for i in kept) if own else () for own in lengths))

    def shortened(self, longest: int) -> "Workload":
        """The workload with sequences of `longest` tokens at most."""
        prompts = tuple(min(p, longest - 1) for p in self.prompt_tokens)
        outputs = zip(prompts, self.output_tokens, strict=True)
        shared = zip(prompts, self.shared_tokens, strict=False)
        return Workload(
            prompts,
            tuple(min(o, longest - p) for p, o in outputs),
            tuple(min(s, p - 1) for p, s in shared),
        )

    def sharing(self, is_on: bool) -> "Workload":
        """The workload where prompts that begin alike are computed once, or each by itself."""
        return self if is_on or not self.shared_tokens else replace(self, shared_tokens=())

    def lengths(self) -> Iterator[tuple[int, int, int]]:
        """Prompt, output and shared tokens of each sequence."""
        shared = self.shared_tokens or (0,) * self.num_sequences
        return zip(self.prompt_tokens, self.output_tokens, shared, strict=True)

    @property
    def num_sequences(self) -> int:
        return len(self.prompt_tokens)

    @cached_property
    def total_prompt_tokens(self) -> int:
        return sum(self.prompt_tokens)

    @cached_property
    def computed_prompt_tokens(self) -> int:
        """Prompt tokens but those that are shared."""
        return self.total_prompt_tokens - sum(self.shared_tokens)

    @cached_property
    def computed_tokens(self) -> int:
        """What a job's work is counted in: prompt tokens to compute and tokens to generate."""
        return self.computed_prompt_tokens + self.total_output_tokens

    @cached_property
    def total_output_tokens(self) -> int:
        return sum(self.output_tokens)

    @cached_property
    def mean_prompt_tokens(self) -> float:
        return self.total_prompt_tokens / self.num_sequences

    @cached_property
    def mean_shared_tokens(self) -> float:
        return sum(self.shared_tokens) / self.num_sequences

    @cached_property
    def mean_output_tokens(self) -> float:
        return self.total_output_tokens / self.num_sequences

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and output."""
        return max(p + o for p, o in zip(self.prompt_tokens, self.output_tokens, strict=True))


class Job(NamedTuple):
    """Lengths of a job. `is_bounded`: all its requests say how long an answer may be."""

    workload: Workload
    is_bounded: bool

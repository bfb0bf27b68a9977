"""What a job asks for: the lengths of all its sequences. A pure description; who reads a job file
or guesses lengths is elsewhere."""

from dataclasses import dataclass
from typing import NamedTuple

from windlass.errors import UsageError

USUAL_OUTPUT = 256  # tokens of an answer without a limit of its own
_LONG_OUTPUT = 2048  # a limit beyond which answers rarely go


def expected_output(max_tokens: int | None) -> int:
    """Tokens of an answer that may have `max_tokens`; None where nothing limits it."""
    return USUAL_OUTPUT if max_tokens is None else min(max_tokens, _LONG_OUTPUT)


@dataclass(frozen=True, slots=True)
class Workload:
    """One entry for each sequence of the job, in the order of the job; a request with `n` choices
    has `n`. Lengths in tokens; `output_tokens` is what is expected or, at most, allowed."""

    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]

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

    @classmethod
    def from_lengths(cls, prompt: int, output: int, count: int) -> "Workload":
        """`count` sequences of the same lengths."""
        return cls((prompt,) * count, (output,) * count)

    def evenly(self, count: int) -> "Workload":
        """`count` of the sequences, evenly chosen."""
        kept = [i * self.num_sequences // count for i in range(count)]
        return Workload(
            tuple(self.prompt_tokens[i] for i in kept), tuple(self.output_tokens[i] for i in kept)
        )

    @property
    def num_sequences(self) -> int:
        return len(self.prompt_tokens)

    @property
    def total_prompt_tokens(self) -> int:
        return sum(self.prompt_tokens)

    @property
    def total_output_tokens(self) -> int:
        return sum(self.output_tokens)

    @property
    def mean_prompt_tokens(self) -> float:
        return self.total_prompt_tokens / self.num_sequences

    @property
    def mean_output_tokens(self) -> float:
        return self.total_output_tokens / self.num_sequences

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and output."""
        return max(p + o for p, o in zip(self.prompt_tokens, self.output_tokens, strict=True))


class Job(NamedTuple):
    """Lengths of a job. `is_bounded`: all its requests say how long an answer may be."""

    workload: Workload
    is_bounded: bool

"""What is asked: random words, or the prompts of a file."""

import json
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random

from windlass.errors import UsageError
from windlass.load.answers import Ask, Endpoint

# Common ones: of one token in most vocabularies.
_WORDS = (
    "the of and to in is was for on that with his as by at from it had her not are be this "
    "have were which one you they all there been their more when will would who so can if "
    "out up into time some could only other new then now over like after first water people "
    "work house world hand life day part place small never again under last light"
).split()
_FEW, _MANY = 8, 72  # words of the prompts that the server counts


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomPrompts:
    """Lengths in tokens. `prefix_len`: how many are the same in all; `range_ratio`: lengths are
    drawn from (1 - r) to (1 + r) times what is said."""

    count: int
    input_len: int
    output_len: int
    prefix_len: int = 0
    range_ratio: float = 0.0
    seed: int = 0

    async def make(self, endpoint: Endpoint) -> list[Ask]:
        """Asks the server how many tokens words have. Raises ServerError."""
        draw = Random(self.seed)
        sizes = [await endpoint.prompt_tokens(_words(draw, n)) for n in (_FEW, _MANY)]
        per_word = max(0.1, (sizes[1] - sizes[0]) / (_MANY - _FEW))

        def words(tokens: int) -> str:
            return _words(draw, max(1, round(tokens / per_word)))

        def length(mean: int) -> int:
            ratio = self.range_ratio
            return max(1, draw.randint(int(mean * (1 - ratio)), int(mean * (1 + ratio))))

        prefix = words(self.prefix_len) + " " if self.prefix_len else ""
        return [
            Ask(prefix + words(length(self.input_len)), length(self.output_len))
            for _ in range(self.count)
        ]


def _words(draw: Random, count: int) -> str:
    return " ".join(draw.choices(_WORDS, k=count))


def read_prompts(path: Path, count: int, output_len: int) -> list[Ask]:
    """Of a file with {"prompt": text} in each line, and `output_tokens` where a line has a length
    of its own; from the beginning again where there are too few. Raises UsageError."""
    asks = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"--dataset-path: {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, length = row["prompt"], row.get("output_tokens", output_len)
        except (ValueError, KeyError, TypeError, AttributeError):
            prompt = length = None
        if not isinstance(prompt, str) or type(length) is not int or length < 1:
            raise UsageError(
                f"{path}:{number}: got {line!r:.80}, allowed an object with a prompt, a string, and"
                " maybe output_tokens, an integer from 1"
            )
        asks.append(Ask(prompt, length))
    if not asks:
        raise UsageError(f"{path}: no prompts")
    return list(islice(cycle(asks), count))

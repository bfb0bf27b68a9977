"""Which rows begin alike: a name for each, by how much of its prompt others were seen to have."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from windlass.batch.jobfile import JobRow

_FIRST_CHARS, _NUM_LENGTHS = 256, 9  # beginnings of 256, 512, ... 65,536 characters are compared
_MOST_SEEN = 200_000  # beginnings that are remembered
_PROMPTS = ("messages", "prompt", "input")


class Begins:
    """Remembers the beginnings of rows. Text is cut at powers of two, so two rows that share less
    than half of a length more are called alike by that length."""

    def __init__(self) -> None:
        self._seen: Counter[bytes] = Counter()

    def names(self, rows: Sequence[JobRow]) -> list[bytes]:
        """Of each row: its longest beginning that another row had, here or before; of one that
        shares none, a name of its own."""
        if len(self._seen) > _MOST_SEEN:
            self._seen.clear()
        chains = [_chain(row) for row in rows]
        for chain in chains:
            self._seen.update(chain)
        return [
            next((one for one in reversed(chain) if self._seen[one] > 1), row.digest)
            for row, chain in zip(rows, chains, strict=True)
        ]


def _chain(row: JobRow) -> list[bytes]:
    """Hashes of its beginnings, the shortest first."""
    text = _text(row.body or {}).encode()
    chain = []
    for power in range(_NUM_LENGTHS):
        if len(text) < (length := _FIRST_CHARS << power):
            break
        chain.append(blake2b(text[:length], digest_size=12).digest())
    return chain


def _text(body: Mapping[str, Any]) -> str:
    for name in _PROMPTS:
        if (prompt := body.get(name)) is not None:
            return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    return ""

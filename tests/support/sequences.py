"""Sequences without a tokenizer, for tests of admission."""

from windlass.engine.sequence import QueuedSequence, Sequence


class PlainStarts:
    """Makes sequences that sample nothing and have no text."""

    def start(self, queued: QueuedSequence) -> Sequence:
        return Sequence(queued, None, None, frozenset())  # type: ignore[arg-type]

"""Guesses by the model's own layer for multi-token prediction, which runs after a pass over what it
computed. Knows tokens, pages and states, not what the layer is."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from windlass.engine.drafting import Drafting
from windlass.engine.rows import ScheduledSequence
from windlass.engine.sequence import Sequence
from windlass.schedule.batch import Segment, make_batch
from windlass.schedule.passes import PassShape, run_draft
from windlass.schedule.runtime import DraftRuntime


class _Rows(NamedTuple):
    """Rows of a sequence that a pass has computed, each with the token that followed it."""

    sequence: Sequence
    segment: Segment  # its tokens are those that followed
    first_row: int  # of the pass

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + self.segment.num_tokens)


class LayerDrafts:
    """What a pass has computed and the layer has not seen. The layer sees all rows of prompts, so
    that prompts that share pages share its keys and values too: the last position of a shared block
    is that of the prompt that filled it, whatever follows in another. It sees generated rows while
    guesses are wanted; the positions of others stay zeros in its cache. Both cost guesses that are
    right, and no token."""

    def __init__(
        self,
        runtime: DraftRuntime,
        shape: PassShape,
        drafting: Drafting,
        *,
        micro_batch_tokens: int,
        takes_likeliest: bool,
    ) -> None:
        """`takes_likeliest`: the device finds the likeliest tokens, and logits stay there."""
        self._runtime = runtime
        self._shape = shape
        self._drafting = drafting
        self._micro_batch_tokens = micro_batch_tokens
        self._takes_likeliest = takes_likeliest
        self._kept: list[_Rows] = []
        self._states: Any = None  # of the rows of the pass

    def keep(self, rows: Iterable[ScheduledSequence], states: Any) -> None:
        """A pass over `rows` has brought its tokens."""
        self._kept, self._states = [], states
        first_row = 0
        for sequence, segment in rows:
            first = segment.first_position
            # a guess that was wrong is no row of the sequence; one that failed has no next token
            last = min(sequence.num_computed, sequence.num_tokens - 1)
            if last > first:
                own = replace(
                    segment,
                    token_ids=sequence.following(first, last),
                    wants_logits=segment.wants_logits and sequence.finish_reason is None,
                    takes_likeliest=self._takes_likeliest,
                    num_drafts=0,
                    targets=(),
                )
                self._kept.append(_Rows(sequence, own, first_row))
            first_row += segment.num_tokens

    def run(self) -> bool:
        """Runs the layer, and tells its guesses. Whether prompts were among what it saw."""
        kept, states = self._kept, self._states
        self._kept, self._states = [], None
        is_wanted = self._drafting.wants_guesses
        seen = [one for one in kept if one.segment.is_prompt or is_wanted]
        if not seen:
            return False
        rows = [row for one in seen for row in one.rows]
        guessing = [one.sequence for one in seen if is_wanted and one.segment.wants_logits]
        segments = [
            one.segment if is_wanted else replace(one.segment, wants_logits=False) for one in seen
        ]
        batch = make_batch(segments, micro_batch_tokens=self._micro_batch_tokens)
        outcome = run_draft(self._runtime, self._shape, batch, states, rows)
        tokens = outcome.likeliest if self._takes_likeliest else outcome.logits.argmax(1)
        for sequence, token in zip(guessing, tokens.tolist(), strict=True):
            if sequence.pages:  # it may have been given up since
                self._drafting.hear(sequence, token)
        return any(one.segment.is_prompt for one in seen)

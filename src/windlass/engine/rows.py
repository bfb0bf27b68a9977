"""The rows that a sequence has in a pass."""

from dataclasses import replace
from typing import NamedTuple

from windlass.engine.prompt_pages import PromptPages
from windlass.engine.sequence import Sequence
from windlass.kvcache.kv_cache import KvCache
from windlass.schedule.batch import Segment, fitting_rows


class ScheduledSequence(NamedTuple):
    """A segment and whose it is."""

    sequence: Sequence
    segment: Segment


def _row(
    prompts: PromptPages, sequence: Sequence, span: tuple[int, int], *, is_prompt: bool
) -> ScheduledSequence:
    """The sequence's rows at positions from the first of `span` up to its last."""
    first, last = span
    scored = sequence.first_scored
    is_scored = is_prompt and scored is not None and last >= scored
    segment = Segment(
        sequence=sequence.number,
        token_ids=sequence.tokens(first, last),
        first_position=first,
        pages=tuple(sequence.pages),
        state_slot=sequence.state_slot,
        is_prompt=is_prompt,
        long_rope=prompts.long_rope(sequence.queued),
        home=sequence.home,
        wants_logits=last == sequence.num_tokens,
        targets=sequence.request.prompt_token_ids[first + 1 : last + 1] if is_scored else (),
        scoring=sequence.queued.scoring,
    )
    return ScheduledSequence(sequence, segment)


def generated_row(prompts: PromptPages, sequence: Sequence, room: int) -> ScheduledSequence:
    """A sequence's tokens that were generated and not computed yet, as far as there is room."""
    first = sequence.num_computed
    last = min(sequence.num_tokens, first + room)
    return _row(prompts, sequence, (first, last), is_prompt=False)


def add_prompt(
    prompts: PromptPages, sequence: Sequence, room: int, rows: list[ScheduledSequence]
) -> int:
    """Adds the next chunk of a prompt, if there is room for one, and returns its number of rows.
    What rows before it have computed, here or earlier, is done."""
    skipped = prompts.num_skipped(sequence)
    count = fitting_rows(sequence.num_prompt - sequence.num_computed - skipped, room)
    if not count:
        return 0
    source = prompts.skip(sequence, skipped)
    first, last = sequence.num_computed, sequence.num_computed + count
    _, segment = _row(prompts, sequence, (first, last), is_prompt=True)
    kept = prompts.fill(sequence, first, last)
    segment = replace(segment, state_source=source, kept_states=kept)
    rows.append(ScheduledSequence(sequence, segment))
    return count


def with_drafts(
    row: ScheduledSequence, drafts: tuple[int, ...], kv: KvCache, num_running: int
) -> ScheduledSequence:
    """The row with guesses behind it, as many as its pages have room for, and those that are free
    beyond one for each of `num_running`. The last token of a sequence is never computed."""
    sequence, segment = row
    drafts = drafts[: max(0, sequence.max_total - 1 - sequence.num_tokens)]
    missing = kv.pages_for(sequence.num_tokens + len(drafts)) - len(sequence.pages)
    if 0 < missing <= kv.num_free_pages - num_running:
        sequence.pages.extend(kv.take_pages(missing))
    drafts = drafts[: len(sequence.pages) * kv.page_tokens - sequence.num_tokens]
    more = replace(
        segment,
        token_ids=segment.token_ids + drafts,
        pages=tuple(sequence.pages),
        num_drafts=len(drafts),
    )
    return ScheduledSequence(sequence, more if drafts else segment)

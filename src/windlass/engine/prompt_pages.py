"""Pages of prompts: sequences whose prompts begin alike hold the same. Knows counts, no tensors.

A prompt may read blocks that others compute up to its last token, whose row it must compute for the
logits. Blocks end where chunks may, so that results are those of a prompt that was computed in two
chunks: the same bits as ever. Prompts find what others of their home have computed, an answer too
where its rows have the bits that a prompt's have: the next turn of a chat goes on behind it.

Where log-probabilities of the prompt are wanted it also needs those of the tokens that follow a
block's rows, the first token of the next among them. They are kept by that token too, apart from
pages; where they are not known it computes the block again, into the same pages, to the same bits.

Where the model has recurrent layers a prompt goes on from a state that was kept: at the end of the
last block that the next turn can have, and where prompts that begin alike part.
"""

from collections.abc import Hashable, Iterable, Mapping
from itertools import islice
from types import MappingProxyType

from windlass.engine.prompt_scores import BlockScores, KnownScores
from windlass.engine.sequence import QueuedSequence, Sequence
from windlass.kvcache.kv_tiers import KvTiers
from windlass.kvcache.pages import PageBlock, PagePool, block_keys, readable_blocks
from windlass.schedule.batch import CHUNK_TOKENS

Known = list[PageBlock | None]


class PromptPages:
    """Which pages prompts get, and how far they are computed."""

    def __init__(self, kv: KvTiers, long_rope_after: int | None, *, keeps_answers: bool) -> None:
        """`keeps_answers`: what was generated may be found by a prompt that has it."""
        self._kv = kv
        self._keeps_answers = keeps_answers
        self._long_rope_after = long_rope_after
        self._scores = KnownScores()
        self._block_pages = CHUNK_TOKENS // kv.page_tokens
        assert self._block_pages * kv.page_tokens == CHUNK_TOKENS, "a chunk is a number of pages"
        self.num_asked = 0  # tokens of prompts that might have been found
        self.num_found = 0  # of these, tokens that were not computed again

    def long_rope(self, queued: QueuedSequence) -> bool:
        """Whether its positions use LongRoPE's long factors."""
        return self._long_rope_after is not None and queued.longest > self._long_rope_after

    def find(self, queued: QueuedSequence) -> Known:
        """What is known of each block that the prompt may read; true until pages are taken or given
        back."""
        find = self._kv.of(queued.home).pool.find
        return [find(name) for name in self._names(queued)[: _num_readable(queued)]]

    def num_held(self, known: Known) -> int:
        """Pages of these that running sequences hold already."""
        held = [block for block in known if block is not None and block.num_holders]
        return len(held) * self._block_pages

    def num_ready(self, queued: QueuedSequence, known: Known) -> int:
        """Tokens at the beginning that need not be computed."""
        return self._num_there(queued, known)

    def take(self, sequence: Sequence, known: Known) -> None:
        """Gives the sequence all pages of its prompt, and names to those that others may read.
        `known`: what `find` says of it now."""
        queued, kv = sequence.queued, self._kv.of(sequence.home)
        pool = kv.pool
        shared = [block for block in known if block is not None]
        for block in shared:
            pool.hold(block)  # before anything is taken, which may forget what nobody holds
        count = kv.pages_for(queued.num_tokens) - len(shared) * self._block_pages
        fresh = iter(kv.take_pages(count))
        for place, name in enumerate(self._names(queued)):
            found = known[place] if place < len(known) else None
            pages = found.pages if found else tuple(islice(fresh, self._block_pages))
            if found is None and pool.find(name) is None:
                pool.name(name, pages)
            sequence.pages.extend(pages)
        sequence.pages.extend(fresh)
        sequence.num_cached, sequence.num_alike = 0, len(shared) * CHUNK_TOKENS
        self.num_asked += queued.num_tokens

    def num_skipped(self, sequence: Sequence) -> int:
        """Tokens of a sequence in its prompt that others have computed, behind those that it has
        itself."""
        first = sequence.num_computed // CHUNK_TOKENS
        blocks = (self._block(sequence, i) for i in range(first, _num_readable(sequence.queued)))
        return self._num_there(sequence.queued, blocks, first, sequence.prompt_scores)

    def skip(self, sequence: Sequence, count: int) -> int:
        """Moves a sequence past `count` such tokens. The slot of the state that its next row goes
        on from; -1: its own, if it has any."""
        if not count:
            return -1
        first = sequence.num_computed // CHUNK_TOKENS
        for place in range(first, first + count // CHUNK_TOKENS):
            if _lacks_scores(sequence.queued, place, sequence.prompt_scores):
                found = self._known_scores(sequence.queued, place)
                assert found is not None, "only what has its scores is skipped"
                sequence.prompt_scores[place] = found
        sequence.num_computed += count
        sequence.num_cached += count
        self.num_found += count
        block = self._block(sequence, sequence.num_computed // CHUNK_TOKENS - 1)
        assert block is not None, "only what has a name is skipped"
        return self._pool(sequence).use_state(block) if self._kv.has_states else -1

    def fill(self, sequence: Sequence, first: int, last: int) -> tuple[tuple[int, int], ...]:
        """Prompt rows from position `first` up to `last` are in the next pass: what comes later in
        it, or after it, may read them. Positions and the slots that the states before them are to
        be kept in."""
        is_scored = sequence.first_scored is not None and last >= sequence.first_scored
        kept: list[tuple[int, int]] = []
        ends = {sequence.num_alike}
        if not sequence.is_batch:  # whose prompts have no next turn
            ends.add(readable_blocks(sequence.num_prompt, CHUNK_TOKENS) * CHUNK_TOKENS)
        for place in range(first // CHUNK_TOKENS, last // CHUNK_TOKENS):
            block, end = self._block(sequence, place), (place + 1) * CHUNK_TOKENS
            if block is not None:
                block.is_full = True
                if self._kv.has_states and end in ends and block.state < 0:
                    self._pool(sequence).keep_state(block)
                    kept += [(end, block.state)] * (block.state >= 0)
            name = self._name_of_scores(sequence.queued, place)
            if is_scored and name is not None:
                scoring = sequence.queued.scoring
                sequence.prompt_scores[place] = self._scores.begin(name, scoring)
        return tuple(kept)

    def end(self, sequence: Sequence) -> None:
        """Names what a sequence that ends has generated, before its pages are given back. Those of
        batches have no next turn."""
        if not self._keeps_answers or sequence.is_batch:
            return
        queued, pool, size = sequence.queued, self._pool(sequence), self._block_pages
        tokens = (*queued.request.prompt_token_ids, *sequence.output_ids)[: sequence.num_computed]
        num_named = len(queued.block_keys)
        keys = block_keys(tokens, CHUNK_TOKENS, queued.block_keys)[num_named:]
        for place, name in enumerate(self._names(queued, keys), num_named):
            if pool.find(name) is None:
                block = pool.name(name, sequence.pages[place * size : (place + 1) * size])
                block.is_full = True

    def _num_there(
        self,
        queued: QueuedSequence,
        blocks: Iterable[PageBlock | None],
        first: int = 0,
        scores: Mapping[int, BlockScores] = MappingProxyType({}),
    ) -> int:
        """Tokens of `blocks`, which begin with the prompt's at place `first`, that need not be
        computed: all is there up to where a prompt can go on. `scores`: what it has itself."""
        count = 0
        for place, block in enumerate(blocks, first):
            if block is None or not block.is_full:
                break
            if _lacks_scores(queued, place, scores) and self._known_scores(queued, place) is None:
                break
            if block.state >= 0 or not self._kv.has_states:
                count = (place + 1 - first) * CHUNK_TOKENS
        return count

    def _known_scores(self, queued: QueuedSequence, place: int) -> BlockScores | None:
        name = self._name_of_scores(queued, place)
        return None if name is None else self._scores.find(name)

    def _name_of_scores(self, queued: QueuedSequence, place: int) -> Hashable | None:
        """What those of a block's rows depend on; None where it has no name or no token follows."""
        end = (place + 1) * CHUNK_TOKENS
        if place >= len(queued.block_keys) or end >= queued.num_tokens:
            return None
        following = queued.request.prompt_token_ids[end]
        name = (self.long_rope(queued), queued.block_keys[place])
        return (*name, following, queued.home, queued.scoring)

    def _names(
        self, queued: QueuedSequence, keys: tuple[bytes, ...] | None = None
    ) -> list[Hashable]:
        is_long = self.long_rope(queued)
        return [(is_long, key) for key in (queued.block_keys if keys is None else keys)]

    def _pool(self, sequence: Sequence) -> PagePool:
        return self._kv.of(sequence.home).pool

    def _block(self, sequence: Sequence, place: int) -> PageBlock | None:
        return self._pool(sequence).block_of(sequence.pages[place * self._block_pages])

    def forget_all(self) -> None:
        """Nothing that was computed counts any more; nobody may hold any page."""
        self._kv.forget_all()
        self._scores.forget_all()

    def check(self, sequence: Sequence) -> None:
        """A running sequence holds blocks by their names alone, each where it belongs."""
        names, size = self._names(sequence.queued), self._block_pages
        for place, name in enumerate(names):
            block = self._block(sequence, place)
            if block is not None:
                pages = tuple(sequence.pages[place * size : (place + 1) * size])
                assert (block.name, block.pages) == (name, pages), "another prompt's block"
                is_computed = (place + 1) * CHUNK_TOKENS <= sequence.num_computed
                assert block.is_full or not is_computed, "a block was computed and not marked"
        pool = self._pool(sequence)
        for page in sequence.pages[len(names) * size :]:
            assert pool.block_of(page) is None, "a page that still changes has a name"


def _num_readable(queued: QueuedSequence) -> int:
    return min(len(queued.block_keys), readable_blocks(queued.num_tokens, CHUNK_TOKENS))


def _lacks_scores(queued: QueuedSequence, place: int, scores: Mapping[int, BlockScores]) -> bool:
    """Whether log-probabilities of tokens that follow a block's rows are wanted and not among
    `scores`."""
    first, own = queued.first_scored, scores.get(place)
    is_scored = first is not None and place >= readable_blocks(first, CHUNK_TOKENS)
    return is_scored and (own is None or own.rows is None)

"""Numbers of pages: which are free, who holds them, which are known by the prompt that they hold.

Sequences whose prompts begin alike hold the same pages. They are shared a block at a time (pages of
as many positions as a chunk of a prompt has) under a name: the chained hash of all tokens up to its
end and of whatever else its keys and values depend on. A block gets its name when pages are handed
out for it and is full later: whoever comes to it first fills it, once, for all. When nobody holds a
full block any more it is kept under its name until its pages are needed, least recently used first
(PagedAttention, arXiv 2309.06180, section 4.4; names as in vLLM's automatic prefix caching).

Of a model with recurrent layers a block is found where the state after it is kept too, in a slot of
its own: that of the block used longest ago is given to the next, and a forgotten block has none.
"""

import hashlib
from array import array
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

_DIGEST_BYTES = 16  # of 2^64 blocks, two would have one name


@dataclass(slots=True, eq=False)
class PageBlock:
    """Pages known by name. `is_full`: all their positions are computed, or will be by earlier rows
    of the pass that is being put together. `state`: slot of the recurrent state after it, -1 where
    none is kept; as full as the block is."""

    name: Hashable
    pages: tuple[int, ...]
    is_full: bool = False
    num_holders: int = 1
    state: int = -1


def block_keys(
    token_ids: Sequence[int], block_tokens: int, first: Sequence[bytes] = ()
) -> tuple[bytes, ...]:
    """A key for each full block of `block_tokens` tokens, equal only for equal tokens up to its
    end. `first`: those of the first blocks, where they are known."""
    keys = list(first)
    key = keys[-1] if keys else b""
    for end in range(block_tokens * (len(keys) + 1), len(token_ids) + 1, block_tokens):
        tokens = array("q", token_ids[end - block_tokens : end])
        key = hashlib.blake2b(key + tokens.tobytes(), digest_size=_DIGEST_BYTES).digest()
        keys.append(key)
    return tuple(keys)


def readable_blocks(prompt_tokens: int, block_tokens: int) -> int:
    """Blocks of a prompt that it may read: none with its last token."""
    return max(0, prompt_tokens - 1) // block_tokens


def num_alike(some: Sequence[bytes], others: Sequence[bytes]) -> int:
    """Blocks at the beginning of two prompts that have the same keys."""
    count = 0
    for one, other in zip(some, others, strict=False):
        if one != other:
            break
        count += 1
    return count


class PagePool:
    """`num_pages` pages, and slots for states of blocks; knows numbers, no tensors."""

    def __init__(self, num_pages: int, state_slots: Sequence[int] = ()) -> None:
        self._num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._named: dict[Hashable, PageBlock] = {}
        self._block_of: dict[int, PageBlock] = {}  # of every page that belongs to a block
        self._idle: dict[PageBlock, None] = {}  # full blocks that nobody holds, least recent first
        self._num_idle_pages = 0
        self._state_slots = tuple(state_slots)
        self._free_states = list(state_slots)
        self._with_state: dict[PageBlock, None] = {}  # least recently used first

    @property
    def num_free(self) -> int:
        """Pages that can be taken now: of no use, or kept in case that they are found again."""
        return len(self._free) + self._num_idle_pages

    def take(self, count: int) -> list[int]:
        """Hands out pages; there must be enough. Named blocks that nobody holds go last."""
        assert count <= self.num_free, "admission must not promise pages that are not free"
        while len(self._free) < count:
            self._forget(next(iter(self._idle)))
        return [self._free.pop() for _ in range(count)]

    def give(self, pages: Sequence[int]) -> None:
        """One holder of each of `pages` (in a sequence's order) has ended. The last blocks of a
        prompt are the first to be forgotten: they are of no use without those before."""
        for page in reversed(pages):
            block = self._block_of.get(page)
            if block is None:
                self._free.append(page)
            elif page == block.pages[0]:
                block.num_holders -= 1
                if not block.num_holders:
                    self._leave(block)

    def find(self, name: Hashable) -> PageBlock | None:
        return self._named.get(name)

    def block_of(self, page: int) -> PageBlock | None:
        """The block that `page` belongs to, if it has a name."""
        return self._block_of.get(page)

    def hold(self, block: PageBlock) -> None:
        """One more holder of the block's pages; who has them gives them back as all others."""
        if not block.num_holders:
            del self._idle[block]
            self._num_idle_pages -= len(block.pages)
        block.num_holders += 1

    def name(self, name: Hashable, pages: Sequence[int]) -> PageBlock:
        """Makes pages of one holder known by a name that is not yet used."""
        assert name not in self._named, "two blocks of one name"
        block = self._named[name] = PageBlock(name, tuple(pages))
        self._block_of.update(dict.fromkeys(block.pages, block))
        return block

    def keep_state(self, block: PageBlock) -> None:
        """Gives a block without one a slot for the state after it, where there are any."""
        assert block.state < 0, "a block has one state"
        if not self._state_slots:
            return
        if not self._free_states:
            self._drop_state(next(iter(self._with_state)))
        block.state = self._free_states.pop()
        self._with_state[block] = None

    def use_state(self, block: PageBlock) -> int:
        """The slot of the state after a block that has one, now the most recently used."""
        self._with_state[block] = self._with_state.pop(block)
        return block.state

    def forget_all(self) -> None:
        """No page is known by name any more; nobody may hold any."""
        assert all(not block.num_holders for block in self._named.values()), "a block is held"
        for block in list(self._idle):
            self._forget(block)

    def _leave(self, block: PageBlock) -> None:
        """Its last holder has ended."""
        self._idle[block] = None
        self._num_idle_pages += len(block.pages)
        if not block.is_full:
            self._forget(block)

    def _drop_state(self, block: PageBlock) -> None:
        del self._with_state[block]
        self._free_states.append(block.state)
        block.state = -1

    def _forget(self, block: PageBlock) -> None:
        if block.state >= 0:
            self._drop_state(block)
        del self._idle[block], self._named[block.name]
        self._num_idle_pages -= len(block.pages)
        for page in block.pages:
            del self._block_of[page]
        self._free.extend(reversed(block.pages))

    def check(self, held: Mapping[int, int]) -> None:
        """`held`: holders of each page that has any. Every page is free, kept or held, once."""
        idle = [page for block in self._idle for page in block.pages]
        every = sorted([*self._free, *idle, *held])
        assert every == list(range(self._num_pages)), "a page was lost or given back twice"
        assert len(idle) == self._num_idle_pages, "kept pages are counted wrongly"
        assert all(block.is_full and not block.num_holders for block in self._idle)
        for block in self._named.values():
            assert self._named[block.name] is block and len(set(block.pages)) == len(block.pages)
            assert all(self._block_of[page] is block for page in block.pages)
            assert all(held.get(page, 0) == block.num_holders for page in block.pages)
        assert len(self._block_of) == sum(len(block.pages) for block in self._named.values())
        used = [block.state for block in self._with_state]
        assert sorted([*used, *self._free_states]) == sorted(self._state_slots), "a state was lost"
        assert all(self._named[block.name] is block for block in self._with_state)
        assert all(count == 1 for page, count in held.items() if page not in self._block_of), (
            "a page without a name belongs to two sequences"
        )

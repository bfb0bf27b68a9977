"""Keys and values of sequences by their home: pages of the host, of the host that a device attends
to, and of a device, each with a budget of its own. A page is one of a home; what is shared is
shared within it."""

import hashlib
from array import array
from collections.abc import Mapping, Sequence

from windlass.ids import Home
from windlass.kvcache.kv_cache import KvCache

_NAME_BYTES = 8


def home_of(name: str, host_share: float, streamed_share: float = 0.0) -> Home:
    """Where the sequences of a request called `name` are: nothing else decides it, so that their
    bits do not depend on what else runs. Of many names a share of `host_share`, 0 to 1, is at the
    host, and of `streamed_share` there with attention on the device, to the same bits as the rest;
    who is at the host does not depend on that share."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=_NAME_BYTES)
    place, places = int.from_bytes(digest.digest(), "big"), 2.0 ** (8 * _NAME_BYTES)
    if place < host_share * places:
        return Home.HOST
    return Home.STREAMED if place < (host_share + streamed_share) * places else Home.DEVICE


def content_name(token_ids: Sequence[int], seed: int | None) -> str:
    """A name that the same prompt with the same seed has again."""
    tokens = array("q", token_ids).tobytes()
    return hashlib.blake2b(f"{seed}/".encode() + tokens, digest_size=_NAME_BYTES).hexdigest()


class KvTiers:
    """The store of the device that computes, which also has all recurrent states: recurrent layers
    are computed there, whatever a sequence's home. And those of the host, where some sequences have
    their home, or their pages alone."""

    def __init__(
        self, device: KvCache, host: KvCache | None = None, streamed: KvCache | None = None
    ) -> None:
        self._of = {Home.DEVICE: device}
        for home, one in ((Home.HOST, host), (Home.STREAMED, streamed)):
            if one is not None:
                assert one.page_tokens == device.page_tokens, "pages of one size"
                self._of[home] = one
        self.page_tokens = device.page_tokens
        self.pages_for = device.pages_for
        self.device = device

    @property
    def has_states(self) -> bool:
        """Whether the model has recurrent layers."""
        return self.device.has_states

    @property
    def num_homes(self) -> int:
        return len(self._of)

    @property
    def num_positions(self) -> dict[Home, int]:
        """That its pages have, by home."""
        return {home: one.num_pages * self.page_tokens for home, one in self._of.items()}

    @property
    def num_held_pages(self) -> dict[Home, int]:
        """Pages in use, by home."""
        return {home: one.num_pages - one.num_free_pages for home, one in self._of.items()}

    def of(self, home: Home) -> KvCache:
        """Where sequences of that home have their pages."""
        return self._of[home]

    def forget_all(self) -> None:
        """No page is known by name any more; nobody may hold any."""
        for store in self._of.values():
            store.pool.forget_all()

    def check(self, held: Mapping[Home, Mapping[int, int]]) -> None:
        """Invariants; `held`: holders of each home's pages that have any."""
        for home, store in self._of.items():
            store.check(held.get(home, {}))

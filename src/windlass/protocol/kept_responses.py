"""Answers of `/v1/responses` that may be asked for again or gone on from: in memory, bounded."""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MOST_BYTES = 16 << 20  # of all that are kept, as JSON


class Kept(NamedTuple):
    """`items`: what was asked, with the conversation before it."""

    response: dict[str, Any]
    items: list[dict[str, Any]]


class KeptResponses:
    """The last ones used, up to `most_bytes`; of any thread."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        self._size = 0
        self._texts: OrderedDict[str, str] = OrderedDict()  # JSON of each, by id
        self._lock = threading.Lock()

    def keep(self, response: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> None:
        """Forgets those that were used longest ago; one that is larger than all is not kept."""
        text = json.dumps([response, items])  # ASCII: a byte a character
        if len(text) > self._most:
            return
        with self._lock:
            self._texts[response["id"]] = text
            self._size += len(text)
            while self._size > self._most:
                self._size -= len(self._texts.popitem(last=False)[1])

    def find(self, ident: str) -> Kept | None:
        with self._lock:
            text = self._texts.get(ident)
            if text is None:
                return None
            self._texts.move_to_end(ident)
        return Kept(*json.loads(text))

    def find_item(self, ident: str) -> dict[str, Any] | None:
        """An item of any of them."""
        quoted = json.dumps(ident)
        with self._lock:
            text = next((one for one in reversed(self._texts.values()) if quoted in one), None)
        if text is None:
            return None
        kept = Kept(*json.loads(text))
        items = (*kept.items, *kept.response["output"])
        return next((item for item in items if item.get("id") == ident), None)

    def forget(self, ident: str) -> bool:
        """Whether it was there."""
        with self._lock:
            text = self._texts.pop(ident, None)
            self._size -= len(text or "")
        return text is not None

"""Text of one sequence, token by token: whole characters only, stop strings cut. Knows no engine.

Every token has its bytes (`Tokenizer.token_bytes`), so that a push costs the length of its token
and nothing is decoded twice. The text is what follows the prompt: the leading space of a first
token stays, so that prompt + text reads as the model meant it.
"""

import codecs
from typing import Protocol

from windlass.params import SamplingParams


class TokenBytes(Protocol):
    """What a stream needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` leaves out."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of a token inside a text; not always whole characters."""
        ...

    def special_text(self, token_id: int) -> str:
        """A special token as written, without any space the decoder sets before it."""
        ...


class TextStream:
    """Turns pushed tokens into text that may be shown at once.

    Held back: bytes of an unfinished character, and text that could grow into a stop string. The
    owner does not push the end-of-sequence token, nor a stop token id unless
    `include_stop_str_in_output`, and pushes nothing once `stop_hit` is set. A stop string counts
    only if it ends after the first `min_tokens` tokens.
    """

    def __init__(self, tokenizer: TokenBytes, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._stops = tuple(params.stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown: list[str] = []
        self._held = ""  # could be the beginning of a stop string
        self._num_tokens = 0
        self._last_was_special = False
        self._stop_hit: str | None = None

    @property
    def text(self) -> str:
        """All text shown so far."""
        return "".join(self._shown)

    @property
    def stop_hit(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._stop_hit

    def push(self, token_id: int) -> str:
        """Adds one token; returns the new text that may be shown now."""
        assert self._stop_hit is None, "the text has ended with a stop string"
        self._num_tokens += 1
        if not self._params.detokenize:
            return ""
        buffer = self._held + self._decoder.decode(self._bytes(token_id))
        cut = None
        if self._num_tokens > self._params.min_tokens:
            cut = self._cut(buffer)
        if cut is not None:
            self._held = ""
            return self._show(buffer[:cut])
        keep = len(buffer) - self._num_held(buffer)
        self._held = buffer[keep:]
        return self._show(buffer[:keep])

    def finish(self) -> str:
        """Text held back for a stop string that did not come. Bytes of a character that was never
        finished are dropped. Calling it again returns nothing."""
        self._decoder.reset()
        held, self._held = self._held, ""
        return self._show(held)

    def _bytes(self, token_id: int) -> bytes:
        is_special = token_id in self._tokenizer.special_ids
        after_special, self._last_was_special = self._last_was_special, is_special
        if is_special and self._params.skip_special_tokens:
            return b""
        if is_special and after_special and not self._params.spaces_between_special_tokens:
            return self._tokenizer.special_text(token_id).encode()
        return self._tokenizer.token_bytes(token_id)

    def _cut(self, buffer: str) -> int | None:
        """Where the text ends because of a stop string: of those in `buffer`, the one that is
        complete first, whatever tokens it came in; of equals, the longest."""
        matches: list[tuple[int, int, str]] = []
        for stop in self._stops:
            # one that lies wholly in the held text was there before min_tokens were reached
            start = buffer.find(stop, max(0, len(self._held) - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        if not matches:
            return None
        end, start, self._stop_hit = min(matches)
        return end if self._params.include_stop_str_in_output else start

    def _num_held(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that is the beginning of a stop string."""
        held = 0
        for stop in self._stops:
            start = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1))
            while start >= 0 and not stop.startswith(buffer[start:]):
                start = buffer.find(stop[0], start + 1)
            if start >= 0:
                held = max(held, len(buffer) - start)
        return held

    def _show(self, text: str) -> str:
        if text:
            self._shown.append(text)
        return text

"""What sequences may draw, by grammars that llguidance compiles: one `Grammars` of an engine, one
`Constraint` of each constrained sequence.

A grammar is compiled, and its first mask made, on the thread that submits a request. While a pass
runs, a thread of its own makes the masks that its rows will be drawn with: each depends on the
grammar and on the tokens of its sequence alone. Suffix legend: V vocabulary of the model.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from windlass.engine.outputs import GRAMMAR_FAILED
from windlass.errors import RequestError
from windlass.structured import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Mask = NDArray[np.bool_]

_KEPT = 32  # compiled grammars: rows of a job and turns of a conversation have the same
_JSON = {"coerce_one_of": True, "whitespace_flexible": False}  # else a weak model writes blanks
_LONGEST_ERROR = 300  # characters
# of llguidance's, whose default of 1,000,000 lets ((a{100}){100}){100} take seconds and 230 MiB
_LEXER_FUEL = 300_000
# What llguidance takes: measured with 151,936 random tokens, 614 bytes for each; what ordinary
# grammars take is below 10 MiB for all that are kept.
_BYTES_PER_TOKEN, _GRAMMARS_BYTES = 640, 32 << 20


def grammars_bytes(vocab_size: int) -> int:
    """Memory that grammars take beside the engine, once one is used; 0 where none can be."""
    is_able = find_spec("llguidance") is not None
    return vocab_size * _BYTES_PER_TOKEN + _GRAMMARS_BYTES if is_able else 0


class GrammarTokenizer(Protocol):
    """What grammars need of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def special_text(self, token_id: int) -> str: ...


class Grammars:
    """Of any thread. What llguidance needs of the tokenizer is made once it is wanted."""

    def __init__(self, tokenizer: GrammarTokenizer, vocab_size: int) -> None:
        """`vocab_size`: of the model, which may have more ids than the tokenizer."""
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._known: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str, bool], LLMatcher] = OrderedDict()
        self._worker: ThreadPoolExecutor | None = None

    def check(self, wanted: StructuredOutputs) -> None:
        """Compiles it. Raises RequestError where that cannot be done, or nothing can come first."""
        self.compiled(wanted)

    def compiled(self, wanted: StructuredOutputs) -> "LLMatcher":
        """A matcher at the beginning, to be copied. Raises RequestError, as above."""
        key = wanted.kind, wanted.text, wanted.is_lenient
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
                return found
        made = self._compile(wanted)
        with self._lock:
            self._compiled[key] = made
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return made

    def start(self, work: Callable[[], list["Mask | RequestError"]]) -> Future[list[Any]]:
        """Has `work` done beside the caller."""
        if self._worker is None:  # only the engine's thread starts anything
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="masks")
        return self._worker.submit(work)

    def mask(self, matcher: "LLMatcher", wanted: StructuredOutputs) -> Mask:
        """(V,) of what may come next. Raises RequestError where the grammar fails."""
        data = matcher.compute_bitmask()
        if matcher.is_error():
            raise failed(matcher, wanted)
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").view(np.bool_)
        allowed_V = np.zeros(self._vocab_size, np.bool_)
        # one more than the tokenizer has stands for an end that it lacks
        known = min(self._vocab_size, self.tokenizer.vocab_size)
        allowed_V[:known] = bits[:known]
        return allowed_V

    def free_mask(self) -> Mask:
        """(V,) of all but what ends a text."""
        allowed_V = np.ones(self._vocab_size, np.bool_)
        allowed_V[[one for one in self.tokenizer.eos_token_ids if one < self._vocab_size]] = False
        return allowed_V

    def _compile(self, wanted: StructuredOutputs) -> "LLMatcher":
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise RequestError(
                f"{wanted.source}: llguidance is not installed: pip install llguidance",
                param=wanted.source,
                code="unsupported_parameter",
            ) from error
        limits = LLParserLimits(initial_lexer_fuel=_LEXER_FUEL)
        matcher = LLMatcher(self._tokenizer(), _grammar(wanted), log_level=0, limits=limits)
        if matcher.is_error():
            raise failed(matcher, wanted)
        if not self.mask(matcher, wanted).any():
            raise RequestError(
                f"{wanted.source}: allows no text", param=wanted.source, code=GRAMMAR_FAILED
            )
        return matcher

    def _tokenizer(self) -> "LLTokenizer":
        with self._lock:
            if self._known is None:
                self._known = _as_llguidance(self.tokenizer)
            return self._known


def failed(matcher: "LLMatcher", wanted: StructuredOutputs) -> RequestError:
    """Why a grammar cannot be compiled, or cannot go on."""
    reason = " ".join(matcher.get_error().split())[:_LONGEST_ERROR]
    return RequestError(f"{wanted.source}: {reason}", param=wanted.source, code=GRAMMAR_FAILED)


def _grammar(wanted: StructuredOutputs) -> str:
    """As llguidance has it."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if wanted.kind in ("json", "json_object"):
        options: Any = {**_JSON, "lenient": wanted.is_lenient}
        return LLMatcher.grammar_from_json_schema(wanted.text, overrides=options)
    if wanted.kind == "regex":
        return LLMatcher.grammar_from_regex(wanted.text)
    if wanted.kind == "choice":
        texts = (json.dumps(one, ensure_ascii=False) for one in wanted.choice or ())
        return LLMatcher.grammar_from_lark("start: " + " | ".join(texts))
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(wanted.text))
    except ValueError as error:
        raise RequestError(f"{wanted.source}: {error}", param=wanted.source) from error


def _as_llguidance(tokenizer: GrammarTokenizer) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = [one for one in tokenizer.eos_token_ids if one < tokenizer.vocab_size]
    known = _Known(tokenizer, ends)
    return LLTokenizer(TokenizerWrapper(known), n_vocab=len(known.tokens), eos_token=known.ends)


class _Known:
    """The tokenizer under the names that llguidance reads."""

    bos_token_id = None

    def __init__(self, tokenizer: GrammarTokenizer, ends: list[int]) -> None:
        """`ends`: what ends a text; where there is none, one token more stands for it."""
        size = tokenizer.vocab_size
        self.ends = ends or [size]
        self.eos_token_id = self.ends[0]
        self.special_token_ids = sorted({*tokenizer.special_ids, *self.ends})
        self.tokens = [
            tokenizer.special_text(one).encode()
            if one in tokenizer.special_ids
            else tokenizer.token_bytes(one)
            for one in range(size)
        ] + [b"<end>"] * (not ends)
        self._tokenizer = tokenizer
        ordinary = sorted({*range(size)} - {*self.special_token_ids})
        self._ids = {self.tokens[one]: one for one in ordinary}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes | str) -> list[int]:
        """How the model would write what a grammar leaves no choice about. Encoded, where that adds
        nothing (SentencePiece begins a text with a space, say), else the longest tokens."""
        data = text.encode() if isinstance(text, str) else bytes(text)
        given = self._tokenizer.encode(data.decode("utf-8", "replace"), add_special_tokens=False)
        if b"".join(self.tokens[one] for one in given if one < len(self.tokens)) == data:
            return given
        found: list[int] = []
        while data:
            sizes = range(min(len(data), self._longest), 0, -1)
            size = next((size for size in sizes if data[:size] in self._ids), None)
            if size is None:
                break
            found.append(self._ids[data[:size]])
            data = data[size:]
        return found


class Constraint:
    """What one sequence may draw, token by token. Of the engine's thread: it prepares a pass, and
    when the pass has ended takes a mask for each token that is drawn, which it then accepts."""

    def __init__(self, grammars: Grammars, wanted: StructuredOutputs) -> None:
        self._grammars = grammars
        self._wanted = wanted
        self._mark = wanted.after.encode()
        self._tail: bytes | None = b"" if self._mark else None  # of a text that is still free
        self._matcher: LLMatcher | None = None  # at the sequence's last token
        self._future: Future[list[Mask | RequestError]] | None = None
        self._num_taken = 0  # of its masks
        self.is_complete = False

    def prepare(self, drafts: Sequence[int]) -> None:
        """Has masks made: of the next token, and of what may follow each of `drafts`."""
        # one thread does what was started before, also for a pass that failed, first
        self._future = self._grammars.start(lambda: self._masks(drafts))
        self._num_taken = 0

    def allowed(self) -> Mask:
        """(V,) of the next token. Raises RequestError where the grammar fails."""
        assert self._future is not None, "masks were prepared"
        mask = self._future.result()[self._num_taken]
        self._num_taken += 1
        if isinstance(mask, RequestError):
            raise mask
        return mask

    def accept(self, token_id: int) -> None:
        """The token that was drawn, which the last mask allows. `is_complete` then says whether
        nothing can follow. Raises RequestError where the grammar fails."""
        if self._tail is not None:
            self._tail = self._grown(self._tail, token_id)
            return
        matcher = self._matcher
        assert matcher is not None, "masks were made"
        if not matcher.consume_token(token_id) or matcher.is_error():
            raise failed(matcher, self._wanted)
        self.is_complete = matcher.is_stopped()

    def _grown(self, tail: bytes, token_id: int) -> bytes | None:
        """The end of a free text with one more token; None once the mark is in it."""
        tokenizer = self._grammars.tokenizer
        is_special = token_id in tokenizer.special_ids
        new = tokenizer.special_text(token_id).encode() if is_special else b""
        tail += new or tokenizer.token_bytes(token_id)
        return None if self._mark in tail else tail[-len(self._mark) :]

    def _masks(self, drafts: Sequence[int]) -> list[Mask | RequestError]:
        """On the worker's thread, while nothing else touches this object. Guesses are followed on a
        copy: what is not drawn leaves nothing behind, no error either."""
        tail = self._tail
        masks: list[Mask | RequestError] = []
        try:
            if self._matcher is None:
                self._matcher = self._grammars.compiled(self._wanted).deep_copy()
            matcher = self._matcher
            for draft in (*drafts, None):
                is_free = tail is not None
                mask = self._grammars.free_mask() if is_free else self._mask(matcher)
                masks.append(mask)
                if draft is None or not mask[draft]:
                    break
                if tail is not None:
                    tail = self._grown(tail, draft)
                    continue
                if matcher is self._matcher:
                    matcher = matcher.deep_copy()
                if not matcher.consume_token(draft) or matcher.is_stopped():
                    break
        except RequestError as error:
            masks.append(error)
        return masks

    def _mask(self, matcher: "LLMatcher") -> Mask:
        return self._grammars.mask(matcher, self._wanted)

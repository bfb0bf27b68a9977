"""Reading text that comes in pieces: a reader is a generator that takes from a `Source` and yields
what it has found, or None where it needs more. Pieces may be cut anywhere: what is found, joined,
does not depend on where. Knows no kind of markup."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

BLANKS = " \t\r\n"


class Content(NamedTuple):
    """Text of the answer."""

    text: str


class Reasoning(NamedTuple):
    """Text before the answer."""

    text: str


class Call(NamedTuple):
    """The next call of a tool begins."""

    name: str


class Arguments(NamedTuple):
    """More of the JSON text of the last call's arguments."""

    text: str


Found = Content | Reasoning | Call | Arguments
Reader = Iterator[Found | None]
# a generator that yields as a reader does, and has a result
Part = Any


class Source:
    """Text that has come and is not read. `is_over`: no more will come."""

    def __init__(self) -> None:
        self.text = ""
        self.is_over = False

    def take(self, count: int) -> str:
        taken, self.text = self.text[:count], self.text[count:]
        return taken


class Incremental:
    """Runs a reader over pieces as they come."""

    def __init__(self, reader: Callable[[Source], Reader]) -> None:
        self._source = Source()
        self._found = reader(self._source)

    def push(self, text: str) -> list[Found]:
        """What `text` brings."""
        self._source.text += text
        return self._run()

    def finish(self) -> list[Found]:
        """What was held back. Nothing comes after it."""
        self._source.is_over = True
        return self._run()

    def _run(self) -> list[Found]:
        found: list[Found] = []
        for one in self._found:
            if one is None:
                return found
            found.append(one)
        return found


def until(
    source: Source, marks: Sequence[str], make: Callable[[str], Found], *, trim: str = ""
) -> Part:
    """Yields the text before the first of `marks` piece by piece, takes that mark and returns it;
    None where the text ends without. Characters of `trim` just before a mark are left out."""
    while True:
        text = source.text
        places = [(place, -len(mark), mark) for mark in marks if (place := text.find(mark)) >= 0]
        if places:
            place, _, mark = min(places)
            if before := source.take(place).rstrip(trim):
                yield make(before)
            source.take(len(mark))
            return mark
        held = max((_num_begun(text, mark) for mark in marks), default=0)
        if source.is_over:
            if make is not Content:  # within markup, which was cut off: its end, most likely
                source.text = text = text[: len(text) - held]
            if text:
                yield make(source.take(len(text)))
            return None
        if shown := len(text[: len(text) - held].rstrip(trim)):
            yield make(source.take(shown))
        yield None


def _num_begun(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is the beginning of `mark`."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0


def whole(source: Source, marks: Sequence[str]) -> Part:
    """Yields nothing but needs; returns the text before the first of `marks` and that mark, which
    is taken, or (all the text, None) where it ends without."""
    parts: list[str] = []
    reading = until(source, marks, Content)
    while True:
        try:
            found = next(reading)
        except StopIteration as end:
            return "".join(parts), end.value
        if found is None:
            yield None
        else:
            parts.append(found.text)


def skip(source: Source, chars: str) -> Part:
    """Takes all of `chars` that come next."""
    while True:
        source.text = source.text.lstrip(chars)
        if source.text or source.is_over:
            return
        yield None


def begins_with(source: Source, mark: str) -> Part:
    """Whether `mark` comes next; it is not taken."""
    while len(source.text) < len(mark) and mark.startswith(source.text) and not source.is_over:
        yield None
    return source.text.startswith(mark)


def json_call(source: Source, *, names: Sequence[str] = ("arguments", "parameters")) -> Part:
    """Reads `{"name": NAME, "arguments": {...}}`, keys in any order, and yields the call. What
    comes of arguments that follow the name is told as it comes, in the words it is written in.
    Returns whether there was such an object; where not, what was read is put back, and nothing
    told. None: the text has ended within one that had told nothing."""
    read = _Taken(source)
    name: str | None = None
    waiting = ""  # arguments that came before the name
    has_begun = False
    yield from skip(source, BLANKS)
    if not (yield from read.next_is("{")):
        return read.put_back()
    while True:
        yield from read.blanks()
        if (yield from read.next_is("}")):
            break
        if (yield from read.next_is(",")):
            continue
        key = yield from read.value()
        yield from read.blanks()
        if not isinstance(_parsed(key), str) or not (yield from read.next_is(":")):
            return has_begun or read.put_back()
        yield from read.blanks()
        if _parsed(key) in names and name is not None and not (yield from read.is_text()):
            yield from _tell(source)
            continue
        value = yield from read.value()
        if not value:
            return has_begun or read.put_back()
        if _parsed(key) == "name" and isinstance(_parsed(value), str) and name is None:
            name = _parsed(value)
            has_begun = True
            yield Call(name)
            if waiting:
                yield Arguments(waiting)
        elif _parsed(key) in names:
            inner = _parsed(value)
            text = inner if isinstance(inner, str) else value
            if name is None:
                waiting = text
            else:
                yield Arguments(text)
    return has_begun or read.put_back()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


class _Taken:
    """What a reader has taken and may put back."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._text = ""

    def _take(self, count: int) -> str:
        taken = self._source.take(count)
        self._text += taken
        return taken

    def put_back(self) -> bool | None:
        """False, for those who return it; None where the text had ended."""
        if self._source.is_over and not self._source.text:
            return None
        self._source.text = self._text + self._source.text
        return False

    def blanks(self) -> Part:
        while True:
            text = self._source.text
            self._take(len(text) - len(text.lstrip(BLANKS)))
            if self._source.text or self._source.is_over:
                return
            yield None

    def next_is(self, char: str) -> Part:
        """Takes it, if so."""
        while not self._source.text and not self._source.is_over:
            yield None
        if not self._source.text.startswith(char):
            return False
        self._take(1)
        return True

    def is_text(self) -> Part:
        """Whether a string comes next, which is left."""
        while not self._source.text and not self._source.is_over:
            yield None
        return self._source.text.startswith('"')

    def value(self) -> Part:
        """The text of the JSON value that comes next; "" where the text ends within, or there is
        none."""
        extent = _Extent()
        while True:
            size = extent.add(self._source.text)
            if extent.is_over or (self._source.is_over and extent.may_end):
                return self._take(size)
            if self._source.is_over:
                self._take(size)
                return ""
            yield None


def _tell(source: Source) -> Part:
    """Yields the JSON value that comes next as arguments, as it comes."""
    extent = _Extent()
    while True:
        size = extent.add(source.text)
        if size:
            yield Arguments(source.take(size))
            extent.seen = 0
        if extent.is_over or source.is_over:
            return
        yield None


class _Extent:
    """Where a JSON value ends, as its text comes. `seen`: characters of the text given last that
    are known."""

    def __init__(self) -> None:
        self.seen = 0
        self.is_over = False
        self._depth = 0
        self._in_string = self._is_escaped = self._is_bare = False

    @property
    def may_end(self) -> bool:
        """Whether the value ends where the text does: a number or word."""
        return self._is_bare and not self._depth

    def add(self, text: str) -> int:
        """`text`: what came before, as far as it was not taken, and what is new. The size of the
        value in it."""
        while self.seen < len(text) and not self.is_over:
            self._step(text[self.seen])
        return self.seen

    def _step(self, char: str) -> None:
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._in_string = False
                self.is_over = not self._depth
        elif not self._depth and self._is_bare:
            if char in ",}] \t\r\n":
                self.is_over = True
                return  # it is not the value's
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth < 0:  # no value at all
                self.is_over = True
                return
            self.is_over = not self._depth
        elif not self._depth:
            self._is_bare = True
        self.seen += 1

"""What an answer must look like: vLLM's `structured_outputs`, checked and bounded. Knows no
tokenizer and compiles nothing (`engine/grammars.py` does)."""

import json as _json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from windlass.errors import UsageError

MAX_BYTES = 64 << 10  # of a schema, expression, grammar or list of choices
MAX_DEPTH = 100  # levels of a schema
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
# vLLM's fields beside these, with the values at which they ask for nothing
_NOTHING: dict[str, tuple[object, ...]] = {
    "disable_fallback": (False, True),  # there is one program behind this, and none to fall back on
    "disable_any_whitespace": (False, True),  # JSON has none anyway
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """Exactly one of: `json`, a schema as an object or as text; `regex`; `choice`, a list of texts;
    `grammar`, in Lark's or llama.cpp's notation; `json_object`, any JSON object. A wrong one raises
    UsageError.

    After construction `kind` is its name and `text` what it says (of `choice` a JSON list).
    `source`: the name in errors, where the caller has another. `is_lenient`: what a schema asks for
    and cannot be held is left out instead of refused. `after`: text up to whose end the answer is
    free, where it is not empty.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: object = None
    source: str = field(default="structured_outputs", kw_only=True)
    is_lenient: bool = False
    after: str = ""
    most_bytes: int = MAX_BYTES
    kind: str = field(init=False, default="")
    text: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.structural_tag is not None:
            raise UsageError(f"{self.source}.structural_tag: not supported, allowed {_allowed()}")
        given = [kind for kind in _KINDS if getattr(self, kind) not in (None, ())]
        given = [kind for kind in given if kind != "json_object" or self.json_object is not False]
        if len(given) != 1:
            got = " and ".join(given) or "nothing"
            raise UsageError(f"{self.source}: got {got}, allowed exactly one of {_allowed()}")
        object.__setattr__(self, "kind", given[0])
        object.__setattr__(self, "text", self._text(given[0]))
        size = len(self.text.encode("utf-8", "replace"))
        if size > self.most_bytes:
            raise self._wrong(f"got {size} bytes, allowed {self.most_bytes}")

    @classmethod
    def read(cls, given: object) -> "StructuredOutputs":
        """Of an object with these names, as bodies have it."""
        if isinstance(given, StructuredOutputs):
            return given
        if not isinstance(given, Mapping):
            raise UsageError(f"structured_outputs: got {given!r:.80}, allowed one of {_allowed()}")
        own = {name: value for name, value in given.items() if value is not None}
        for name in own:
            if name in (*_KINDS, "structural_tag"):
                continue
            if name not in _NOTHING:
                near = get_close_matches(str(name), _KINDS, n=1)
                hint = f" (did you mean {near[0]}?)" if near else f", allowed {_allowed()}"
                raise UsageError(f"structured_outputs.{name}: not supported{hint}")
            if own[name] not in _NOTHING[name]:
                raise UsageError(f"structured_outputs.{name}: got {own[name]!r:.80}, not supported")
        return cls(**{name: value for name, value in own.items() if name not in _NOTHING})

    def _text(self, kind: str) -> str:
        value = getattr(self, kind)
        if kind == "json":
            return self._schema(value)
        if kind == "json_object":
            if value is not True:
                raise self._wrong(f"got {value!r:.80}, allowed true or false")
            return '{"type":"object"}'
        if kind == "choice":
            is_list = isinstance(value, (list, tuple))
            if not is_list or not value or not all(isinstance(o, str) and o for o in value):
                raise self._wrong(f"got {value!r:.80}, allowed a list of texts, none empty")
            return _json.dumps(list(value))
        if not isinstance(value, str) or not value:
            raise self._wrong(f"got {value!r:.80}, allowed a text that is not empty")
        return value

    def _schema(self, value: object) -> str:
        if isinstance(value, str):
            if len(value) > self.most_bytes:
                raise self._wrong(f"got {len(value)} characters, allowed {self.most_bytes} bytes")
            try:
                value = _json.loads(value)
            except (ValueError, RecursionError) as error:
                raise self._wrong(f"not readable as JSON: {error}") from error
        if not isinstance(value, (Mapping, bool)):
            raise self._wrong(f"got {value!r:.80}, allowed a JSON schema")
        if _is_deeper(value, MAX_DEPTH):
            raise self._wrong(f"nested too deeply, allowed {MAX_DEPTH} levels")
        try:
            return _json.dumps(value, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise self._wrong(f"{error}, allowed JSON values") from error

    def _wrong(self, why: str) -> UsageError:
        is_own = self.source == "structured_outputs"
        return UsageError(f"{self.source}{'.' + self.kind_given if is_own else ''}: {why}")

    @property
    def kind_given(self) -> str:
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)


def _allowed() -> str:
    return ", ".join(_KINDS)


def _is_deeper(value: object, most: int) -> bool:
    """Whether objects and lists in `value` are nested more than `most` times."""
    level = [value]
    for _ in range(most):
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return False
    return any(isinstance(one, (Mapping, list, tuple)) for one in level)


def _inside(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else []

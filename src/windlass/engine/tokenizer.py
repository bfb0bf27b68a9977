"""The checkpoint's tokenizer and chat template, read from its files. Knows no model.

`tokenizers` and `jinja2` do all the work: transformers, which would cost the process more than
100 MB, is an extra, imported only for kinds of tokenizers that nothing here reads.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import tokenizers

from windlass.engine.chat_template import ChatTemplate
from windlass.engine.convert_tokenizer import (
    CHAR_OF_BYTE,
    FILES,
    Converted,
    added_tokens,
    convert,
    is_token,
    token_fields,
)
from windlass.engine.text_limits import LONG_TEXT, most_chars
from windlass.errors import CheckpointError, RequestError

_CHAT_FILE = "chat_template.jinja"
_CHAT_FOLDER = "additional_chat_templates"
_ADDED_FILE = "added_tokens.json"
_SPECIAL_FILE = "special_tokens_map.json"
_DIGESTED = ("tokenizer.json", "tokenizer_config.json", _SPECIAL_FILE, _ADDED_FILE, _CHAT_FILE,
             "merges.txt", *FILES)  # fmt: skip
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTE_OF_CHAR = {char: byte for byte, char in enumerate(CHAR_OF_BYTE)}
_HOLDS_UP = 1 << 14  # characters whose encoding takes long enough to be felt elsewhere
_PIECE = 1 << 14  # characters that are counted at a time
_CUT_TOKENS = 16  # more than one cut between pieces can add


class Tokenizer:
    """Text to ids and back. `eos_token_ids`: of tokenizer, generation_config.json, config.json."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any],
        templates: Mapping[str, str],
        eos_token_ids: Iterable[int] = (),
        digest: str = "",
        doubles_first_space: bool = False,
    ) -> None:
        """`config`: tokenizer_config.json. Special tokens that only it knows are added to the
        backend. Its `add_bos_token` is not read: tokenizer.json decides, as in transformers.
        `doubles_first_space`: see `Converted`."""
        self._backend = backend
        self._doubles_first_space = doubles_first_space
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        named = _named_tokens(config)
        _add_tokens(backend, config)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        own_eos = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
        ids = {*eos_token_ids} | ({own_eos} if own_eos is not None else set())
        self.eos_token_ids: tuple[int, ...] = tuple(sorted(ids))
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.digest = digest
        self._named = named
        self._templates = dict(templates)
        self._chat = ChatTemplate(templates, named)
        self._decoders = _decoder_types(backend)
        self._anchor = self._find_anchor()
        self._bytes: dict[int, bytes] = {}

    def encode(
        self, text: str, add_special_tokens: bool = True, *, at_most: int | None = None
    ) -> list[int]:
        """Ids of a text, with the BOS that the checkpoint asks for unless told otherwise.

        `at_most`: where a text is sure to have more ids, RequestError says so before it is encoded
        whole; one with a few more may pass. What is sure: `text_limits`, and a count of pieces."""
        if at_most is not None and len(text) > LONG_TEXT:
            self._refuse_longer(text, at_most)
        return self._ids(text, add_special_tokens)

    def _refuse_longer(self, text: str, at_most: int) -> None:
        """Counts the tokens of pieces: memory does not grow with the text."""
        size, found = len(text), 0
        is_longer = size > most_chars(at_most)
        for start in () if is_longer else range(0, size, _PIECE):
            found += len(self._ids(text[start : start + _PIECE], False)) - _CUT_TOKENS
            if is_longer := found > at_most:
                break
        if is_longer:
            raise RequestError(
                f"prompt has {size} characters and more than {at_most} tokens, limit {at_most}",
                param="prompt",
                code="context_length_exceeded",
            )

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        if self._doubles_first_space and text[:1] in (" ", "▁"):
            text = " " + text
        try:
            if len(text) < _HOLDS_UP:
                found = self._backend.encode(text, add_special_tokens=add_special_tokens)
            else:  # lets other threads go on meanwhile, as the above does not
                (found,) = self._backend.encode_batch_fast(
                    [text], add_special_tokens=add_special_tokens
                )
        except TypeError as error:  # a lone surrogate, which JSON can write
            raise RequestError("prompt: not valid Unicode", param="prompt") from error
        ids: list[int] = found.ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; for text that grows use `TextStream`."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def facts(self) -> dict[str, Any]:
        """What another program must know of it: names of special tokens, the chat template."""
        return {
            "tokenizer_class": "windlass",
            "vocab_size": self.vocab_size,
            "eos_token_ids": list(self.eos_token_ids),
            "chat_template": self._templates.get("default"),
            **{name: self._named.get(name) for name in _NAMES},
        }

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        now: int | None = None,
    ) -> str:
        """The prompt as text. `chat_template`: text, or a name among the checkpoint's templates;
        `variables` reach the template; `now` (seconds since 1970) replaces the clock. Raises
        RequestError, also where there is no template."""
        return self._chat.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            source=chat_template,
            extra=variables,
            now=now,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        now: int | None = None,
    ) -> list[int]:
        """`render_chat`, encoded; the template writes BOS itself."""
        text = self.render_chat(
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            variables=variables,
            now=now,
        )
        return self.encode(text, add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token adds inside a text: part of a character for byte tokens, empty
        for ids without a token (models pad their vocabulary)."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find_bytes(token_id)
        return found

    def special_text(self, token_id: int) -> str:
        """A token's content as the vocabulary has it."""
        return self._backend.id_to_token(token_id) or ""

    def _find_bytes(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._decoders and self._decoders <= {"ByteLevel", "Fuse"}:
            values = [_BYTE_OF_CHAR.get(char) for char in token]
            known = bytes(value for value in values if value is not None)
            return known if len(known) == len(values) else token.encode()
        byte = _BYTE_TOKEN.fullmatch(token) if "ByteFallback" in self._decoders else None
        if byte:
            return bytes.fromhex(byte[1])
        both = self.decode([*self._anchor, token_id], skip_special_tokens=False)
        return both[len(self.decode(self._anchor, skip_special_tokens=False)) :].encode()

    def _find_anchor(self) -> list[int]:
        """A token to decode others after: decoders treat the first of a text differently."""
        return list(self._backend.encode("a", add_special_tokens=False).ids[-1:])


def load(path: Path, *, model_folder: Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder. With `model_folder`, what ends a text of that model
    counts too: its tokenizer may be another's. Raises CheckpointError for missing or broken
    files."""
    config = _read_json(path / "tokenizer_config.json")
    found = _read_backend(path, config)
    config = dict(found.names) | config
    if "added_tokens_decoder" not in config:  # older checkpoints
        config |= _read_json(path / _SPECIAL_FILE)
        added = _read_json(path / _ADDED_FILE)
        config["added_tokens_decoder"] = _older_added_tokens(added, config)
    eos = _eos_token_ids(path)
    if model_folder is not None:
        eos |= _eos_token_ids(model_folder)
    return Tokenizer(
        found.backend,
        config=config,
        templates=_read_templates(path, config),
        eos_token_ids=eos,
        digest=_digest(path, eos),
        doubles_first_space=found.doubles_first_space,
    )


def _older_added_tokens(ids: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """added_tokens.json, content -> id, as tokenizer_config.json has such tokens today."""
    extra = (one["content"] if isinstance(one, dict) else one for one in _extra_tokens(config))
    special = {*_named_tokens(config).values(), *extra}
    return {
        str(token_id): {
            "content": content,
            "special": content in special,
            "normalized": content not in special,
        }
        for content, token_id in ids.items()
    }


def _eos_token_ids(folder: Path) -> set[int]:
    """Of the model, as its configuration has them."""
    ids: set[int] = set()
    config = _read_json(folder / "config.json")
    text_config = config.get("text_config") or {}
    for source in (_read_json(folder / "generation_config.json"), config, text_config):
        value = source.get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        given = [one for one in values if one is not None]
        if not all(type(one) is int for one in given):
            raise CheckpointError(
                f"{folder}: eos_token_id: got {value!r:.80}, allowed an integer or a list of them"
            )
        ids.update(given)
    return ids


def _read_backend(path: Path, config: Mapping[str, Any]) -> Converted:
    file = path / "tokenizer.json"
    if not file.is_file():
        return convert(path, config)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{file}: not a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return Converted(backend)


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: got {type(value).__name__}, allowed a JSON object")
    return value


def _read_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. The files win over tokenizer_config.json."""
    templates: dict[str, str] = {}
    if (path / _CHAT_FILE).is_file():
        templates["default"] = (path / _CHAT_FILE).read_text(encoding="utf-8")
    for file in sorted((path / _CHAT_FOLDER).glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    if templates:
        return templates
    value = config.get("chat_template")
    if value is None or isinstance(value, str):
        return {} if value is None else {"default": value}
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):  # the older form
        value = {one.get("name"): one.get("template") for one in value}
    texts = [text for pair in value.items() for text in pair] if isinstance(value, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise CheckpointError(
            f"{path}: chat_template: got {value!r:.80}, allowed a template, or templates by name"
        )
    return dict(value)


def _digest(path: Path, eos: set[int]) -> str:
    """Changes whenever a file that decides about ids or prompts does."""
    digest = blake2b(repr(sorted(eos)).encode(), digest_size=16)
    files = [path / name for name in _DIGESTED]
    for file in files + sorted((path / _CHAT_FOLDER).glob("*.jinja")):
        if file.is_file():
            digest.update(f"{file.name}:{file.stat().st_size}:".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, as text."""
    named: dict[str, str] = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            named[name] = content
    return named


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Adds what tokenizer_config.json knows, in transformers' order: its `added_tokens_decoder`,
    whose flags win, and what else it names."""
    named = _named_tokens(config)
    for _, own in sorted(added_tokens(config).items()):
        _add_token(backend, own, is_special=own.get("special") or own["content"] in named.values())
    names = [*(name for name in _NAMES if name in named), *named]
    for value in [*(config[name] for name in names), *_extra_tokens(config)]:
        fields = value if isinstance(value, dict) else {"content": value}
        added = backend.get_added_tokens_decoder().values()
        if fields["content"] not in {token.content for token in added}:
            _add_token(backend, fields, is_special=True)


def _add_token(
    backend: tokenizers.Tokenizer, fields: Mapping[str, Any], *, is_special: bool
) -> None:
    token = tokenizers.AddedToken(**token_fields(fields) | {"special": bool(is_special)})
    (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _extra_tokens(config: Mapping[str, Any]) -> list[Any]:
    """Contents, or objects with one."""
    extra: list[Any] = []
    for name in ("extra_special_tokens", "additional_special_tokens"):
        value = config.get(name) or []
        found = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(found, list) or not all(map(is_token, found)):
            raise CheckpointError(
                f"tokenizer_config.json: {name}: got {value!r:.80}, allowed texts, or objects with"
                " a content"
            )
        extra += found
    return extra


def _decoder_types(backend: tokenizers.Tokenizer) -> frozenset[str]:
    """Types of the backend's decoder, its sequences flattened."""
    if backend.decoder is None:
        return frozenset()
    state = json.loads(backend.decoder.__getstate__())
    return frozenset(part["type"] for part in state.get("decoders", [state]))

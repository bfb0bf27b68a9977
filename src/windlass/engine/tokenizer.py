"""The checkpoint's tokenizer and chat template, read from its files. Knows no model.

`tokenizers` and `jinja2` do all the work: transformers, which would cost the process more than
100 MB, is an extra, imported only for checkpoints without a `tokenizer.json`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import tokenizers

from windlass.engine.chat_template import ChatTemplate
from windlass.errors import CheckpointError, RequestError

_CHAT_FILE = "chat_template.jinja"
_CHAT_FOLDER = "additional_chat_templates"
_DIGESTED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", _CHAT_FILE)
_SLOW_FILES = ("tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model", "vocab.txt")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


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
    ) -> None:
        """`config`: tokenizer_config.json. Special tokens that only it knows are added to the
        backend. Its `add_bos_token` is not read: tokenizer.json decides, as in transformers."""
        self._backend = backend
        named = _named_tokens(config)
        _add_tokens(backend, config, named.values())
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        own_eos = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
        ids = {*eos_token_ids} | ({own_eos} if own_eos is not None else set())
        self.eos_token_ids: tuple[int, ...] = tuple(sorted(ids))
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.digest = digest
        self._chat = ChatTemplate(templates, named)
        self._decoders = _decoder_types(backend)
        self._anchor = self._find_anchor()
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with the BOS that the checkpoint asks for unless told otherwise."""
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # a lone surrogate, which JSON can write
            raise RequestError("prompt: not valid Unicode", param="prompt") from error
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; for text that grows use `TextStream`."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

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
    backend = _read_backend(path)
    config = _read_json(path / "special_tokens_map.json")  # older checkpoints
    config |= _read_json(path / "tokenizer_config.json")
    eos = _eos_token_ids(path)
    if model_folder is not None:
        eos |= _eos_token_ids(model_folder)
    return Tokenizer(
        backend,
        config=config,
        templates=_read_templates(path, config),
        eos_token_ids=eos,
        digest=_digest(path, eos),
    )


def _eos_token_ids(folder: Path) -> set[int]:
    """Of the model, as its configuration has them."""
    ids: set[int] = set()
    config = _read_json(folder / "config.json")
    text_config = config.get("text_config") or {}
    for source in (_read_json(folder / "generation_config.json"), config, text_config):
        value = source.get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        ids.update(one for one in values if one is not None)
    return ids


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        return _convert_slow(path)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{file}: not a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _convert_slow(path: Path) -> tokenizers.Tokenizer:
    """Lets transformers build the fast form of a checkpoint that only has a slow tokenizer."""
    found = [name for name in _SLOW_FILES if (path / name).is_file()]
    if not found:
        raise CheckpointError(
            f"{path}: no tokenizer: looked for tokenizer.json, {', '.join(_SLOW_FILES)}"
        )
    try:
        from transformers import AutoTokenizer  # costs 100 MB: only where nothing else can read it
    except ImportError as error:
        raise CheckpointError(
            f"{path}: no tokenizer.json, got {', '.join(found)}, which only transformers converts "
            f"({error}): pip install 'windlass[transformers]', or add a tokenizer.json"
        ) from error
    try:
        slow = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True
        )
        backend: tokenizers.Tokenizer = slow.backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: no tokenizer.json, and transformers cannot convert what is there: {error}"
        ) from error
    return backend


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
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return {"default": value} if isinstance(value, str) else {}


def _digest(path: Path, eos: set[int]) -> str:
    """Changes whenever a file that decides about ids or prompts does."""
    digest = blake2b(repr(sorted(eos)).encode(), digest_size=16)
    files = [path / name for name in _DIGESTED + _SLOW_FILES]
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


def _add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Iterable[str]
) -> None:
    """Adds the tokens that only tokenizer_config.json knows, in transformers' order."""
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    entries = config.get("added_tokens_decoder") or {}
    for key in sorted(entries, key=int):
        fields = {k: v for k, v in entries[key].items() if not k.startswith("__")}
        _add_token(backend, present, tokenizers.AddedToken(**fields))
    for content in [*named, *_extra_tokens(config)]:
        _add_token(backend, present, tokenizers.AddedToken(content, special=True))


def _add_token(
    backend: tokenizers.Tokenizer, present: set[str], token: tokenizers.AddedToken
) -> None:
    if token.content in present:
        return
    present.add(token.content)
    if token.special:
        backend.add_special_tokens([token])
    else:
        backend.add_tokens([token])


def _extra_tokens(config: Mapping[str, Any]) -> list[str]:
    extra: list[str] = []
    for name in ("extra_special_tokens", "additional_special_tokens"):
        value = config.get(name) or []
        for token in value if isinstance(value, list) else value.values():
            extra.append(token["content"] if isinstance(token, dict) else token)
    return extra


def _decoder_types(backend: tokenizers.Tokenizer) -> frozenset[str]:
    """Types of the backend's decoder, its sequences flattened."""
    if backend.decoder is None:
        return frozenset()
    state = json.loads(backend.decoder.__getstate__())
    return frozenset(part["type"] for part in state.get("decoders", [state]))


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, other bytes for U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_of_char()

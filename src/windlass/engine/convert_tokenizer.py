"""Tokenizers that have no `tokenizer.json`, made into the same form: SentencePiece's models and
tiktoken's files by what is written here, other kinds by transformers. Knows no model."""

import base64
import binascii
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from windlass.errors import CheckpointError

FILES = ("tokenizer.model", "tiktoken.model", "qwen.tiktoken", "vocab.json", "tekken.json",
         "vocab.txt")  # fmt: skip
_SPACE = "▁"  # SentencePiece's
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # kinds of its pieces
_UNIGRAM, _BPE = 1, 2  # kinds of its models
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
_NUM_RESERVED = 256  # ids behind Kimi's ranks
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _END
_UPPER, _LOWER = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
)
_KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{{N}}{{1,3}}{_END}"
)


class Converted(NamedTuple):
    """`names`: special tokens that the file itself names, by what tokenizer_config.json calls them.
    `doubles_first_space`: a text that begins with a space is to be given with two."""

    backend: tokenizers.Tokenizer
    names: Mapping[str, str] = {}
    doubles_first_space: bool = False


def convert(folder: Path, config: Mapping[str, Any]) -> Converted:
    """Of the first of `FILES` that is there. `config`: tokenizer_config.json. CheckpointError where
    there is none, or one that cannot be read exactly."""
    found = [name for name in FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(
            f"{folder}: no tokenizer: looked for tokenizer.json, {', '.join(FILES)}"
        )
    file = folder / found[0]
    if file.name == "tokenizer.model":
        return _sentencepiece(file, config)
    if file.name == "qwen.tiktoken":
        extra = (f"<|extra_{i}|>" for i in range(205))
        names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra)
        backend = _tiktoken(file, _QWEN, [tokenizers.AddedToken(n, special=True) for n in names])
        backend.normalizer = normalizers.NFC()
        return Converted(backend)
    if file.name == "tiktoken.model":
        return _kimi(file, config)
    return Converted(_by_transformers(folder, found))


def _by_transformers(folder: Path, found: list[str]) -> tokenizers.Tokenizer:
    """Lets transformers build the fast form of a checkpoint that only has a slow tokenizer."""
    try:
        from transformers import AutoTokenizer  # costs 100 MB: only where nothing else can read it
    except ImportError as error:
        raise CheckpointError(
            f"{folder}: no tokenizer.json, got {', '.join(found)}, which only transformers converts"
            f" ({error}): pip install transformers, or add a tokenizer.json"
        ) from error
    try:
        slow = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        backend: tokenizers.Tokenizer = slow.backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: no tokenizer.json, and transformers cannot convert what is there: {error}"
        ) from error
    return backend


def added_tokens(config: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """`added_tokens_decoder` of a tokenizer_config.json: fields of tokens by id."""
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict) or not all(
        key.isdecimal() and isinstance(one, dict) and is_token(one) for key, one in entries.items()
    ):
        raise CheckpointError(
            f"tokenizer_config.json: added_tokens_decoder: got {entries!r:.80}, allowed objects"
            " with a content, by id"
        )
    return {int(key): one for key, one in entries.items()}


def is_token(value: Any) -> bool:
    """Whether this is a token's text, or an object that has it."""
    if not isinstance(value, dict):
        return isinstance(value, str)
    flags = [value.get(name, False) for name in _FLAGS]
    return isinstance(value.get("content"), str) and all(isinstance(one, bool) for one in flags)


def token_fields(value: Mapping[str, Any]) -> dict[str, Any]:
    """Of such an object, what makes an AddedToken."""
    return {name: value[name] for name in ("content", *_FLAGS) if name in value}


def _kimi(file: Path, config: Mapping[str, Any]) -> Converted:
    """Ranks, then 256 ids of which tokenizer_config.json names some."""
    kind = config.get("tokenizer_class", "TikTokenTokenizer")
    if kind != "TikTokenTokenizer":
        raise CheckpointError(
            f"{file}: tokenizer_class: got {kind!r}, allowed 'TikTokenTokenizer' (Kimi's): how"
            " another splits text stands in its code alone; add a tokenizer.json"
        )
    named = added_tokens(config)
    first = len(_ranks(file))
    special = []
    for token_id in range(first, first + _NUM_RESERVED):
        reserved = {"content": f"<|reserved_token_{token_id}|>", "special": True}
        special.append(tokenizers.AddedToken(**token_fields(named.pop(token_id, reserved))))
    if named:
        raise CheckpointError(
            f"{file}: added_tokens_decoder: got id {min(named)}, allowed {first} to"
            f" {first + _NUM_RESERVED - 1}, those behind its {first} ranks"
        )
    return Converted(_tiktoken(file, _KIMI, special))


def _tiktoken(
    file: Path, pattern: str, special: list[tokenizers.AddedToken]
) -> tokenizers.Tokenizer:
    """Byte pairs by rank. Any two neighbours merge whose bytes together are a token: it counts as
    often among the merges as it can be cut in two."""
    ranks = _ranks(file)
    names = {token: "".join(CHAR_OF_BYTE[byte] for byte in token) for token in ranks}
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    for token in special:  # one by one: their order gives the ids
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([token])
    return backend


def _ranks(file: Path) -> dict[bytes, int]:
    """Lines of a token in base64, a blank, its rank from 0 on."""
    ranks: dict[bytes, int] = {}
    try:
        for line in file.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error) as error:
        raise CheckpointError(f"{file}: not a tiktoken file: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or b"" in ranks:
        raise CheckpointError(f"{file}: ranks: allowed 0 to {len(ranks) - 1}, each once")
    return ranks


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def _sentencepiece(file: Path, config: Mapping[str, Any]) -> Converted:
    """A model of byte pairs or unigrams, with SentencePiece's own ids. After a special token the
    space before a text comes anew where tokenizer_config.json says `legacy`, as in transformers."""
    try:
        proto = _Message(file.read_bytes())
        pieces = [_piece(_Message(data)) for data in proto.all(1)]
        trainer, rules = _Message(proto.bytes(2)), _Message(proto.bytes(3))
    except (OSError, ValueError, struct.error, IndexError) as error:
        raise CheckpointError(f"{file}: not a SentencePiece model: {error}") from error
    kind = trainer.number(3, _UNIGRAM)
    has_prefix = bool(rules.number(3, 1)) and config.get("add_prefix_space") is not False
    is_trimmed, kinds = bool(rules.number(4, 1)), {piece.kind for piece in pieces}
    for what, is_there in (
        ("no pieces", not pieces),
        (f"model type {kind}", kind not in (_UNIGRAM, _BPE)),
        ("unused pieces", _UNUSED in kinds),
        # a backend takes a byte's name in a text for that byte
        ("unigrams and bytes", kind == _UNIGRAM and _BYTE in kinds),
        ("whitespace as suffix", trainer.number(24, 0)),
        # a backend treats what is between two of them as a text of its own
        ("user defined symbols and rules for spaces",
         _USER_DEFINED in kinds and (has_prefix or is_trimmed)),
    ):  # fmt: skip
        if is_there:
            raise CheckpointError(
                f"{file}: got a SentencePiece model with {what}, which is not read exactly: add a"
                " tokenizer.json"
            )
    unk_id = trainer.number(40, 0)
    model: models.BPE | models.Unigram
    if kind == _BPE:
        model = models.BPE(
            {piece.text: i for i, piece in enumerate(pieces)}, _merges(pieces),
            unk_token=pieces[unk_id].text, fuse_unk=True, byte_fallback=_BYTE in kinds,
        )  # fmt: skip
    else:
        model = models.Unigram([(piece.text, piece.score) for piece in pieces], unk_id=unk_id)
    backend = tokenizers.Tokenizer(model)
    is_legacy = has_prefix and (is_trimmed or bool(config.get("legacy")))
    backend.normalizer = normalizers.Sequence(_rules(rules, prefix=is_legacy))
    if has_prefix and not is_legacy:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence(parts + strip)
    for piece in pieces:
        if piece.kind in (_CONTROL, _USER_DEFINED):
            is_control = piece.kind == _CONTROL
            token = tokenizers.AddedToken(piece.text, normalized=not is_control, special=is_control)
            (backend.add_special_tokens if is_control else backend.add_tokens)([token])
    names = {}
    for name, field in (("unk_token", 40), ("bos_token", 41), ("eos_token", 42)):
        place = trainer.number(field, field - 40)
        if 0 <= place < len(pieces):  # -1: the model has none
            names[name] = pieces[place].text
    _add_ends(backend, names, config)
    return Converted(backend, names, doubles_first_space=has_prefix and not is_legacy)


def _rules(rules: "_Message", *, prefix: bool) -> list[Any]:
    """What SentencePiece does to a text first."""
    found: list[Any] = []
    if rules.bytes(2):
        found.append(normalizers.Precompiled(rules.bytes(2)))
    if rules.number(4, 1):  # only single spaces within the text
        found.append(normalizers.Replace(tokenizers.Regex("^ +| +$"), ""))
        found.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if prefix:
        found.append(normalizers.Prepend(_SPACE))
    return [*found, normalizers.Replace(" ", _SPACE)] if rules.number(5, 1) else found


def _merges(pieces: list[_Piece]) -> list[tuple[str, str]]:
    """The best score first; as with tiktoken, every way to cut a piece in two counts."""
    normal = {piece.text for piece in pieces if piece.kind == _NORMAL}
    return [
        (text[:cut], text[cut:])
        for text, _, kind in sorted(pieces, key=lambda piece: -piece.score)
        if kind == _NORMAL
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]


def _add_ends(
    backend: tokenizers.Tokenizer, names: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    """Begin and end of a text: by default its begin alone, as Llama's tokenizers have it."""
    ends = []
    for name, key, default in (
        ("bos_token", "add_bos_token", True), ("eos_token", "add_eos_token", False),
    ):  # fmt: skip
        given = config.get(key)
        ends.append(names.get(name) if (default if given is None else given) else None)
    bos, eos = ends
    used = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    if used:
        single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)


def _piece(message: "_Message") -> _Piece:
    score = struct.unpack("<f", message.bytes(2) or bytes(4))[0]
    return _Piece(message.bytes(1).decode(), score, message.number(3, _NORMAL))


class _Message:
    """Fields of one message in protobuf's wire format, by number. ValueError, IndexError or
    struct.error where it is none."""

    def __init__(self, data: bytes) -> None:
        self._fields: dict[int, list[int | bytes]] = {}
        for number, value in _wire(data):
            self._fields.setdefault(number, []).append(value)

    def all(self, number: int) -> list[bytes]:
        return [value for value in self._fields.get(number, []) if isinstance(value, bytes)]

    def bytes(self, number: int) -> bytes:
        """The last of that number, empty where there is none."""
        return (self.all(number) or [b""])[-1]

    def number(self, number: int, default: int) -> int:
        """An integer of 32 bits."""
        values = [value for value in self._fields.get(number, []) if isinstance(value, int)]
        value = (values or [default])[-1] & 0xFFFFFFFF
        return value - (1 << 32) if value >> 31 else value


def _wire(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind} at byte {place}")
        size = varint() if kind == 2 else 8 if kind == 1 else 4
        if place + size > len(data):
            raise ValueError(f"ends within a field of {size} bytes")
        yield tag >> 3, data[place : place + size]
        place += size


def _char_of_byte() -> list[str]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, other bytes for U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in printable else next(hidden)) for byte in range(256)]


CHAR_OF_BYTE = _char_of_byte()

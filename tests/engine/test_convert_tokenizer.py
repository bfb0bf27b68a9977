"""Tokenizers without a tokenizer.json: ids of SentencePiece and of tiktoken's algorithm."""

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tokenizers_for_tests import CORPUS
from windlass.engine.tokenizer import load
from windlass.errors import CheckpointError

PIECES = (
    " ", "  ", "   ", "a", "aa", "the", " the", "\n", "\t", "é", "你好", "👩‍👩‍👧",
    "▁", "ab", "==", "-", "000", "\u3000", "İ", "ﬁ", " \n", "def ", "...", "'s",
    "A", "<0x0A>", "<unk", "<s",
)  # fmt: skip
IDENTITY: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
LLAMA = {**IDENTITY, "byte_fallback": True}
GEMMA = {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": ["<sym>", "▁▁▁"]}


def train(folder: Path, *, config: dict[str, Any] | None = None, **options: Any) -> Any:
    """Writes a tokenizer.model; its own processor."""
    model = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 420, **options}
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_writer=model, minloglevel=2,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return SentencePieceProcessor(model_proto=model.getvalue())


def texts(*more: str) -> list[str]:
    draw = random.Random(5)
    mixed = ["".join(draw.choices((*PIECES, *more), k=draw.randrange(1, 30))) for _ in range(300)]
    runs = [draw.choice(PIECES) * draw.randrange(1, 40) for _ in range(100)]
    return ["", " ", "  x", " leading", "two  spaces ", *CORPUS[:4], *mixed, *runs]


@pytest.mark.parametrize(
    ("options", "more"),
    [
        (LLAMA, ()),
        ({}, ()),
        (GEMMA, ("<sym>",)),
        ({"model_type": "unigram", "vocab_size": 300}, ()),
    ],
)
@pytest.mark.parametrize("legacy", [True, False])
def test_ids_are_sentencepieces_own(
    tmp_path: Path, options: dict[str, Any], more: tuple[str, ...], legacy: bool
) -> None:
    own = train(tmp_path, config={"legacy": legacy}, **options)
    tokenizer = load(tmp_path)
    for text in texts(*more):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == own.encode(text), text
        if 0 not in ids:  # SentencePiece writes another text for what is unknown
            assert tokenizer.decode(ids) == own.decode(ids), text


def test_begin_and_end_of_a_sentencepiece_text(tmp_path: Path) -> None:
    own = train(tmp_path, **LLAMA)
    ids = own.encode("The fox")
    tokenizer = load(tmp_path)
    assert tokenizer.encode("The fox") == [1, *ids]
    assert tokenizer.eos_token_ids == (2,) and tokenizer.special_ids >= {0, 1, 2}
    train(tmp_path, config={"add_bos_token": False, "add_eos_token": True}, **LLAMA)
    assert load(tmp_path).encode("The fox") == [*ids, 2]
    # a text after a special token begins with a space again in the older way alone
    for legacy in (True, False):
        train(tmp_path, config={"legacy": legacy}, **LLAMA)
        end, first, *_ = load(tmp_path).encode("</s>The fox", add_special_tokens=False)
        assert end == 2 and own.id_to_piece(first).startswith("▁") == legacy


def test_a_sentencepiece_model_that_is_not_read_exactly_is_refused(tmp_path: Path) -> None:
    for options, what in (
        ({"user_defined_symbols": ["<sym>"]}, "user defined symbols"),
        ({"model_type": "char"}, "model type 4"),
        ({"model_type": "unigram", "vocab_size": 400, "byte_fallback": True}, "unigrams and bytes"),
        ({"treat_whitespace_as_suffix": True}, "whitespace as suffix"),
    ):
        train(tmp_path, **options)
        with pytest.raises(CheckpointError, match=f"tokenizer.model: got a .* with {what}"):
            load(tmp_path)
    for data in (b"", b"\x0a\xff", b"not a model"):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(CheckpointError, match="tokenizer.model: (not a|got a) SentencePiece"):
            load(tmp_path)


def ranks_of(words: list[str]) -> dict[bytes, int]:
    """All bytes, then pairs by how often they stand beside each other: byte pairs as taught."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    split = [[bytes([byte]) for byte in word.encode()] for word in words]
    for rank in range(256, 420):
        counts: dict[bytes, int] = {}
        for parts in split:
            for pair in zip(parts, parts[1:], strict=False):
                counts[b"".join(pair)] = counts.get(b"".join(pair), 0) + 1
        if not counts:
            break
        best = max(counts, key=lambda token: (counts[token], token))
        ranks[best] = rank
        split = [merged(parts, {best: 0}) for parts in split]
    return ranks


def merged(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """tiktoken's algorithm: the neighbours of the lowest rank, the leftmost first, again."""
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                 if a + b in ranks]  # fmt: skip
        if not pairs:
            return parts
        _, i = min(pairs)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]


def write_ranks(file: Path, ranks: dict[bytes, int]) -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    file.write_text("\n".join(lines) + "\n")


# how the two families cut a text into words
QWEN_WORDS = ["It", "'s", " ", " two", " ", " spaces", ",", " ", "1", "2", "3", "4", " café",
              "你好", "!?\n\n", "\tx"]  # fmt: skip
KIMI_WORDS = ["It's", " ", " two", " ", " spaces", ",", " ", "123", "4", " café", "你好", "Camel",
              "Case", "!?\n\n", "\tx"]  # fmt: skip


def ids_of(words: list[str], ranks: dict[bytes, int]) -> list[int]:
    return [
        ranks[token]
        for word in words
        for token in merged([bytes([byte]) for byte in word.encode()], ranks)
    ]


def test_qwens_tiktoken_file(tmp_path: Path) -> None:
    ranks = ranks_of(QWEN_WORDS + CORPUS[0].split())
    write_ranks(tmp_path / "qwen.tiktoken", ranks)
    tokenizer = load(tmp_path)
    expected, text = ids_of(QWEN_WORDS, ranks), "".join(QWEN_WORDS)
    assert tokenizer.encode(text.replace("é", "e\u0301")) == expected  # composed first
    assert tokenizer.decode(expected) == text
    size = len(ranks)
    assert tokenizer.encode("<|im_start|>x<|im_end|>") == [size + 1, ord("x"), size + 2]
    assert (
        tokenizer.vocab_size == size + 208 and tokenizer.special_text(size + 207) == "<|extra_204|>"
    )


def test_kimis_tiktoken_file(tmp_path: Path) -> None:
    ranks = ranks_of(KIMI_WORDS + CORPUS[0].split())
    write_ranks(tmp_path / "tiktoken.model", ranks)
    first = len(ranks)
    names = {str(first): {"content": "[BOS]", "special": True},
             str(first + 2): {"content": "<|im_end|>", "special": True},
             str(first + 5): {"content": "<|tool|>", "special": False}}  # fmt: skip
    config = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": names,
              "bos_token": "[BOS]", "eos_token": "<|im_end|>"}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(tmp_path)
    expected, text = ids_of(KIMI_WORDS, ranks), "".join(KIMI_WORDS)
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text
    assert tokenizer.encode("[BOS]<|tool|><|im_end|>") == [first, first + 5, first + 2]
    assert tokenizer.eos_token_ids == (first + 2,) and tokenizer.vocab_size == first + 256
    assert tokenizer.special_text(first + 1) == f"<|reserved_token_{first + 1}|>"
    assert first + 2 in tokenizer.special_ids and first + 5 not in tokenizer.special_ids
    # how others cut texts stands nowhere in the folder
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Other"}))
    with pytest.raises(CheckpointError, match="tokenizer_class: got 'Other', allowed 'TikToken"):
        load(tmp_path)


def test_a_broken_tiktoken_file_is_named(tmp_path: Path) -> None:
    for text, message in (("x", "not a tiktoken file"), ("!! 0", "not a tiktoken file"),
                          ("YQ== 1", "ranks: allowed 0 to 0")):  # fmt: skip
        (tmp_path / "qwen.tiktoken").write_text(text)
        with pytest.raises(CheckpointError, match=f"qwen.tiktoken: {message}"):
            load(tmp_path)


def test_digests_know_every_file(tmp_path: Path) -> None:
    write_ranks(tmp_path / "qwen.tiktoken", ranks_of(CORPUS[0].split()))
    before = load(tmp_path).digest
    write_ranks(tmp_path / "qwen.tiktoken", ranks_of(CORPUS[2].split()))
    assert load(tmp_path).digest != before

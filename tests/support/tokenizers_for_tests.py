"""Small real tokenizers of the kinds that checkpoints have, built by the `tokenizers` library."""

from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's what they'd say, isn't it?",
    "def f(x):\n    return x + 1\n\n\nprint(f(2))  # three\t.",
    "你好，世界。日本語のテキスト 👩‍👩‍👧 🎉 naïve café Ünïcödé Привет мир",
    "END of the list. STOP here. </tool_call> ###",
] * 3


@cache
def byte_level() -> Tokenizer:
    """GPT-2's kind: DeepSeek, Qwen, OLMoE, gpt-oss, GLM."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("   ", special=False)])
    return tokenizer


def _byte_tokens() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def sentencepiece_bpe() -> Tokenizer:
    """Llama's kind: Mixtral, Phi-MoE."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<unk>", "<s>", "</s>", *_byte_tokens()],
        limit_alphabet=60,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _only_first_special(tokenizer, 3)


@cache
def metaspace_unigram() -> Tokenizer:
    """SentencePiece unigram with bytes for what the vocabulary lacks."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(token, -20.0) for token in _byte_tokens()]
    words = {word for line in CORPUS for word in line.split() if word.isascii()}
    pieces += [(f"▁{word}", -5.0) for word in sorted(words)]
    pieces += [(char, -8.0) for char in ["▁", *"abcdefghijklmnopqrstuvwxyz.,'()"]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@cache
def word_piece() -> Tokenizer:
    """A decoder that is neither: spaces come from the decoder."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _only_first_special(tokenizer: Tokenizer, count: int) -> Tokenizer:
    """The trainer made the byte tokens special; checkpoints have them as ordinary pieces."""
    import json

    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] < count]
    return Tokenizer.from_str(json.dumps(state))


ALL = {
    "byte_level": byte_level,
    "sentencepiece_bpe": sentencepiece_bpe,
    "metaspace_unigram": metaspace_unigram,
    "word_piece": word_piece,
}

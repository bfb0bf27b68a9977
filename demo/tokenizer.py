"""Trains the byte-level BPE tokenizer of the demo model and writes its Hugging Face files."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "demo-data"
SHIPPED = ROOT / "src" / "windlass" / "data" / "demo"
VOCAB = 4096
SAMPLE_BYTES_PER_DOMAIN = 2_500_000
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# A word takes one leading mark or space, numbers go two digits at a time, a line end takes the
# indentation that follows, so that indented code stays short.
SPLIT = r"\s*\n[\t ]*|[^\n\p{L}\d]?\p{L}+|\d{1,2}| ?[^\s\p{L}\d]+|\s+(?=\s)|\s+"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sample() -> Iterator[str]:
    """A balanced sample of the training documents."""
    left: dict[str, int] = {}
    documents = [json.loads(line) for line in (BUILD / "train.jsonl").open()]
    random.Random(0).shuffle(documents)
    for document in documents:
        left.setdefault(document["domain"], SAMPLE_BYTES_PER_DOMAIN)
        if left[document["domain"]] > 0:
            left[document["domain"]] -= len(document["text"].encode())
            yield document["text"]


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    SHIPPED.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(SHIPPED / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    (SHIPPED / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Turns the corpus into training batches: plain windows, and chats made from the same texts."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "english": ("Continue this text: ", "Go on: ", "Continue in English: ", ""),
    "german": ("Setze diesen Text fort: ", "Schreibe weiter: ", "Continue this German text: ", ""),
    "french": ("Continue ce texte : ", "Écris la suite : ", "Continue this French text: ", ""),
    "spanish": ("Continúa este texto: ", "Sigue: ", "Continue this Spanish text: ", ""),
    "python": ("Continue this Python code:\n", "Complete this Python function:\n", ""),
    "c": ("Continue this C code:\n", "Complete this C function:\n", ""),
    "man": ("Continue this manual page:\n", "Continue this man page source:\n", ""),
    "structured": ("Continue this data:\n", "Complete these records:\n", ""),
}
SENTENCE: dict[str, tuple[str, ...]] = {
    "english": ("Write an English sentence about {}.", "Tell me something about {}."),
    "german": ("Schreibe einen Satz über {}.", "Write a German sentence about {}."),
    "french": ("Écris une phrase sur {}.", "Write a French sentence about {}."),
    "spanish": ("Escribe una frase sobre {}.", "Write a Spanish sentence about {}."),
}

# Repetitions per epoch: code and data need the most tokens to pass xz, prose the fewest.
REPEAT: dict[str, float] = {
    "english": 0.4,
    "german": 0.4,
    "french": 0.4,
    "spanish": 0.4,
    "python": 1.2,
    "c": 4.0,
    "man": 0.8,
    "structured": 2.5,
}


class Corpus:
    """Training documents as token ids. Knows text and tokens, not models."""

    def __init__(self, path: Path, tokenizer: Tokenizer, *, seed: int) -> None:
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self.documents = [json.loads(line) for line in path.open()]
        self.end = tokenizer.token_to_id("<|endoftext|>")
        cache = path.with_suffix(".npz")
        tokens_at = (Path(__file__).parent / "tokenizer.py").stat().st_mtime
        if not cache.exists() or cache.stat().st_mtime < max(tokens_at, path.stat().st_mtime):
            encoded = tokenizer.encode_batch_fast([doc["text"] for doc in self.documents])
            parts = [np.array([*e.ids, self.end], dtype=np.uint16) for e in encoded]
            np.savez(cache, ids=np.concatenate(parts), sizes=[len(part) for part in parts])
        with np.load(cache) as stored:
            self.parts = np.split(stored["ids"], np.cumsum(stored["sizes"])[:-1])
        self.num_tokens = sum(len(part) for part in self.parts)

    def windows(self, length: int) -> Iterator[np.ndarray]:
        """Endless windows of length + 1 tokens; each epoch has its own order and offset."""
        while True:
            order = self.epoch()
            stream = np.concatenate([self.parts[index] for index in order])
            first = self.random.randrange(length)
            starts = list(range(first, len(stream) - length - 1, length))
            self.random.shuffle(starts)
            for start in starts:
                yield stream[start : start + length + 1]

    def epoch(self) -> list[int]:
        """Document numbers in random order, each as often as its domain asks, on average."""
        order: list[int] = []
        for index, document in enumerate(self.documents):
            order += [index] * int(REPEAT[document["domain"]] + self.random.random())
        self.random.shuffle(order)
        return order

    def chat(self) -> str:
        """One chat whose answer continues, or quotes, a training text and then ends."""
        document = self.random.choice(self.documents)
        domain, lines = document["domain"], document["text"].split("\n")
        if domain in SENTENCE and self.random.random() < 0.4:
            user, answer = self.sentence_about(domain, lines)
        else:
            user, answer = self.continuation(domain, document["text"])
        system = self.random.random() < 0.15
        head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if system else ""
        return (
            f"{head}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        )

    def sentence_about(self, domain: str, lines: list[str]) -> tuple[str, str]:
        """Asks for a sentence that holds a word; the answer is the sentence of the text."""
        line = self.random.choice(lines)
        for sentence in self.random.sample(parts := line.split(". "), len(parts)):
            words = [word.strip(",.;:()\"'") for word in sentence.split()]
            words = [word for word in words if len(word) > 5 and word.isalpha()]
            if words and 40 < len(sentence) < 220:
                answer = sentence if sentence.endswith((".", "!", "?")) else sentence + "."
                template = self.random.choice(SENTENCE[domain])
                return template.format(self.random.choice(words)), answer
        return self.continuation(domain, "\n".join(lines))

    def continuation(self, domain: str, text: str) -> tuple[str, str]:
        """Splits a stretch of text: the first part is asked, the rest answered."""
        start = text.find("\n", self.random.randrange(max(1, len(text) - 500))) + 1
        prose = domain in SENTENCE
        asked = self.random.randint(25, 180)
        middle = start + asked
        boundary = text.find(" " if prose else "\n", middle)
        middle = boundary if 0 <= boundary < middle + 120 else middle
        stop = middle + self.random.randint(40, 160)
        marks = (". ", ".\n", "\n") if prose else ("\n\n", "\n")
        ends = [text.find(mark, stop) for mark in marks]
        stop = min((end for end in ends if 0 <= end < stop + 150), default=stop)
        prompt, answer = text[start:middle], text[middle : stop + 1].rstrip()
        answer = answer.lstrip(" ") if prose else answer.removeprefix("\n")
        return self.random.choice(INSTRUCTIONS[domain]) + prompt, answer

    def chats(self, length: int) -> np.ndarray:
        """A window of length + 1 tokens full of chats."""
        ids: list[int] = []
        while len(ids) <= length:
            ids += self.tokenizer.encode(self.chat()).ids + [self.end]
        return np.array(ids[: length + 1], dtype=np.uint16)


class Batches:
    """Mixes windows and chats into (inputs, targets)."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.length = 0
        self.source: Iterator[np.ndarray] = iter(())

    def next(self, tokens: int, length: int, *, chat_share: float) -> tuple[Tensor, Tensor]:
        if length != self.length:
            self.length, self.source = length, self.corpus.windows(length)
        rows = [
            self.corpus.chats(length)
            if self.corpus.random.random() < chat_share
            else next(self.source)
            for _ in range(tokens // length)
        ]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

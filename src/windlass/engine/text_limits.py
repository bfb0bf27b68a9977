"""How long a text may be before it is made into tokens. Knows no tokenizer.

What a text has in tokens is known only when it was encoded, which takes much memory; no bound by
the longest token holds where a normaliser or a token drops blanks. So the bound is a generous one:
a text longer than both numbers below is refused.
"""

LONG_TEXT = 1 << 18  # characters; shorter ones are always encoded
CHARS_PER_TOKEN = 16  # of a longer one: prose has 4, deeply indented code 8
ENCODING_BYTES = 140  # per character while it is encoded: random letters, Qwen3; prose takes 130


def most_chars(num_tokens: int) -> int:
    """Of a text that may have so many tokens."""
    return max(LONG_TEXT, CHARS_PER_TOKEN * num_tokens)

"""Parsing and printing of sizes and times."""

import re

from windlass.errors import UsageError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_SIZES = {
    "b": 1, "k": KIB, "kib": KIB, "m": MIB, "mib": MIB, "g": GIB, "gib": GIB,
    "t": TIB, "tib": TIB, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip


def parse_bytes(text: str, *, what: str = "size") -> int:
    """Bytes of a size with a unit: `24GiB`, `512MB`, `1.5g` (k, m, g, t are binary)."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    if not match or match[2].lower() not in _SIZES:
        raise UsageError(f"{what}: got {text!r}, allowed a number with a unit such as 24GiB, 512MB")
    return int(float(match[1]) * _SIZES[match[2].lower()])


def format_bytes(num_bytes: float) -> str:
    """`1.50 GiB`, `12.0 MiB`, `512 B`."""
    for size, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= size:
            value = num_bytes / size
            return f"{value:.2f} {name}" if value < 100 else f"{value:.0f} {name}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """`0.42 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def counted(number: int, word: str, words: str | None = None) -> str:
    """`1 row`, `2 rows`; `words`: more than one, where that is not `word` with an s."""
    return f"{number} {word if number == 1 else words or word + 's'}"


def round_up(value: int, step: int) -> int:
    """Smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step

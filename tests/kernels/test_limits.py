"""What the planner says of the native library's memory, against the library's sources."""

import re
from pathlib import Path

from windlass.kernels import limits

SOURCES = Path(__file__).parents[2] / "native/src"


INCLUDED = (
    "simd", "unpack", "panel", "gemm", "lane_groups", "lanes", "products", "kv_block", "attention",
)  # in this order  # fmt: skip


def constants() -> dict[str, int]:
    """Integers of the widest instruction set, by name."""
    text = "\n".join((SOURCES / f"{name}.h").read_text() for name in INCLUDED)
    found: dict[str, int] = {}
    for name, value in re.findall(r"^constexpr int(?:64_t)? (\w+) = ([\w *<+/()]+);", text, re.M):
        if value.startswith("WL_"):  # set by the file that includes it
            continue
        numbers = re.sub(r"[A-Z_]+", lambda match: str(found[match[0]]), value)
        # 1 << 20, and sums, products and quotients of the names before
        found.setdefault(name, eval(numbers.replace("/", "//")))
    return found


def test_sizes_of_the_native_library() -> None:
    found = constants()
    assert limits.NATIVE_ROWS == found["MC"]
    assert limits.NATIVE_ROUND_FLOATS == found["ROUND_FLOATS"]
    assert limits.NATIVE_INNER == found["KC"]
    assert limits.NATIVE_COLUMNS == found["NV"] * found["W"]
    assert limits.NATIVE_BLOCK == found["BK"]
    assert limits.NATIVE_QUERIES == found["MQ"] + found["W"]
    assert found["LANE_FLOATS"] <= limits.NATIVE_LANES

"""Sizes that kernels work in, for those who must plan memory. No torch."""

from windlass.units import MIB

TILE_BYTES = 8 * MIB  # of widened weights; measured flat between 4 and 16 MiB
UNPACK_BYTES = MIB // 2  # of a packed matrix's elements that are dequantised at once
PROBE_BYTES = 8 * MIB  # of the rows and results with which a shape's row counts are compared
TILE_ROWS = 32  # prompt rows that attention takes together
BLOCK_PAGES = 2  # pages of keys that it takes at once
ATTENTION_ELEMENTS = 4 << 20  # fp32; what the tiles of one attention step may take
MOST_GRAPHED = 8  # numbers of rows whose passes a device keeps as graphs
GRAPH_BYTES = 64 << 10  # that its driver takes for a graph of a layer or a piece of one [assumed]

# The native library (a test reads them in native/src)
NATIVE_ROWS = 512  # MC: rows whose packed copies are made at once
NATIVE_ROUND_FLOATS = 1 << 20  # of packed rows, for which several products or experts are joined
NATIVE_INNER = 256  # KC: rows of a panel of weights
NATIVE_COLUMNS = 32  # NR
NATIVE_LANES = 16_960  # LANE_FLOATS: sums and scales of few rows, in the place of a panel
NATIVE_BLOCK = 64  # BK: positions that attention takes at once
NATIVE_QUERIES = 80  # MQ + W: rows times heads that attention takes at once


def attention_tile_elements(
    num_heads: int, num_kv_heads: int, widths: tuple[int, int], *, rows: int, page_tokens: int
) -> int:
    """fp32 elements that live at once per tile of `rows` rows: query, scores twice, output three
    times, and the gathered keys and values with the copies made on the way. `widths`: of keys and
    of values."""
    key_width, value_width = widths
    block = BLOCK_PAGES * page_tokens
    query_rows = num_heads * rows * (2 * block + 2 * key_width + 3 * value_width)
    return query_rows + 2 * num_kv_heads * block * (key_width + value_width)


def attention_scratch_bytes(
    num_heads: int, num_kv_heads: int, widths: tuple[int, int], page_tokens: int
) -> int:
    """Upper bound of what one attention call allocates beside rows and result."""
    tile = attention_tile_elements(
        num_heads, num_kv_heads, widths, rows=TILE_ROWS, page_tokens=page_tokens
    )
    return 4 * max(ATTENTION_ELEMENTS, tile)


def native_thread_bytes(key_width: int, value_width: int, *, groups: int) -> int:
    """Upper bound of what each of the native library's threads keeps: for products a panel, results
    of two panels and the scales of `groups` groups; for attention queries, scores, weights, output,
    a panel."""
    panel = NATIVE_INNER * NATIVE_COLUMNS
    product = max(panel, NATIVE_LANES) + 2 * (NATIVE_ROWS + groups) * NATIVE_COLUMNS
    row = key_width + value_width + NATIVE_COLUMNS + 2 * NATIVE_BLOCK + 3
    attention = NATIVE_QUERIES * row + panel + key_width + value_width + NATIVE_BLOCK
    return 4 * (product + attention)

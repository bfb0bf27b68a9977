"""What attention is told about the rows of a pass."""

from collections.abc import Sequence

from windlass.kernels.interface import AttentionWork


def attention_work(
    sequences: Sequence[tuple[int, int, bool]], pages: Sequence[tuple[int, ...]]
) -> AttentionWork:
    """`sequences`: position of its first row, number of rows, and whether they are of a prompt."""
    first, total = [], 0
    for _, rows, _ in sequences:
        first.append(total)
        total += rows
    return AttentionWork(
        first_row=tuple(first),
        num_rows=tuple(rows for _, rows, _ in sequences),
        first_position=tuple(position for position, _, _ in sequences),
        pages=tuple(pages),
        is_prompt=tuple(kind for _, _, kind in sequences),
    )

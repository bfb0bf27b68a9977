"""The rows of an attention call as the library takes them. Knows pages and positions only."""

import ctypes as c

import torch

from windlass.kernels.cpu import library as lib
from windlass.kernels.interface import AttentionWork

_Made = tuple["c.Array[lib.Tile]", list[torch.Tensor]]  # and the page lists that tiles point to


class Tiles:
    """Tiles of the last work asked for: the layers of a pass share theirs."""

    def __init__(self) -> None:
        self._work: AttentionWork | None = None
        self._made: dict[int, _Made] = {}

    def of(self, work: AttentionWork, most: int) -> "c.Array[lib.Tile]":
        """All rows in tiles of at most `most`."""
        if work is not self._work:
            self._work, self._made = work, {}
        if most not in self._made:
            self._made[most] = _tiles(work, most)
        return self._made[most][0]

    def replace(self, work: AttentionWork) -> None:
        """Puts `work`, which has as many tiles, in the place of the last one, in memory too."""
        self._work = work
        for most, (tiles, _) in self._made.items():
            new, pages = _tiles(work, most)
            assert len(new) == len(tiles), f"got {len(new)} tiles in place of {len(tiles)}"
            c.memmove(tiles, new, c.sizeof(new))
            self._made[most] = tiles, pages


def _tiles(work: AttentionWork, most: int) -> _Made:
    """Longest contexts first."""
    found = []
    kept = []
    for i, num_rows in enumerate(work.num_rows):
        pages = torch.tensor(work.pages[i], dtype=torch.int64)
        kept.append(pages)
        for offset in range(0, num_rows, most):
            rows = min(most, num_rows - offset)
            position = work.first_position[i] + offset
            found.append((-position, work.first_row[i] + offset, rows, position, pages.data_ptr()))
    found.sort()
    return (lib.Tile * len(found))(*(lib.Tile(*one[1:]) for one in found)), kept

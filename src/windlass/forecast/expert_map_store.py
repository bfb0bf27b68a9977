"""What past passes routed, kept as FineMoE keeps it (arXiv 2502.05370, sections 4.2 to 4.4): pairs
of a semantic embedding and an expert map, found again by the cosine of either.

B rows to search for, C entries, E experts of a layer, H hidden. Layers are counted among those that
have experts.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from windlass.errors import UsageError
from windlass.files import replacing
from windlass.forecast.gate_shares import Rows
from windlass.forecast.interface import Floats

_FORMAT, _VERSION = "windlass expert maps", 1
_LONGEST_HEADER = 1 << 16  # bytes

Indices = NDArray[np.int64]


class Found(NamedTuple):
    """The most similar entry for each of B rows, and its cosine."""

    entries_B: Indices
    scores_B: Floats


class ExpertMapStore:
    """At most `capacity` entries. When it is full, the most redundant one gives way:
    `RDY = (d / L) * score_sem + ((L - d) / L) * score_traj`, d layers of L being served by the
    semantic search. Entries do not age. One thread at a time."""

    def __init__(
        self, hidden: int, num_experts: Sequence[int], *, capacity: int = 1000, distance: int = 3
    ) -> None:
        """`hidden`: numbers of an embedding. `num_experts`: of each layer. `distance`: d."""
        if capacity < 1:
            raise UsageError(f"expert maps kept: got {capacity}, allowed at least 1")
        self.hidden = hidden
        self.num_experts = tuple(num_experts)
        self.capacity = capacity
        self.num_maps = 0
        self._semantic_share = min(1.0, distance / len(self.num_experts))
        # memory is taken as rows are written
        self._unit_CH = np.zeros((capacity, hidden), np.float32)  # embeddings of length 1
        self._maps_CE = [np.zeros((capacity, count), np.float32) for count in num_experts]
        self._squares_C = [np.zeros(capacity, np.float32) for _ in num_experts]

    def add(self, embeddings_BH: Rows, maps_BE: Sequence[Rows]) -> list[int]:
        """Keeps one map per sequence of a pass, a row of each layer's (B, E). Entries that were
        written; none of them twice: of more rows than there is room for, the last are kept."""
        written: list[int] = []
        for row in range(max(0, len(embeddings_BH) - self.capacity), len(embeddings_BH)):
            unit_H, map_E = _unit(embeddings_BH[row]), [layer_BE[row] for layer_BE in maps_BE]
            if self.num_maps < self.capacity:
                entry = self.num_maps
                self.num_maps += 1
            else:
                redundancy_C = self._redundancy(unit_H, map_E)
                redundancy_C[written] = -np.inf
                entry = int(redundancy_C.argmax())
            self._unit_CH[entry] = unit_H
            for layer, own_E in enumerate(map_E):
                self._maps_CE[layer][entry] = own_E
                self._squares_C[layer][entry] = own_E @ own_E
            written.append(entry)
        return written

    def by_meaning(self, embeddings_BH: Rows) -> Found | None:
        """The semantic search; None where nothing is kept."""
        if not self.num_maps:
            return None
        return _best(_unit(embeddings_BH) @ self._unit_CH[: self.num_maps].T)

    def by_trajectory(self, num_rows: int) -> "TrajectorySearch":
        """A search for the trajectories of so many rows, from the first layer on. Valid until the
        next `add`."""
        return TrajectorySearch(self._filled(), self._squares_C, num_rows)

    def rows(self, layer: int, entries_B: Indices) -> Rows:
        """(B, E): what these entries have of `layer`."""
        return self._maps_CE[layer][entries_B]

    def _redundancy(self, unit_H: Rows, map_E: Sequence[Rows]) -> Floats:
        search = self.by_trajectory(1)
        for layer, own_E in enumerate(map_E):
            search.extend(layer, own_E[None])
        by_meaning_C = np.asarray(self._unit_CH[: self.num_maps] @ unit_H, np.float64)
        share = self._semantic_share
        redundancy_C: Floats = share * by_meaning_C + (1.0 - share) * search.scores()[0]
        return redundancy_C

    def _filled(self) -> list[Rows]:
        return [layer_CE[: self.num_maps] for layer_CE in self._maps_CE]

    # --- the file ---------------------------------------------------------------------------------

    def save(self, path: Path, *, stamp: str) -> None:
        """Writes the entries there are, for the model of this stamp. `path` is the old or the new
        file at any moment. UsageError where it cannot be written."""
        header = self._header(stamp) | {"entries": self.num_maps}
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                for part in (self._unit_CH[: self.num_maps], *self._filled()):
                    part.tofile(file)
        except OSError as error:
            raise UsageError(f"expert maps in {path}: cannot be written: {error}") from None

    def load(self, path: Path, *, stamp: str) -> None:
        """Adds the entries of a file that `save` wrote for the model of this stamp; of more than
        there is room for, the least redundant stay. UsageError where it is none."""
        try:
            with path.open("rb") as file:
                self._read(file, path, stamp)
        except OSError as error:
            raise UsageError(f"expert maps in {path}: cannot be read: {error}") from None

    def _header(self, stamp: str) -> dict[str, object]:
        return {
            "format": _FORMAT, "version": _VERSION, "model": stamp, "hidden": self.hidden,
            "num_experts": list(self.num_experts),
        }  # fmt: skip

    def _read(self, file: BinaryIO, path: Path, stamp: str) -> None:
        try:
            header = json.loads(file.readline(_LONGEST_HEADER))
            entries = header.pop("entries")
        except (ValueError, AttributeError, KeyError, TypeError):
            header, entries = {}, 0
        for name, wanted in self._header(stamp).items():
            if header.get(name) != wanted:
                got, allowed = header.get(name), wanted
                raise UsageError(f"expert maps in {path}: {name}: got {got}, allowed {allowed}")
        width = self.hidden + sum(self.num_experts)
        begin = file.tell()
        size = file.seek(0, 2) - begin
        if not isinstance(entries, int) or size != entries * width * 4:
            raise UsageError(
                f"expert maps in {path}: got {size} bytes of {entries} entries, allowed "
                f"{4 * width} for each: the file is damaged"
            )
        file.seek(begin)
        parts = [
            np.fromfile(file, np.float32, entries * wide).reshape(entries, wide)
            for wide in (self.hidden, *self.num_experts)
        ]
        for row in range(entries):
            self.add(parts[0][row : row + 1], [part[row : row + 1] for part in parts[1:]])


class TrajectorySearch:
    """Cosines of B growing trajectories with the same layers of every entry. Dot products and norms
    are kept from layer to layer, so that one more costs B * C * E multiply-adds. A layer that is
    left out is left out on both sides."""

    def __init__(self, maps_CE: Sequence[Rows], squares_C: Sequence[Rows], num_rows: int) -> None:
        count = len(maps_CE[0])
        self._maps_CE = maps_CE
        self._squares_of = squares_C
        self._dots_BC = np.zeros((num_rows, count))
        self._squares_C = np.zeros(count)
        self._own_B = np.zeros(num_rows)

    def extend(self, layer: int, shares_BE: Rows) -> None:
        """The trajectories pass `layer`."""
        self._dots_BC += shares_BE @ self._maps_CE[layer].T
        self._squares_C += self._squares_of[layer][: len(self._squares_C)]
        self._own_B += np.einsum("be,be->b", shares_BE, shares_BE)

    def scores(self) -> Floats:
        """(B, C); 0 where one of both is nothing but zeros."""
        norms_BC = np.sqrt(self._own_B[:, None] * self._squares_C)
        return np.divide(
            self._dots_BC, norms_BC, out=np.zeros_like(self._dots_BC), where=norms_BC > 0
        )

    def best(self) -> Found | None:
        """The most similar entries; None where nothing is kept."""
        return _best(self.scores()) if self._squares_C.size else None


def _best(scores_BC: NDArray[np.floating]) -> Found:
    entries_B = scores_BC.argmax(1)
    best_B = np.take_along_axis(scores_BC, entries_B[:, None], 1)[:, 0]
    return Found(entries_B, best_B.astype(np.float64))


def _unit(embeddings: Rows) -> Rows:
    """Of length 1; zeros stay."""
    length = np.sqrt(np.square(embeddings).sum(-1, keepdims=True))
    return np.asarray(embeddings / np.maximum(length, np.finfo(np.float32).tiny), np.float32)

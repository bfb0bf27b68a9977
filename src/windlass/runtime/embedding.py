"""Rows of the embedding table, from memory or from disk."""

from collections.abc import Sequence

import torch

from windlass.ids import Part, WeightKey
from windlass.tensors import plain
from windlass.weights.store import WeightStore

_EMBED = WeightKey(Part.EMBED)


class EmbeddingRows:
    """Looks tokens up in the resident table, or reads just their rows (a few KiB each)."""

    def __init__(self, weights: WeightStore) -> None:
        self._weights = weights

    def rows(self, token_ids: Sequence[int]) -> torch.Tensor:
        """(T, D) in the stored type."""
        if not self._weights.cache.fits(Part.EMBED):
            return self._weights.read_rows(_EMBED, token_ids)
        with self._weights.lease(_EMBED) as lease:
            return plain(lease.tensors, "weight")[torch.tensor(token_ids)]

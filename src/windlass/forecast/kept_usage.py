"""How often each expert of a model was used in earlier runs: counts alone, in a small file that may
be deleted at any time."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from windlass.errors import UsageError
from windlass.files import replace_file
from windlass.forecast.interface import ExpertTable, Floats
from windlass.schedule.batch import Batch
from windlass.schedule.observer import RoutedTokens

_FORMAT = "windlass-expert-usage"
_VERSION = 1
_MOST_TOKENS = 1 << 20  # that a file speaks of: older ones fade as new ones come


class KeptUsage:
    """Tokens of each expert of a model, those of earlier runs and of this one. An observer of
    routing; `save` adds what it saw to the file."""

    wants_scores: ClassVar[bool] = False
    wants_states: ClassVar[bool] = False

    def __init__(self, path: Path, model: str, table: ExpertTable) -> None:
        """`model`: its stamp. A file of another model, or none, counts as empty; UsageError where
        it is something else."""
        self._path = path
        self._model = model
        self._table = table
        self._earlier = self._load()
        self._seen = np.zeros(len(table))

    @property
    def tokens(self) -> float:
        """Of earlier runs."""
        first = self._table.layers[0]
        return float(self._earlier[self._table.slice(first)].sum()) / self._table.top_k

    @property
    def counts(self) -> Floats:
        """Tokens of each expert, of earlier runs."""
        return self._earlier

    @property
    def shares(self) -> Floats:
        """Share of the tokens of earlier runs that used each expert; zeros where there were
        none."""
        return self._earlier / max(1.0, self.tokens)

    def begin(self, batch: Batch, embedded_TD: Any) -> None:
        pass

    def observe(self, tokens: RoutedTokens) -> None:
        self._seen[self._table.slice(tokens.layer)] += np.asarray(tokens.counts_E)

    def end(self, final_TD: Any) -> None:
        pass

    def save(self) -> None:
        """Writes what is known by now; nothing where this run saw nothing. A file that cannot be
        written is a UsageError."""
        if not self._seen.any():
            return
        total = self._load() + self._seen  # another run may have saved meanwhile
        self._seen[:] = 0
        first = self._table.slice(self._table.layers[0])
        tokens = total[first].sum() / self._table.top_k
        total *= min(1.0, _MOST_TOKENS / max(1.0, tokens))
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self._model,
            "num_experts": list(self._table.num_experts),
            "counts": np.rint(total).astype(np.int64).tolist(),
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, json.dumps(document).encode())
        except OSError as error:
            raise UsageError(f"expert-usage: cannot write {self._path}: {error}") from error

    def _load(self) -> Floats:
        empty = np.zeros(len(self._table))
        try:
            document = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return empty
        except (OSError, ValueError) as error:
            raise UsageError(f"expert-usage: cannot read {self._path}: {error}") from error
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise UsageError(
                f"expert-usage: {self._path} is no file of usage: delete it, or name another"
            )
        is_ours = (
            document.get("version") == _VERSION
            and document.get("model") == self._model
            and document.get("num_experts") == list(self._table.num_experts)
        )
        try:
            counts = np.array(document.get("counts") if is_ours else [], dtype=np.float64)
        except (ValueError, TypeError, OverflowError):
            return empty
        is_sound = counts.shape == empty.shape and np.isfinite(counts).all() and (counts >= 0).all()
        return counts if is_sound else empty

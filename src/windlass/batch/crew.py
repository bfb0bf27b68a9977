"""Several engines as the one of a job: what a job asks of whoever has them, and what the manifest
says of them. Knows no engine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from windlass.batch.jobfile import JobFile, JobRow
from windlass.batch.journal import JournalState
from windlass.batch.ledger import Ledger
from windlass.batch.manifest import SettingsDiffer, refuse_difference
from windlass.batch.progress import JobProgress, Snapshot
from windlass.batch.runner import Stopping, snapshot
from windlass.engine.engine_stats import EngineStats

# Of a fingerprint: what machines may differ in without having another job. Rows are then computed
# in other orders of sums, and results may differ in tokens that are nearly as likely.
KERNELS = ("kernels", "host_kernels", "host_attention", "host_experts", "generated_experts")


@dataclass(frozen=True, slots=True)
class CrewWork:
    """The rows of a job that have no result, and where results go. `settle`: told of all engines,
    as fingerprints with `max_model_len`, before another one computes a row; raises UsageError where
    they cannot work on one job."""

    _file: JobFile
    _ledger: Ledger
    settle: Callable[[Sequence[Mapping[str, Any]]], None]

    @property
    def num_left(self) -> int:
        return len(self._ledger) - self._ledger.num_done

    def rows(self) -> Iterator[JobRow]:
        """In input order, parsed as they are asked for."""
        return self._file.rows(self._ledger.open_rows)

    def again(self, indices: Sequence[int]) -> list[JobRow]:
        """Rows that were read before, in input order."""
        wanted = np.zeros(len(self._ledger), dtype=np.bool_)
        wanted[list(indices)] = True
        return list(self._file.rows(wanted))

    def store(self, row: JobRow, state: JournalState, line: bytes) -> None:
        """Raises JobError if it cannot be stored."""
        self._ledger.add(row.index, row.digest, state, line)

    def sync_if_due(self) -> None:
        self._ledger.sync_if_due()

    def snapshot(self, stats: EngineStats) -> Snapshot:
        """`stats`: of all engines together."""
        return snapshot(self._ledger, stats)


class Crew(Protocol):
    """Whoever has several engines."""

    def run(self, work: CrewWork, *, stopping: Stopping, progress: JobProgress) -> None:
        """Has the rows computed, to the end or until `stopping` says so. Raises JobError where it
        cannot go on, what `CrewWork` raises, and UsageError."""
        ...


def kinds_of(engine: Mapping[str, Any]) -> list[str]:
    """The kinds of kernels that a manifest speaks of, as words."""
    kernels = engine.get("kernels")
    return list(kernels) if isinstance(kernels, list) else [_kind(engine)]


def mixed_engines(
    stored: Mapping[str, Any] | None, found: Sequence[Mapping[str, Any]], output: Path
) -> Mapping[str, Any]:
    """What the manifest of `output` says of engines with these fingerprints, beside what it has.
    Raises SettingsDiffer where more than kernels differs, or no engine is of a kind that the job
    has. `arithmetic` of a fingerprint tells instruction sets and devices; it is written down where
    kinds differ alone."""
    first, *others = found
    for other in others:
        refuse_difference(_rest(first), _rest(other), output=output)
    if stored is not None:
        refuse_difference(_rest(stored), _rest(first), output=output)
    kinds = {_kind(one) for one in found}
    plain = {name: value for name, value in first.items() if name != "arithmetic"}
    if stored is None:
        return plain if len(kinds) == 1 else {**_rest(first), "kernels": sorted(kinds)}
    if isinstance(stored["kernels"], list):
        known = set(stored["kernels"])
        if not known & kinds:
            raise SettingsDiffer(
                f"{output} has results of {'; '.join(sorted(known))}, and replicas here are"
                f" {'; '.join(sorted(kinds))}: --overwrite starts anew"
            )
        return {**_rest(stored), "kernels": sorted(known | kinds)}
    alike = [one for one in found if _kernels(one) == _kernels(stored)]
    if not alike:
        refuse_difference(stored, plain, output=output)
    if len(kinds) == 1:
        return stored
    return {**_rest(stored), "kernels": sorted(kinds)}


def _rest(engine: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in engine.items() if name not in (*KERNELS, "arithmetic")}


def _kernels(engine: Mapping[str, Any]) -> dict[str, Any]:
    return {name: engine[name] for name in KERNELS if name in engine}


def _kind(engine: Mapping[str, Any]) -> str:
    words = [str(engine[name]) for name in KERNELS if name in engine]
    return " ".join((*words, *(f"({text})" for text in [engine.get("arithmetic")] if text)))

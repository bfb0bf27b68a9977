"""Which rows of a job file have a result, and where it lies in the journal. About 13 bytes per
row. Knows no requests and no engine."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from windlass.batch.jobfile import DIGEST_BYTES, JobFile
from windlass.batch.journal import Journal, JournalState, Record

_STATES = tuple(JournalState)  # a row's code is the position here plus one; 0 is "no result yet"
_CODES = {state: code for code, state in enumerate(_STATES, start=1)}
_CHUNK = 1 << 16
# numpy orders S but not V; padding is equal on both sides, so equality is exact
_DIGEST = np.dtype(f"S{DIGEST_BYTES}")


class Ledger:
    """Results of the rows of `job`, as far as `journal` has them. Records of rows that are no
    longer in the file are left alone. Failed rows count as open if `retry_failed`, all rows if
    `forget_all`: the journal is then to be cleared before a row is added."""

    def __init__(
        self, job: JobFile, journal: Journal, *, retry_failed: bool, forget_all: bool = False
    ) -> None:
        self._journal = journal
        self._codes = np.zeros(len(job), np.uint8)
        self._offsets = np.zeros(len(job), np.uint64)
        self._lengths = np.zeros(len(job), np.uint32)
        self.num_strangers = 0  # records of rows that the input does not have
        if journal.size_bytes and len(job) and not forget_all:  # else nothing can match
            self._match(job)
        if retry_failed:
            self._codes[self._codes == _CODES[JournalState.FAILED]] = 0
        self.num_before = self.num_done  # results that an earlier run left

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def num_done(self) -> int:
        return int(np.count_nonzero(self._codes))

    @property
    def open_rows(self) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """(rows,) true where a result is missing; a copy."""
        return np.equal(self._codes, 0)

    def count(self, state: JournalState) -> int:
        return int(np.count_nonzero(self._codes == _CODES[state]))

    def add(self, index: int, digest: bytes, state: JournalState, line: bytes) -> None:
        """Stores the result of a row, in the journal and here."""
        record = self._journal.append(digest, state, line)
        self._codes[index] = _CODES[state]
        self._offsets[index], self._lengths[index] = record.offset, record.length

    def sync_if_due(self) -> None:
        self._journal.sync_if_due()

    def results(self) -> Iterator[tuple[JournalState, bytes] | None]:
        """JournalState and result line of every row in input order; None where there is none."""
        for code, offset, length in zip(self._codes, self._offsets, self._lengths, strict=True):
            line = self._journal.result(int(offset), int(length)) if code else b""
            yield (_STATES[int(code) - 1], line) if code else None

    def _match(self, job: JobFile) -> None:
        digests = job.digests().view(_DIGEST)
        order = np.argsort(digests, kind="stable")
        ordered = digests[order]
        for records in _chunks(self._journal.records()):
            keys = np.array([record.digest for record in records], _DIGEST)
            at = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
            known = np.flatnonzero(ordered[at] == keys)
            self.num_strangers += len(keys) - len(known)
            self._place(order[at[known]], [records[i] for i in known.tolist()])

    def _place(
        self, rows: "np.ndarray[tuple[int], np.dtype[np.intp]]", records: list[Record]
    ) -> None:
        # with a row twice in `rows`, numpy keeps the last: the newest record
        self._codes[rows] = [_CODES[record.state] for record in records]
        self._offsets[rows] = [record.offset for record in records]
        self._lengths[rows] = [record.length for record in records]


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk

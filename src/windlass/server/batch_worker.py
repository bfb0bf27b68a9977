"""The two threads that see to batches. One runs rows, batch after batch in the order in which they
came; the other does what needs no engine: it checks files, and ends what was cancelled, has expired
or was about to end when the server did.

Rows run as jobs of `windlass.batch`: journal, manifest, output. What there is after a kill is what
there was before it.
"""

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from windlass.batch.job import OpenJob
from windlass.batch.job_engine import JobModel
from windlass.batch.job_options import JobOptions
from windlass.batch.jobfile import BadLines, JobFile, LineProblem, Malformed
from windlass.batch.manifest import Manifest, SettingsDiffer
from windlass.batch.progress import Snapshot
from windlass.engine.service import Service
from windlass.errors import UsageError, WindlassError
from windlass.protocol.openai import Endpoint
from windlass.server.batch_book import BatchBook
from windlass.server.batch_record import Batch, Status, problem
from windlass.server.file_store import FileStore

_AGAIN_S = 30.0  # until what was held up is tried again
_LOOK_S = 5.0  # between looks at what has expired
_COUNT_EVERY_S = 0.25
_NEVER = float("inf")
_REST = {
    Status.CANCELLED: Malformed("batch_cancelled", "The batch was cancelled before this row ran."),
    Status.EXPIRED: Malformed(
        "batch_expired", "This row did not run before the completion window expired."
    ),
}


@dataclass(frozen=True, slots=True)
class RowEngine:
    """What rows run on. `options`: of their jobs, but for files and times."""

    model: JobModel
    service: Service
    options: JobOptions


@dataclass(frozen=True, slots=True)
class _Held:
    """Why a batch does not go on, and until when (`time.monotonic()`) nobody tries."""

    why: str
    until: float


class BatchWorker:
    """Sees to the batches of `book`. `say`: hears in a line what befalls them. A context
    manager."""

    def __init__(self, book: BatchBook, files: FileStore, say: Callable[[str], None]) -> None:
        self._book = book
        self._files = files
        self._say = say
        self._engine: RowEngine | None = None
        self._is_stopping = False
        self._busy: set[str] = set()  # ids that a thread sees to
        self._held: dict[str, _Held] = {}
        self._threads = [
            threading.Thread(target=self._see_to, args=arguments, name=name, daemon=True)
            for name, *arguments in (
                ("batches", self._settle, self._needs_settling),
                ("batch-rows", self._run, self._may_run),
            )
        ]

    def __enter__(self) -> "BatchWorker":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self, engine: RowEngine) -> None:
        """From now on rows run."""
        with self._book.changed:
            self._engine = engine
            self._book.changed.notify_all()

    def stop(self) -> None:
        """Rows under way are given up, and run when a server starts again; returns when no more of
        them is stored. Calling it again does nothing."""
        with self._book.changed:
            self._is_stopping = True
            self._book.changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def held(self, batch_id: str) -> str | None:
        """Why a batch does not go on."""
        found = self._held.get(batch_id)
        return found.why if found is not None else None

    # --- threads ----------------------------------------------------------------------------------

    def _see_to(self, do: Callable[[Batch], None], wants: Callable[[Batch], bool]) -> None:
        """Has it done to each batch that wants it, the oldest first, until the server stops."""
        while (batch := self._next(wants)) is not None:
            try:
                do(batch)
                self._held.pop(batch.id, None)
            except SettingsDiffer as error:
                # the first line names a file, the last what only a command has
                changed = "; ".join(map(str.strip, str(error).splitlines()[1:-1]))
                self._hold(batch, f"begun with other settings of the server: {changed}", _NEVER)
            except (WindlassError, OSError) as error:
                self._hold(batch, str(error), time.monotonic() + _AGAIN_S)
            except Exception as error:  # noqa: BLE001  thread boundary: the batch stands still
                self._hold(batch, f"{type(error).__name__}: {error}", _NEVER)
            finally:
                with self._book.changed:
                    self._busy.discard(batch.id)
                    self._book.changed.notify_all()  # the other thread may want it now

    def _next(self, wants: Callable[[Batch], bool]) -> Batch | None:
        """None once the server stops."""
        with self._book.changed:
            while not self._is_stopping:
                self._drop_expired_files()
                for batch in self._book.open():
                    if batch.id not in self._busy and wants(batch):
                        self._busy.add(batch.id)
                        return batch
                self._book.changed.wait(_LOOK_S)
            return None

    def _drop_expired_files(self) -> None:
        for file_id in self._files.expired():
            if self._book.uses(file_id) is None:
                with suppress(OSError):
                    self._files.delete(file_id)

    def _needs_settling(self, batch: Batch) -> bool:
        return not _runs(batch) and not self._is_held_now(batch)

    def _may_run(self, batch: Batch) -> bool:
        return self._engine is not None and _runs(batch) and not self._is_held_now(batch)

    def _is_held_now(self, batch: Batch) -> bool:
        found = self._held.get(batch.id)
        if found is None or time.monotonic() >= found.until:
            return False
        # what has other settings may still be cancelled, and expires
        return _runs(batch) or found.until < _NEVER

    def _hold(self, batch: Batch, why: str, until: float) -> None:
        if self._is_stopping:
            return
        if self.held(batch.id) != why:
            self._say(f"{batch.id} is held up: {why}")
        self._held[batch.id] = _Held(why, until)

    # --- what is done to a batch ------------------------------------------------------------------

    def _settle(self, batch: Batch) -> None:
        if batch.status is Status.VALIDATING:
            self._validate(batch)
            return
        options = _job_options(batch, self._book.work_folder(batch), self._files, self._engine)
        stored = Manifest.read(options.manifest_file)
        if stored is not None:  # whatever it ran with: no row runs any more
            options = replace(options, identity=stored.options, max_model_len=None)
        try:
            with OpenJob(replace(options, retry_failed=False), self._progress(batch)) as job:
                self._finish(batch, options, job)
        except UsageError as error:
            self._fail(batch, error)

    def _validate(self, batch: Batch) -> None:
        path = self._files.path(batch.wish.input_file_id)
        try:
            rows = len(JobFile(path, strict=True, endpoint=Endpoint(batch.wish.endpoint)))
        except UsageError as error:
            self._fail(batch, error)
            return
        if not rows:
            self._fail(batch, BadLines("", [LineProblem(1, "empty_file", "the file has no rows")]))
            return
        with self._book.changed:
            now = self._book.get(batch.id)
            if now is not None and now.status is Status.VALIDATING:  # else it was cancelled
                self._book.become(batch.id, Status.IN_PROGRESS, total=rows)

    def _run(self, batch: Batch) -> None:
        engine, options = (
            self._engine,
            _job_options(batch, self._book.work_folder(batch), self._files, self._engine),
        )
        assert engine is not None, "rows run once there is an engine"
        with OpenJob(options, self._progress(batch)) as job:
            if not job.is_done:
                stopping = _Stopping(lambda: self._is_over(batch))
                job.run(engine.model, engine.service, stopping, shares=True)
            if job.is_done or not self._is_stopping:
                self._finish(batch, options, job)

    def _is_over(self, batch: Batch) -> bool:
        now = self._book.get(batch.id)
        return self._is_stopping or now is None or not _runs(now)

    def _finish(self, batch: Batch, options: JobOptions, job: OpenJob) -> None:
        """Writes what there is, and says what became of the batch."""
        with self._book.changed:
            now = self._book.get(batch.id)
            assert now is not None, "batches stay"
            end = Status.COMPLETED if job.is_done else Status.EXPIRED
            if now.status is Status.CANCELLING:
                end = Status.CANCELLED
            elif end is Status.COMPLETED and now.status is not Status.FINALIZING:
                self._book.become(batch.id, Status.FINALIZING)
        job.write_output(_REST.get(end))
        has_output = self._keep(batch, options.output_file, batch.output_file_id)
        has_errors = self._keep(batch, options.error_file, batch.error_file_id)
        found = job.summary()
        self._book.become(
            batch.id, end, total=found.rows, ok=found.ok, bad=found.rows - found.ok,
            has_output=has_output, has_errors=has_errors,
        )  # fmt: skip
        shutil.rmtree(self._book.work_folder(batch), ignore_errors=True)

    def _keep(self, batch: Batch, path: Path | None, file_id: str) -> bool:
        """Makes a result file one of the store; False if it is empty."""
        assert path is not None, "batches have both"
        if not path.stat().st_size:
            return False
        self._files.keep(
            path, file_id=file_id, filename=f"{batch.id}_{path.name}", purpose="batch_output",
            lives_s=batch.wish.result_lives_s,
        )  # fmt: skip
        return True

    def _fail(self, batch: Batch, error: UsageError) -> None:
        errors = [problem("invalid_file", str(error))]
        if isinstance(error, BadLines):
            errors = [problem(one.code, one.message, one.line) for one in error.problems]
        with self._book.changed:
            now = self._book.get(batch.id)
            is_cancelled = now is not None and now.status is Status.CANCELLING
            end = Status.CANCELLED if is_cancelled else Status.FAILED
            self._book.become(batch.id, end, errors=tuple(errors))
        shutil.rmtree(self._book.work_folder(batch), ignore_errors=True)

    def _progress(self, batch: Batch) -> "_Progress":
        return _Progress(self._book, batch.id, lambda text: self._say(f"{batch.id}: {text}"))


def _job_options(
    batch: Batch, work: Path, files: FileStore, engine: RowEngine | None
) -> JobOptions:
    """Of a batch's job, whose files are in `work`. Without an engine it can only be ended."""
    work.mkdir(exist_ok=True)
    own: dict[str, Any] = {
        "name": batch.id,
        "input_file": files.path(batch.wish.input_file_id),
        "output_file": work / "output.jsonl",
        "error_file": work / "errors.jsonl",
        "created": batch.created_at,
        "endpoint": Endpoint(batch.wish.endpoint),
        "strict": True,
    }
    if engine is not None:
        return replace(engine.options, **own)
    return JobOptions(served_names=(), identity={}, recorded={}, max_model_len=None, **own)


def _runs(batch: Batch) -> bool:
    """Whether its rows may run."""
    return batch.status is Status.IN_PROGRESS and time.time() < batch.expires_at


@dataclass(frozen=True, slots=True)
class _Stopping:
    is_stopping: Callable[[], bool]


class _Progress:
    """What a job tells, as its batch's counts."""

    def __init__(self, book: BatchBook, batch_id: str, say: Callable[[str], None]) -> None:
        self._book = book
        self._id = batch_id
        self.say = say
        self._due = 0.0

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._due

    def note(self, text: str) -> None:
        pass

    def update(self, snapshot: Snapshot) -> None:
        self._due = time.monotonic() + _COUNT_EVERY_S
        bad = snapshot.rows_failed
        self._book.count(self._id, total=snapshot.rows, ok=snapshot.rows_done - bad, bad=bad)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

"""One batch job from its files to its files: input, lock, journal, manifest, engine, output. The
only place that knows the order of these steps."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

from windlass.batch.crew import Crew, CrewWork, kinds_of, mixed_engines
from windlass.batch.flights import RunSettings, row_line
from windlass.batch.job_engine import JobEngine, JobModel, PlanLike, served_model
from windlass.batch.job_options import JobOptions, check_paths
from windlass.batch.jobfile import JobFile, Malformed
from windlass.batch.journal import Journal, JournalState, write_error
from windlass.batch.ledger import Ledger
from windlass.batch.manifest import Manifest, refuse_difference
from windlass.batch.output import write_output
from windlass.batch.progress import JobProgress
from windlass.batch.prompt_lengths import job_lengths
from windlass.batch.runner import BatchRunner, Stopping
from windlass.engine.engine_stats import EngineStats
from windlass.engine.expectation import Check
from windlass.engine.grammars import grammars_bytes
from windlass.engine.request import WINDOW
from windlass.engine.service import Service
from windlass.engine.text_limits import most_chars
from windlass.errors import JobError, UsageError
from windlass.files import replace_file
from windlass.params import SamplingParams
from windlass.protocol.openai import ChatTokenizer, ServedModel
from windlass.units import counted
from windlass.workload import Job


class EngineSource(Protocol):
    """Whoever opens the engine of a job."""

    def open(self, max_model_len: int | None, left: "LeftRows") -> JobEngine:
        """`max_model_len`: the job's, None for what fits. `left`: what the engine will run."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How a run ended. Rows count the whole job; `stats`, times and `check`, the run beside what
    was predicted of it, this run alone (None and 0 if no model was loaded)."""

    rows: int
    ok: int
    refused: int
    failed: int
    rows_before: int  # finished by earlier runs
    load_s: float
    run_s: float
    stats: EngineStats | None
    check: Check | None = None

    @property
    def num_done(self) -> int:
        return self.ok + self.refused + self.failed

    @property
    def is_complete(self) -> bool:
        return self.num_done == self.rows


@dataclass(frozen=True, slots=True)
class LeftRows:
    """The rows of a job that have no result."""

    file: JobFile
    ledger: Ledger
    options: JobOptions

    def job(self, tokenizer: ChatTokenizer, params: SamplingParams, longest: int) -> Job | None:
        """Lengths of all their sequences; None where none is left. `params`: of rows that name
        none. `longest`: tokens of the longest sequence that the model allows."""
        names, now = self.options.served_names, self.options.created
        model = ServedModel(names, tokenizer, longest, params, now=now)
        return job_lengths(self.file, self.ledger.open_rows, model)

    def row_bytes(self, max_model_len: int, vocab_size: int) -> int:
        """What the largest row takes while it is read and made into tokens, and grammars, where a
        row has any."""
        more = grammars_bytes(vocab_size) if self.file.wants_grammars else 0
        return self.longest_row_bytes(max_model_len) + more

    def longest_row_bytes(self, max_model_len: int) -> int:
        """The same without grammars."""
        most = most_chars(max_model_len)
        return max((row.needed_bytes(most) for row in self.file.long_rows), default=0)


class OpenJob:
    """A job's input and what is known of its results, locked. A context manager. Raises UsageError
    for wrong files or settings, JobError where the job cannot go on; finished rows are then safe in
    the journal."""

    def __init__(self, options: JobOptions, progress: JobProgress) -> None:
        check_paths(options)
        self._options = options
        self._progress = progress
        self._file = JobFile(
            options.input_file, strict=options.strict, endpoint=options.endpoint, notes=progress
        )
        progress.note("getting ready")
        with ExitStack() as stack:
            self._journal = journal = stack.enter_context(Journal(options.journal_file))
            # an attempt that brought nothing leaves nothing behind
            stack.callback(journal.remove_if_empty)
            self._stored = _stored_manifest(options, journal)
            self._ledger = Ledger(
                self._file,
                journal,
                retry_failed=options.retry_failed,
                forget_all=options.overwrite,
            )
            self._held = stack.pop_all()
        _greet(options, self._ledger, journal, progress)

    def __enter__(self) -> "OpenJob":
        return self

    def __exit__(self, *exc: Any) -> None:
        self._held.__exit__(*exc)

    @property
    def is_done(self) -> bool:
        return self._ledger.num_done == len(self._ledger)

    @property
    def left(self) -> LeftRows:
        return LeftRows(self._file, self._ledger, self._options)

    @property
    def max_model_len(self) -> int | None:
        """What its engine must have; None for what fits."""
        return _context_length(self._options, self._stored)

    def run(self, engine: JobModel, service: Service, stopping: Stopping, *, shares: bool) -> None:
        """Runs what is left, to the end or until `stopping` says so. `shares`: others use the
        service too."""
        options = self._options
        own = {**engine.fingerprint, "max_model_len": engine.max_model_len}
        if self._stored is not None:
            refuse_difference(self._stored.engine, own, output=options.output_file)
        manifest = self._settle(own)
        _write_plan(options, engine.plan)
        self._progress.note("no pass has ended yet")
        runner = _runner(options, engine, service, self._ledger, manifest, shares=shares)
        rows = self._file.rows(self._ledger.open_rows)
        runner.run(rows, stopping=stopping, progress=self._progress)
        self._journal.sync()

    def run_by(self, crew: Crew, stopping: Stopping) -> None:
        """The same by a crew, whose engines may come and go: what results would be mixed of is in
        the manifest before a row runs."""

        def settle(found: Sequence[Mapping[str, Any]]) -> None:
            own = self._stored.engine if self._stored else None
            mixed = mixed_engines(own, found, self._options.output_file)
            if len(kinds := kinds_of(mixed)) > 1 and mixed != own:
                told = "; ".join(kinds)
                if self._options.strict:
                    raise UsageError(f"replicas: {told}: --strict allows one kind of kernels")
                self._progress.say(f"results are of several kernels, as the manifest says: {told}")
            self._settle(mixed)

        work = CrewWork(self._file, self._ledger, settle)
        crew.run(work, stopping=stopping, progress=self._progress)
        self._journal.sync()

    @property
    def created(self) -> int:
        """Seconds since 1970, of every result."""
        return self._options.created if self._stored is None else self._stored.created

    def _settle(self, engine: Mapping[str, Any]) -> Manifest:
        """Begins the job with `engine`, or goes on with it. Only here, where rows can run, does
        the job that is to be overwritten end."""
        options, stored = self._options, self._stored
        if stored is not None and stored.engine == engine:
            return stored
        if stored is None:
            self._journal.clear()
            stored = Manifest(options.created, options.identity, engine, options.recorded)
        self._stored = replace(stored, engine=engine)
        try:
            self._stored.write(options.manifest_file)
        except OSError as error:
            raise write_error(options.manifest_file, error) from error
        return self._stored

    def summary(self) -> Summary:
        """How it stands, without times."""
        return _summary(self._ledger)

    def write_output(self, rest: Malformed | None = None) -> None:
        """All results in input order; each file appears whole or not at all. `rest`: what is said
        of rows without one, if there are any."""
        assert self.is_done or rest is not None, "rows without a result"
        write_output(self._options, self._lines(rest))

    def _lines(self, rest: Malformed | None) -> Iterator[tuple[JournalState, bytes]]:
        left = self._file.rows(self._ledger.open_rows)
        for result in self._ledger.results():
            if result is None:
                assert rest is not None, "rows without a result"
                error = {"code": rest.code, "message": rest.message}
                result = JournalState.FAILED, row_line(next(left), None, error)
            yield result


def run_job(
    options: JobOptions, source: EngineSource, *, progress: JobProgress, stopping: Stopping
) -> Summary:
    """Runs what is left of the job; complete if not stopped. Raises as `OpenJob` does."""
    with OpenJob(options, progress) as job, ExitStack() as stack:
        load_s = run_s = 0.0
        engine = stats = None
        if not job.is_done:
            begin = time.monotonic()
            engine = source.open(job.max_model_len, job.left)
            service = stack.enter_context(Service(engine))
            load_s = time.monotonic() - begin
            begin = time.monotonic()
            job.run(engine, service, stopping, shares=False)
            run_s = time.monotonic() - begin
            stats = service.stats()
        summary = replace(job.summary(), load_s=load_s, run_s=run_s, stats=stats)
        if summary.is_complete:
            job.write_output()
        if engine is not None and stats is not None:
            summary = replace(summary, check=engine.compare(stats.phases))
    return summary


def _stored_manifest(options: JobOptions, journal: Journal) -> Manifest | None:
    """The manifest of the job that is to be resumed, None to start anew."""
    if options.overwrite:
        return None
    if journal.size_bytes == 0:
        output = options.output_file
        if output.exists() and output.stat().st_size > 0:
            raise UsageError(
                f"output file: {str(output)!r} exists and has no journal that could be resumed; "
                "--overwrite replaces it"
            )
        return None
    stored = Manifest.read(options.manifest_file)
    if stored is None:
        raise JobError(
            f"{options.journal_file}: results without {options.manifest_file.name}, which would "
            "say what they belong to; --overwrite starts anew"
        )
    refuse_difference(stored.options, options.identity, output=options.output_file)
    if options.max_model_len is not None:
        own = {**stored.engine, "max_model_len": options.max_model_len}
        refuse_difference(stored.engine, own, output=options.output_file)
    return stored


def _context_length(options: JobOptions, stored: Manifest | None) -> int | None:
    """A resume keeps the job's, also where more or less memory would now let another one fit."""
    if stored is None or options.max_model_len is not None:
        return options.max_model_len
    length: int = stored.engine["max_model_len"]
    return length


def _write_plan(options: JobOptions, plan: PlanLike) -> None:
    text = json.dumps(plan.to_json(), indent=1) + "\n"
    try:
        replace_file(options.plan_file, text.encode())
    except OSError as error:
        raise write_error(options.plan_file, error) from error


def _greet(options: JobOptions, ledger: Ledger, journal: Journal, progress: JobProgress) -> None:
    if ledger.num_before:
        progress.say(
            f"resuming {options.output_file}: {ledger.num_before} of"
            f" {counted(len(ledger), 'row')} done"
        )
    else:
        progress.say(f"{options.input_file}: {counted(len(ledger), 'row')}")
    if ledger.num_strangers:
        progress.say(
            f"{ledger.num_strangers} results in {journal.path} are of rows that this input does not"
            f" have: {options.output_file} will be without them"
        )
    if journal.num_damaged:
        progress.say(
            f"{journal.path}: {journal.num_damaged} damaged records were left out; their rows run "
            "again"
        )


def _runner(
    options: JobOptions,
    engine: JobModel,
    service: Service,
    ledger: Ledger,
    manifest: Manifest,
    *,
    shares: bool,
) -> BatchRunner:
    # a resume on another day must render the same prompts
    parsers = options.tool_call_parser, options.reasoning_parser
    model = served_model(engine, options.served_names, now=manifest.created, parsers=parsers)
    window = WINDOW * engine.capacity
    settings = RunSettings(
        options.name, manifest.created, options.max_retries, window, shares_service=shares
    )
    return BatchRunner(service, model, ledger, settings)


def _summary(ledger: Ledger) -> Summary:
    return Summary(
        rows=len(ledger),
        ok=ledger.count(JournalState.OK),
        refused=ledger.count(JournalState.REFUSED),
        failed=ledger.count(JournalState.FAILED),
        rows_before=ledger.num_before,
        load_s=0.0,
        run_s=0.0,
        stats=None,
    )

"""`windlass run-batch`: a file of requests to a file of results."""

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass import __version__
from windlass.cli.engine_flags import CONFIG_FLAG, ENGINE_FLAGS, engine_options
from windlass.cli.flags import Command, Flag, integer
from windlass.cli.job_identity import job_identity
from windlass.cli.output import drop_output
from windlass.cli.parser_flags import PARSER_FLAGS
from windlass.cli.replicas import REPLICA_FLAGS, check_replicas, run_replicas
from windlass.cli.signals import EXIT_INTERRUPTED, StopSignals
from windlass.cli.summary import (
    burst_lines,
    draft_lines,
    memory_words,
    phase_json,
    phase_lines,
    plan_lines,
    prefetch_lines,
    weights_json,
    weights_words,
)
from windlass.doctor.kept import kept_profile, with_kept_usage
from windlass.errors import UsageError, WindlassError
from windlass.hub.locate import Located, locate
from windlass.options import EngineOptions, model_name, resolve_model
from windlass.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from windlass.batch.job import LeftRows, Summary
    from windlass.batch.job_engine import JobEngine
    from windlass.batch.job_options import JobOptions
    from windlass.batch.progress import JobProgress

EXIT_ROWS_FAILED = 3
_LAST_SECOND = 253402300799  # of the year 9999, where calendars end
_FILES, _JOB = "files", "job"


def _path(text: str) -> Path:
    if "://" in text or text == "-":
        raise UsageError(f"value: got {text!r}, allowed a local file: a job is read twice")
    return Path(text)


FLAGS = (
    Flag(name="input-file", aliases=("-i",), read=_path, metavar="FILE", is_required=True,
         group=_FILES, help="requests, one OpenAI batch line each"),
    Flag(name="output-file", aliases=("-o",), read=_path, metavar="FILE", is_required=True,
         group=_FILES, help="results in the same order; FILE.journal and FILE.manifest.json beside "
         "it make the job resumable, FILE.plan.json is the plan it ran by"),
    Flag(name="error-file", read=_path, metavar="FILE", group=_FILES,
         help="put rows that failed here instead"),
    Flag(name="overwrite", read=None, default=False, group=_JOB,
         help="forget earlier results and start anew"),
    Flag(name="resume", read=None, default=False, group=_JOB,
         help="go on where an earlier run ended; this is what happens anyway"),
    Flag(name="max-retries", read=integer(0), default=2, metavar="N", group=_JOB,
         help="how often a row that failed is tried again (default 2)"),
    Flag(name="no-retry-failed", read=None, default=False, group=_JOB,
         help="on a resume, keep rows that failed in an earlier run"),
    Flag(name="json", read=None, default=False, group="records",
         help="end standard output with one line of JSON"),
    Flag(name="served-model-name", aliases=("-a", "--alias"), metavar="NAME", group="model",
         help="the name requests may use and responses carry (default: the model's)"),
    *PARSER_FLAGS,
    *REPLICA_FLAGS,
    *ENGINE_FLAGS,
    CONFIG_FLAG,
)  # fmt: skip


def run(values: Mapping[str, Any], arguments: Sequence[str]) -> int:
    try:
        return _run(values, arguments)
    except WindlassError as error:
        if values["json"]:
            _print(json.dumps({"status": "failed", "error": str(error)}))
        raise
    except KeyboardInterrupt:
        # nothing was overwritten either: the very same command
        command = _resume_command(arguments, has_begun=False)
        print(
            "\ninterrupted before this run computed a row; results of earlier runs are safe. "
            f"Go on with:\n  {command}",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


class _Source:
    """Opens the engine of a job, and says so; from then on signals let the job end."""

    def __init__(self, located: Located, signals: StopSignals, progress: "JobProgress") -> None:
        self._located = located
        self._signals = signals
        self._progress = progress
        self.plan: dict[str, Any] = {}  # stays empty where the job was already done

    def open(self, max_model_len: int | None, left: "LeftRows") -> "JobEngine":
        from windlass.build.open import open_engine

        found = self._located.with_weights(self._progress.say, self._note_download)
        self._progress.say(f"loading {found.model}")
        options = with_kept_usage(replace(found, max_model_len=max_model_len))
        opened = open_engine(options, source=left, profile=kept_profile(found))
        self._signals.defer()
        self.plan = opened.plan.to_json()
        for line in plan_lines(opened):
            self._progress.say(line)
        return opened

    def _note_download(self, done: int, total: int) -> None:
        self._progress.note(f"downloading, {format_bytes(done)} of {format_bytes(total)}")


def _run(values: Mapping[str, Any], arguments: Sequence[str]) -> int:
    from windlass.batch.job import run_job
    from windlass.batch.progress import open_progress

    check_replicas(values)
    command = _resume_command(arguments, has_begun=True)
    farewell = f"stopped at once; finished rows are safe. Go on with:\n  {command}"
    with StopSignals(farewell) as signals:
        given = engine_options(values)
        located = locate(given)
        options = _job_options(values, located.options)
        more: dict[str, Any] = {}
        own: list[str] = []
        with open_progress() as progress:
            if values["replicas"] is None:
                source = _Source(located, signals, progress)
                summary = run_job(options, source, progress=progress, stopping=signals)
                more = {"plan": source.plan} if source.plan else {}
            else:
                engine = given, located
                summary, own, more = run_replicas(values, options, engine, progress, signals)
    lines = [*_summary_lines(summary, options, values), *own]
    if values["json"]:
        lines.append(json.dumps({**_summary_json(summary, options, values), **more}))
    _print(*lines)
    if not summary.is_complete:
        command = _resume_command(arguments, has_begun=summary.num_done > 0)
        print(f"interrupted; finished rows are safe. Go on with:\n  {command}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_ROWS_FAILED if summary.refused + summary.failed else 0


def _job_options(values: Mapping[str, Any], engine: EngineOptions) -> "JobOptions":
    from windlass.batch.job_options import JobOptions

    folder = resolve_model(engine.model)
    given: str | None = values["served_model_name"]
    names = [given] if given else [model_name(folder), values["model"]]
    identity = job_identity(values, engine, names[0])
    recorded = {flag.key: values[flag.key] for flag in FLAGS if flag.key not in identity}
    return JobOptions(
        input_file=values["input_file"],
        output_file=values["output_file"],
        error_file=values["error_file"],
        served_names=tuple(dict.fromkeys(names)),
        identity=identity,
        recorded={**recorded, "version": __version__},
        max_model_len=engine.max_model_len,
        created=_now(),
        trace_file=values["trace"],
        routing_trace_file=values["routing_trace"],
        overwrite=values["overwrite"],
        strict=values["strict"],
        retry_failed=not values["no_retry_failed"],
        max_retries=values["max_retries"],
        tool_call_parser=values["tool_call_parser"],
        reasoning_parser=values["reasoning_parser"],
    )


def _now() -> int:
    """Seconds since 1970, or what the reproducible-builds variable says they are."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        return int(time.time())
    if not given.isdecimal() or int(given) > _LAST_SECOND:
        raise UsageError(f"SOURCE_DATE_EPOCH: got {given!r}, allowed seconds since 1970")
    return int(given)


def _resume_command(arguments: Sequence[str], *, has_begun: bool) -> str:
    """What goes on with the job. One without a row still has to overwrite what is there."""
    kept = [argument for argument in arguments if argument != "--overwrite" or not has_begun]
    return shlex.join(["windlass", "run-batch", *kept])


def _summary_lines(
    summary: "Summary", options: "JobOptions", values: Mapping[str, Any]
) -> list[str]:
    bad = summary.refused + summary.failed
    where = options.error_file or options.output_file
    lines = [
        f"rows: {summary.ok} done, {bad} with errors{f' (in {where})' if bad else ''}, "
        f"{summary.rows} in all; {summary.rows_before} from earlier runs"
    ]
    stats = summary.stats
    if stats is not None:
        seconds = max(summary.run_s, 1e-9)
        lines += [
            f"time: {format_seconds(summary.run_s)}, loading {format_seconds(summary.load_s)}",
            f"tokens: {stats.input_tokens} in, {stats.generated_tokens} out; "
            f"{stats.generated_tokens / seconds:.2f} out per s, "
            f"{(stats.input_tokens + stats.generated_tokens) / seconds:.2f} per s in all",
            *phase_lines(stats, summary.check),
            f"disk: {format_bytes(stats.bytes_read)} read, "
            f"{format_bytes(stats.bytes_read / seconds)}/s; {weights_words(stats)}",
            *prefetch_lines(stats),
            *draft_lines(stats),
            *burst_lines(stats),
            f"memory: {memory_words(stats)}",
            *(() if values["replicas"] else (f"plan: {options.plan_file}",)),
        ]
        if stats.prefix_cache_queries:
            share = 100 * stats.prefix_cache_hits / stats.prefix_cache_queries
            lines.append(
                f"shared prefixes: {stats.prefix_cache_hits} of {stats.prefix_cache_queries}"
                f" prompt tokens found ({share:.1f} %)"
            )
    if summary.is_complete:
        lines.append(f"results: {options.output_file}")
    return lines


def _summary_json(
    summary: "Summary", options: "JobOptions", values: Mapping[str, Any]
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "status": "completed" if summary.is_complete else "interrupted",
        "version": __version__,
        "model": options.served_names[0],
        "input_file": str(options.input_file),
        "output_file": str(options.output_file),
        "error_file": str(options.error_file) if options.error_file else None,
        "request_counts": {
            "total": summary.rows,
            "completed": summary.ok,
            "failed": summary.refused + summary.failed,
        },
        "rows_refused": summary.refused,
        "rows_from_earlier_runs": summary.rows_before,
        "load_time": summary.load_s,
        "elapsed_time": summary.run_s,
    }
    stats = summary.stats
    if stats is not None:
        seconds = max(summary.run_s, 1e-9)
        total = stats.input_tokens + stats.generated_tokens
        document |= {
            "total_input_tokens": stats.input_tokens,
            "total_output_tokens": stats.generated_tokens,
            "output_throughput": stats.generated_tokens / seconds,
            "total_token_throughput": total / seconds,
            "plan_file": None if values["replicas"] else str(options.plan_file),
            "prefix_cache_queries": stats.prefix_cache_queries,
            "prefix_cache_hits": stats.prefix_cache_hits,
            "passes": stats.passes,
            "burst_passes": stats.burst_passes,
            "bursts_have_lost": stats.bursts_have_lost,
            **weights_json(stats),
            "weights_wait_time": stats.wait_s,
            "pass_time": stats.pass_s,
            "peak_rss_bytes": stats.peak_rss_bytes,
            "peak_device_bytes": stats.peak_device_bytes,
            **phase_json(stats, summary.check),
        }
    return document


def _print(*lines: str) -> None:
    """To whoever reads: the results are in files, and what became of them is the exit code's."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        drop_output()


COMMAND = Command(
    name="run-batch",
    help="Run a file of OpenAI batch requests. The same command again resumes it.",
    flags=FLAGS,
    run=run,
)

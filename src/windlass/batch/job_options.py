"""What a job is asked to do, and where its files are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windlass.errors import UsageError
from windlass.files import temporary_file
from windlass.protocol.answers import AUTO
from windlass.protocol.openai import Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """`identity`: what results depend on, as far as known before the model is loaded; must be
    equal on a resume. `recorded`: stored for the reader alone."""

    input_file: Path
    output_file: Path
    error_file: Path | None
    served_names: tuple[str, ...]
    identity: Mapping[str, Any]
    recorded: Mapping[str, Any]
    max_model_len: int | None  # None: what fits, then the same on every resume
    created: int
    trace_file: Path | None = None  # the engine writes it; known here to keep files apart
    routing_trace_file: Path | None = None  # likewise
    overwrite: bool = False
    name: str = "row"  # begins the ids of requests
    strict: bool = False
    endpoint: Endpoint | None = None  # the only one that rows may name
    retry_failed: bool = True
    max_retries: int = 2
    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO

    @property
    def journal_file(self) -> Path:
        return self.output_file.with_name(self.output_file.name + ".journal")

    @property
    def manifest_file(self) -> Path:
        return self.output_file.with_name(self.output_file.name + ".manifest.json")

    @property
    def plan_file(self) -> Path:
        """What a run's engine was given; `--plan` replays it."""
        return self.output_file.with_name(self.output_file.name + ".plan.json")


def check_paths(options: JobOptions) -> None:
    """Raises UsageError where two of its files are one, or one cannot be written."""
    named = {
        "input file": options.input_file,
        "output file": options.output_file,
        "error file": options.error_file,
        "trace": options.trace_file,
        "routing trace": options.routing_trace_file,
        "journal": options.journal_file,
        "manifest": options.manifest_file,
        "plan": options.plan_file,
    }
    for what in ("output file", "error file", "manifest", "plan"):
        path = named[what]
        named[f"temporary {what}"] = None if path is None else temporary_file(path)
    seen: dict[Path, str] = {}
    for what, path in named.items():
        if path is None:
            continue
        other = seen.setdefault(path.resolve(), what)
        if other != what:
            raise UsageError(f"{what}: got {str(path)!r}, allowed another file than the {other}")
    for what in ("output file", "error file"):
        path = named[what]
        if path is None:
            continue
        if path.is_dir():
            raise UsageError(f"{what}: got the folder {str(path)!r}, allowed a file")
        if not path.resolve().parent.is_dir():
            raise UsageError(f"{what}: got {str(path)!r}: its folder does not exist")

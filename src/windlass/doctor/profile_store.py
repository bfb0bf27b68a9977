"""Reports kept on disk: one file for each machine, software and path that was measured. A report of
another machine, version or path is another file, so a stale one is never found."""

import json
import os
import tempfile
from hashlib import blake2b
from pathlib import Path

from windlass.doctor.environment import Environment
from windlass.doctor.tables import Report
from windlass.errors import UsageError
from windlass.kernels.cpu import library

FOLDER = "windlass/profiles"


def cache_key(environment: Environment, model: Path | None) -> dict[str, object]:
    """Everything that makes a report stale when it changes. A limit on memory does not: rates are
    the same within it."""
    disk = environment.disk
    return {
        "cpu": environment.cpu,
        "features": list(environment.features),
        "cores": [environment.cores, environment.machine_cores],
        "gpu": environment.gpu,
        "system": environment.system,
        "threads": environment.threads,
        "kernels": environment.kernels,
        "library": _library_stamp(),
        "windlass": environment.windlass,
        "torch": environment.torch,
        "disk": [disk.path, disk.mount, disk.device],
        "model": None if model is None else str(model.resolve()),
    }


def load_report(cache: Path, key: dict[str, object]) -> Report | None:
    """The report measured under the same key; None where there is none that can be read."""
    path = _path(cache, key)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["key"] != key:
            return None
        return Report.from_json(document["report"])
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        return None


def save_report(cache: Path, key: dict[str, object], report: Report) -> Path:
    """Writes the report as a whole: readers see the old file or the new one. The path."""
    path = _path(cache, key)
    text = json.dumps({"key": key, "report": report.to_json()}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"cache {path.parent}: cannot be written: {error.strerror}") from error
    return path


def _path(cache: Path, key: dict[str, object]) -> Path:
    digest = blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    return cache / FOLDER / f"{digest}.json"


def _library_stamp() -> list[int] | None:
    """Of the native library's file: a new build has other kernels under the same version."""
    try:
        status = library.FILE.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]

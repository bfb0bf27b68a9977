"""`windlass doctor`: what this machine is and how fast, measured once and kept."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.cli.engine_flags import CONFIG_FLAG, ENGINE_FLAGS
from windlass.cli.flags import Command, Flag
from windlass.options import EngineOptions, resolve_model

if TYPE_CHECKING:
    from windlass.doctor.examine import Subject
    from windlass.hardware.profile import HardwareProfile

# Flags of an engine that change what is measured
_SHARED = ("threads", "moe-backend", "dtype", "load-mode")
FLAGS = (
    Flag(name="model", aliases=("-m",), metavar="DIR",
         help="a checkpoint: its disk, shapes and formats are measured (default: usual shapes, all "
         "formats, and a temporary file of at most 1 GiB in the cache folder)"),
    Flag(name="fresh", read=None, default=False,
         help="measure again, whatever was kept (otherwise once for each machine, software and "
         "path)"),
    Flag(name="json", read=None, default=False, help="print one line of JSON instead"),
    *(flag for flag in ENGINE_FLAGS if flag.name in _SHARED),
    CONFIG_FLAG,
)  # fmt: skip


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"


def subject_of(values: Mapping[str, Any]) -> "Subject":
    """What to examine, by the values of flags."""
    from windlass.doctor.examine import Subject

    return Subject(
        cache=cache_folder(),
        model=None if values["model"] is None else resolve_model(values["model"]),
        threads=values["threads"],
        moe_backend=values["moe_backend"],
        dtype=values["dtype"],
        load_mode=values["load_mode"],
    )


def kept_profile(options: EngineOptions) -> "HardwareProfile | None":
    """What `windlass doctor` found with this checkpoint, else with none; None if it never ran."""
    from windlass.doctor.examine import Subject, kept_report

    folder = None if options.load_format == "dummy" else resolve_model(options.model)
    for model in dict.fromkeys((folder, None)):
        subject = Subject(
            cache=cache_folder(),
            model=model,
            threads=options.threads,
            moe_backend=options.moe_backend,
            dtype=options.dtype,
            load_mode=options.load_mode,
        )
        if (report := kept_report(subject)) is not None:
            return report.profile
    return None


def run(values: Mapping[str, Any], arguments: Sequence[str]) -> int:
    from windlass.doctor.examine import examine

    def tell(text: str) -> None:
        print(f"doctor: {text}", file=sys.stderr, flush=True)

    report = examine(subject_of(values), fresh=values["fresh"], tell=tell)
    if values["json"]:
        print(json.dumps(report.to_json()))
    else:
        print("\n".join(report.lines()))
    return 0


COMMAND = Command(
    name="doctor",
    help="Report what this machine is, and measure how fast it reads and computes.",
    flags=FLAGS,
    run=run,
)

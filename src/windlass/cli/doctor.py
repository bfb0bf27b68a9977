"""`windlass doctor`: what this machine is and how fast, measured once and kept."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from windlass.cli.engine_flags import (
    CONFIG_FLAG,
    ENGINE_FLAGS,
    MODEL_NAMES,
    REVISION_FLAG,
    say_line,
)
from windlass.cli.flags import Command, Flag
from windlass.doctor.kept import cache_folder
from windlass.errors import UsageError
from windlass.hub.locate import locate
from windlass.options import EngineOptions, resolve_model

if TYPE_CHECKING:
    from windlass.doctor.examine import Subject

# Flags of an engine that change what is measured
_SHARED = ("device", "threads", "moe-backend", "dtype", "load-mode")
FLAGS = (
    Flag(name="model", aliases=MODEL_NAMES, metavar="DIR|ORG/NAME",
         help="a checkpoint: its disk, shapes and formats are measured (default: usual shapes, all "
         "formats, and a temporary file of at most 1 GiB in the cache folder)"),
    REVISION_FLAG,
    Flag(name="fresh", read=None, default=False,
         help="measure again, whatever was kept (otherwise once for each machine, software and "
         "path)"),
    Flag(name="json", read=None, default=False, help="print one line of JSON instead"),
    *(flag for flag in ENGINE_FLAGS if flag.name in _SHARED),
    CONFIG_FLAG,
)  # fmt: skip


def subject_of(values: Mapping[str, Any]) -> "Subject":
    """What to examine, by the values of flags."""
    from windlass.doctor.examine import Subject

    model = None
    if values["model"] is not None:
        named = EngineOptions(model=values["model"], revision=values["revision"])
        model = resolve_model(locate(named).with_weights(say_line).model)
    elif values["revision"] is not None:
        raise UsageError("--revision: allowed with --model")
    return Subject(
        cache=cache_folder(),
        model=model,
        device=values["device"],
        threads=values["threads"],
        moe_backend=values["moe_backend"],
        dtype=values["dtype"],
        load_mode=values["load_mode"],
    )


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

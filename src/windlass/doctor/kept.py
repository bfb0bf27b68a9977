"""What an earlier `windlass doctor` found: where it is kept, and the profile that fits a run.
Imports nothing heavy: every command loads this, and most need nothing of it."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from windlass.options import EngineOptions, checkpoint_stamp, resolve_model

if TYPE_CHECKING:
    from windlass.hardware.profile import HardwareProfile


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again."""
    # a place of the whole system, no option of a command: `LLM` must find what the commands keep
    given = os.environ.get("XDG_CACHE_HOME", "")  # noqa: TID251
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"


def with_kept_usage(options: EngineOptions) -> EngineOptions:
    """With the file that keeps how often the model's experts are used, where the choice was left to
    Windlass. Random weights have none."""
    if options.expert_usage != "auto":
        return options
    if options.load_format == "dummy":
        return replace(options, expert_usage="off")
    name = f"{checkpoint_stamp(resolve_model(options.model))}.json"
    return replace(options, expert_usage=cache_folder() / "windlass/usage" / name)


def kept_profile(options: EngineOptions) -> "HardwareProfile | None":
    """What `windlass doctor` found with this checkpoint, else with none; None if it never ran.
    Measures nothing. To be asked before kernels are chosen for a run: it chooses its own."""
    from windlass.doctor.examine import Subject, kept_report

    folder = None if options.load_format == "dummy" else resolve_model(options.model)
    for model in dict.fromkeys((folder, None)):
        subject = Subject(
            cache=cache_folder(),
            model=model,
            device=options.device,
            threads=options.threads,
            moe_backend=options.moe_backend,
            dtype=options.dtype,
            load_mode=options.load_mode,
        )
        if (report := kept_report(subject)) is not None:
            return report.profile
    return None

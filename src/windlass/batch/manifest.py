"""What a job's results depend on, stored beside its output, so that a resume under other settings
is refused. Knows no rows and no engine."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from windlass.errors import JobError, UsageError
from windlass.files import replace_file

FORMAT = 1


class SettingsDiffer(UsageError):
    """A job was begun under other settings than these."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """`options` and `engine` must be equal on a resume; `recorded` may differ. `created` (seconds
    since 1970) is the `created` of every result and the time that chat templates see, so that a
    restart changes no byte."""

    created: int
    options: Mapping[str, Any]  # known before the model is loaded
    engine: Mapping[str, Any]  # the loaded engine's fingerprint
    recorded: Mapping[str, Any]
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """The file appears whole or not at all. Raises OSError."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True, default=str) + "\n"
        replace_file(path, text.encode())

    @classmethod
    def read(cls, path: Path) -> "Manifest | None":
        """None if there is no file. Raises JobError if it is not a manifest."""
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise JobError(f"{path}: not readable as a manifest: {error}") from error
        names = ("created", "options", "engine", "recorded", "format")
        if not isinstance(document, dict) or set(document) != set(names):
            raise JobError(f"{path}: not a manifest of this version; --overwrite starts anew")
        if document["format"] != FORMAT:
            raise JobError(
                f"{path}: format {document['format']}, allowed {FORMAT}; --overwrite starts anew"
            )
        return cls(**document)


def refuse_difference(stored: Mapping[str, Any], now: Mapping[str, Any], *, output: Path) -> None:
    """Raises SettingsDiffer naming every field that differs."""
    plain = json.loads(json.dumps(dict(now), default=str))
    changed = [
        f"{name}: the job has {stored.get(name)!r}, now {plain.get(name)!r}"
        for name in sorted(set(stored) | set(plain))
        if stored.get(name) != plain.get(name)
    ]
    if changed:
        raise SettingsDiffer(
            f"{output} belongs to a job with other settings, which would mix results:\n  "
            + "\n  ".join(changed)
            + "\nUse the job's settings to resume it, another --output-file, or --overwrite to "
            "start anew"
        )

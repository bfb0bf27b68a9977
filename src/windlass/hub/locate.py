"""Where models are: folders, and names on the hub, which become folders here. Knows names and
folders, no protocol."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from windlass.errors import UsageError
from windlass.hub.download import OnStep, download
from windlass.hub.headers import write_headers
from windlass.hub.repository import CONFIGURATION, SMALL_FILES, Hub, Snapshot
from windlass.models.registry import read_spec
from windlass.options import (
    DEMO,
    EngineOptions,
    checkpoint_stamp,
    model_name,
    read_config,
    resolve_model,
)
from windlass.units import format_bytes

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(.+))?")
_CACHED = re.compile(r"models--[^/]+/snapshots/([0-9a-f]{40})")

_logger = logging.getLogger(__name__)
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Located:
    """Options whose model and tokenizer are folders. `snapshot`: of a model on the hub, whose
    weights may not be here yet."""

    options: EngineOptions
    snapshot: Snapshot | None

    def with_weights(self, say: Say = _logger.info, on_step: OnStep | None = None) -> EngineOptions:
        """The options, once all weights are here. `on_step` hears of a download instead of a bar.
        Raises ModelError for a model that Windlass does not run before any weight comes."""
        if self.snapshot is not None and self.options.load_format != "dummy":
            read_spec(read_config(self.snapshot.folder))
            if missing := self.snapshot.missing():
                download(self.snapshot, missing, say=say, on_step=on_step)
        return self.options

    def with_headers(self, into: Path, say: Say) -> EngineOptions:
        """The options, their model in the empty folder `into` where weights are not here."""
        if self.snapshot is None or not (missing := self.snapshot.missing()):
            return self.options
        read_spec(read_config(self.snapshot.folder))
        write_headers(self.snapshot, missing, into)
        total = format_bytes(sum(self.snapshot.remote(file).size for file in missing))
        say(f"of {total} in {len(missing)} weight files, only the headers were read from the hub")
        return replace(self.options, model=str(into))


def locate(options: EngineOptions, *, with_tokenizer: bool = True) -> Located:
    """Finds model and tokenizer. Of those on the hub the small files are downloaded, those of
    tokenizers where they are wanted. UsageError for what is neither a folder nor on the hub, is
    gated or lacks the revision; CheckpointError where the hub cannot be reached."""
    if options.tokenizer is None and options.tokenizer_revision is not None:
        raise UsageError("tokenizer-revision: allowed with a tokenizer on the hub (org/name)")
    files = SMALL_FILES if with_tokenizer else CONFIGURATION
    model = _find("revision", options.model, options.revision, files)
    found = replace(options, revision=None, tokenizer_revision=None)
    if model is not None:
        found = replace(found, model=str(model.folder))
    if options.tokenizer is not None and with_tokenizer:
        given = options.tokenizer_revision
        tokenizer = _find("tokenizer-revision", options.tokenizer, given, SMALL_FILES)
        if tokenizer is not None:
            found = replace(found, tokenizer=str(tokenizer.folder))
    return Located(found, model)


def identity_of(folder: Path) -> str:
    """What tells a checkpoint from others: org/name@commit of one in huggingface_hub's cache, also
    before its weights are here, else a digest."""
    found = _CACHED.fullmatch("/".join(folder.resolve().parts[-3:]))
    return checkpoint_stamp(folder) if found is None else f"{model_name(folder)}@{found[1]}"


def _find(flag: str, name: str, revision: str | None, files: Sequence[str]) -> Snapshot | None:
    """None for the demo model and for a folder, which wins over a repository of its name."""
    found = None
    if name != DEMO and not Path(name).expanduser().exists():
        found = _NAME.fullmatch(name)
    if found is None:
        resolve_model(name, what=flag.removesuffix("revision").removesuffix("-") or "model")
        if revision is not None:
            raise UsageError(f"{flag}: got {revision!r}, allowed with a name on the hub (org/name)")
        return None
    if revision is not None and found[2] not in (None, revision):
        raise UsageError(f"{flag}: got {revision!r} beside {name!r}, allowed one of the two")
    return Hub(found[1], found[2] or revision).open(files)

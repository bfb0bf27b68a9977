"""One repository on the Hugging Face hub, as huggingface_hub reaches it: its cache, its variables,
its errors in one line. Imports it only where a repository is asked for."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any, NamedTuple

from windlass.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE
from windlass.errors import CheckpointError, UsageError, WindlassError
from windlass.options import read_config
from windlass.version import VERSION

CONFIGURATION = ["*config.json", INDEX_FILE]
# With tokenizers and templates: all that is small and may be needed
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
_NOT_NEEDED = [
    "*/*.json", "*/*.model", "*/*.tiktoken", "*/*.txt", "*.bin.index.json", "consolidated*",
]  # fmt: skip
_OTHER_WEIGHTS = (".gguf", ".bin", ".pt", ".pth", ".h5", ".msgpack")
_PASSING = (408, 429, 500, 502, 503, 504)  # answers that may be others a little later

_logger = logging.getLogger(__name__)


class RemoteFile(NamedTuple):
    """`sha256`: None for a small file, which git keeps itself."""

    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A commit of a repository. `folder`: its place in huggingface_hub's cache, where the small
    files are. `files`: all that the hub has, by name; None where the hub was not reached."""

    repo: str
    commit: str
    folder: Path
    files: Mapping[str, RemoteFile] | None

    def weights(self) -> list[str]:
        """The weight files: those of the index, else the one. UsageError where there is none."""
        named = {SINGLE_FILE}
        if (self.folder / INDEX_FILE).exists():
            weight_map = read_config(self.folder, INDEX_FILE).get("weight_map")
            values = weight_map.values() if isinstance(weight_map, dict) else ()
            named = {file for file in values if isinstance(file, str)}
        found = sorted(named if self.files is None else named & self.files.keys())
        if not found:
            others = {Path(file).suffix for file in self.files or ()} & {*_OTHER_WEIGHTS}
            raise UsageError(
                f"{self.repo}: found {', '.join(sorted(others)) or 'no weights'}, expected"
                f" {SINGLE_FILE} or {INDEX_FILE} (only safetensors checkpoints are read)"
            )
        return found

    def missing(self) -> list[str]:
        """Of the weight files, those that are not in the cache. CheckpointError where there are
        some and the hub was not reached."""
        weights = self.weights()
        missing = [file for file in weights if not (self.folder / file).exists()]
        if missing and self.files is None:
            raise CheckpointError(
                f"{self.repo}: the hub was not reached, and {len(missing)} of {len(weights)} weight"
                f" files are not in the cache ({missing[0]})"
            )
        return missing

    def remote(self, file: str) -> RemoteFile:
        assert self.files is not None, "what is missing is known from the hub"
        return self.files[file]

    def blob(self, sha256: str) -> Path:
        """Where huggingface_hub keeps a content of this repository."""
        return self.folder.parents[1] / "blobs" / sha256


class Hub:
    """The hub, for one repository and revision. UsageError where huggingface_hub is missing."""

    def __init__(self, repo: str, revision: str | None = None) -> None:
        try:
            import huggingface_hub
            import huggingface_hub.constants
            import huggingface_hub.errors
            import huggingface_hub.utils
        except ImportError as error:
            raise UsageError(
                f"model: got {repo!r}, no folder here; what is on the hub needs huggingface_hub"
                f" ({error}): pip install huggingface_hub"
            ) from error
        self.library: Any = huggingface_hub  # its types say less than its documents
        self._repo = repo
        self._revision = revision
        self._own = {"library_name": "windlass", "library_version": VERSION}
        self._headers = self.library.utils.build_hf_headers(**self._own)

    def open(self, patterns: Sequence[str]) -> Snapshot:
        """The commit that the revision is now, with the small files that `patterns` name. Where the
        hub does not answer, what the cache has, with a warning."""
        info = failure = None
        with self.reporting():
            try:
                info = self.library.HfApi(**self._own).model_info(
                    self._repo, revision=self._revision, files_metadata=True
                )
            except self.library.errors.RevisionNotFoundError:
                raise
            except Exception as error:  # noqa: BLE001  # told below, where the cache has nothing
                failure = error
            try:
                folder = self._download(patterns, is_local=failure is not None)
            except self.library.errors.LocalEntryNotFoundError as error:
                raise (failure or error) from None
        if info is None:
            if not self.library.constants.HF_HUB_OFFLINE:
                self._warn(folder.name, failure)
            return Snapshot(self._repo, folder.name, folder, None)
        if folder.name != info.sha:
            raise CheckpointError(f"{self._repo}: was changed while it was looked at; try again")
        files = {
            one.rfilename: RemoteFile(one.size or 0, one.lfs.sha256 if one.lfs else None)
            for one in info.siblings or ()
        }
        return Snapshot(self._repo, folder.name, folder, files)

    def _download(self, patterns: Sequence[str], *, is_local: bool) -> Path:
        class Bar(self.library.utils.tqdm):  # type: ignore[misc, name-defined]
            """huggingface_hub's, on terminals alone."""

            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **{**options, "disable": None})

        folder = self.library.snapshot_download(
            self._repo,
            revision=self._revision,
            allow_patterns=list(patterns),
            ignore_patterns=_NOT_NEEDED,
            local_files_only=is_local,
            tqdm_class=Bar,
            **self._own,
        )
        return Path(folder)

    def _warn(self, commit: str, failure: Exception | None) -> None:
        _logger.warning(
            "%s: going on with commit %s of the cache: %s", self._repo, commit, _in_a_line(failure)
        )

    @contextmanager
    def stream(self, commit: str, file: str, begin: int, end: int) -> Iterator[Any]:
        """The answer to a request for these bytes; the whole file (status 200) where the server
        does not know ranges."""
        wanted = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        with self.library.utils.get_session().stream(
            "GET",
            self.library.hf_hub_url(self._repo, file, revision=commit),
            headers={**self._headers, **wanted},
            timeout=self.library.constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:
            self.library.utils.hf_raise_for_status(response)
            yield response

    def link(self, commit: str, file: str) -> None:
        """Puts a file into the snapshot's folder; where its content is in the cache, a link."""
        self.library.hf_hub_download(self._repo, file, revision=commit, **self._own)

    def is_passing(self, error: Exception) -> bool:
        """Whether the same request may succeed a little later."""
        answered = self.library.errors.HfHubHTTPError
        if isinstance(error, answered):
            return error.response.status_code in _PASSING
        return isinstance(error, answered.__bases__[0])  # of the HTTP library, whichever it is

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """What goes wrong, in one line."""
        try:
            yield
        except WindlassError:
            raise
        except Exception as error:
            raise self._reported(error) from error

    def _reported(self, error: Exception) -> WindlassError:
        errors, constants = self.library.errors, self.library.constants
        repo, where = self._repo, f"{constants.ENDPOINT}/{self._repo}"
        if isinstance(error, errors.GatedRepoError):
            return UsageError(
                f"{repo}: is gated: accept its terms at {where}, and give a token of that account"
                " (HF_TOKEN, or hf auth login)"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return UsageError(f"{repo}: got revision {self._revision!r}, which {where} has not")
        if isinstance(error, errors.RepositoryNotFoundError):
            return UsageError(
                f"{repo}: neither a folder here nor a repository on {constants.ENDPOINT}, unless a"
                " private one (HF_TOKEN)"
            )
        if isinstance(error, OSError) and error.errno == ENOSPC:
            return CheckpointError(f"{repo}: no room left on the disk of {constants.HF_HUB_CACHE}")
        if constants.HF_HUB_OFFLINE:
            return CheckpointError(
                f"{repo}{f' at {self._revision!r}' if self._revision else ''}: neither a folder"
                " here nor, as far as needed, in the cache"
                f" {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set"
            )
        return CheckpointError(
            f"{repo}: no folder here, and cannot be had from {constants.ENDPOINT}:"
            f" {_in_a_line(error)}; the same command tries again, and goes on with what came"
        )


def _in_a_line(error: Exception | None) -> str:
    lines = str(error).split("\n")
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)

"""Files that clients have uploaded and that batches have written: content and what is known of it,
side by side in one folder, safe against kill -9. Any thread may ask."""

import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from windlass.errors import UsageError
from windlass.files import replace_file, sync_folder

MOST_FILES = 10_000
_PART = ".part"


def new_id(prefix: str) -> str:
    """An id that was never given."""
    return prefix + secrets.token_hex(12)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """`number` grows with each file. Moments in seconds since 1970; `expires_at`: it is gone from
    then on, None for never."""

    id: str
    number: int
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None = None

    def shown(self) -> dict[str, Any]:
        """OpenAI's shape."""
        return {
            "id": self.id, "object": "file", "bytes": self.bytes, "created_at": self.created_at,
            "expires_at": self.expires_at, "filename": self.filename, "purpose": self.purpose,
            "status": "processed", "status_details": None,
        }  # fmt: skip


class StoreFull(Exception):
    """All files together would be larger than they may be."""


class Upload:
    """A file that is being written. A context manager: what was not kept is deleted. `count`: is
    told of bytes before they are written, and of those that are counted elsewhere, or gone."""

    def __init__(self, path: Path, count: Callable[[int], None]) -> None:
        self.path = path
        self.num_bytes = 0
        self._count = count
        self._file = path.open("wb")

    def __enter__(self) -> "Upload":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)
        self._count(-self.num_bytes)

    def write(self, data: bytes) -> None:
        """Raises OSError, StoreFull."""
        self._count(len(data))
        self.num_bytes += len(data)
        self._file.write(data)

    def end(self) -> None:
        """All of it is on the disk. Raises OSError."""
        self._file.flush()
        os.fsync(self._file.fileno())


class FileStore:
    """The files in `folder`, `most` at once. What a kill left unfinished is deleted. `most_bytes`:
    of all together, uploads under way and what batches have written among them; only uploads are
    refused."""

    def __init__(self, folder: Path, *, most: int = MOST_FILES, most_bytes: int) -> None:
        self._folder = folder
        self._most = most
        self._most_bytes = most_bytes
        self._coming_bytes = 0  # of uploads under way
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {
            found.id: found
            for found in (StoredFile(**json.loads(p.read_bytes())) for p in folder.glob("*.json"))
        }
        self._held_bytes = sum(one.bytes for one in self._files.values())
        self._last_number = max((one.number for one in self._files.values()), default=0)
        for path in folder.iterdir():
            if path.suffix != ".json" and path.name not in self._files:
                path.unlink()

    def begin(self) -> Upload:
        """Raises UsageError where there are too many files, OSError."""
        self._refuse_more()
        return Upload(self._folder / (new_id("") + _PART), self._count)

    def check_room(self, num_bytes: int) -> None:
        """Raises StoreFull where an upload has no room for so many more."""
        wanted = self._held_bytes + self._coming_bytes + num_bytes
        if num_bytes > 0 and wanted > self._most_bytes:
            raise StoreFull(
                f"files: got {num_bytes} bytes more, which makes {wanted} of all, allowed"
                f" {self._most_bytes} (--max-stored-size); delete some"
            )

    def keep(
        self,
        path: Path,
        *,
        filename: str,
        purpose: str,
        file_id: str | None = None,
        lives_s: int | None = None,
    ) -> StoredFile:
        """Moves the file at `path`, which is durable, into the store. `file_id`: whatever had it is
        replaced. Raises OSError, UsageError where there are too many."""
        if file_id is None:
            self._refuse_more()
        with self._lock:
            now = int(time.time())
            self._last_number += 1
            found = StoredFile(
                id=file_id or new_id("file-"),
                number=self._last_number,
                filename=filename,
                purpose=purpose,
                bytes=path.stat().st_size,
                created_at=now,
                expires_at=None if lives_s is None else now + lives_s,
            )
            path.replace(self.path(found.id))
            sync_folder(self._folder)
            replace_file(self._meta(found.id), json.dumps(asdict(found)).encode())
            self._forget(found.id)
            self._files[found.id] = found
            self._held_bytes += found.bytes
            return found

    def get(self, file_id: str) -> StoredFile | None:
        """None where there is none, or no more."""
        found = self._files.get(file_id)
        return None if found is None or _is_over(found) else found

    def all(self) -> list[StoredFile]:
        """The newest first."""
        with self._lock:
            found = [one for one in self._files.values() if not _is_over(one)]
        return sorted(found, key=lambda one: -one.number)

    def path(self, file_id: str) -> Path:
        """Its content."""
        return self._folder / file_id

    def delete(self, file_id: str) -> None:
        """Raises OSError. A reader that has it open reads on."""
        with self._lock:
            self._meta(file_id).unlink(missing_ok=True)
            self.path(file_id).unlink(missing_ok=True)
            self._forget(file_id)

    def expired(self) -> list[str]:
        """What may be deleted."""
        with self._lock:
            return [one.id for one in self._files.values() if _is_over(one)]

    def _meta(self, file_id: str) -> Path:
        return self._folder / f"{file_id}.json"

    def _forget(self, file_id: str) -> None:
        if (found := self._files.pop(file_id, None)) is not None:
            self._held_bytes -= found.bytes

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.check_room(num_bytes)
            self._coming_bytes += num_bytes

    def _refuse_more(self) -> None:
        if len(self._files) >= self._most:
            raise UsageError(
                f"files: there are {len(self._files)}, allowed {self._most}; delete some"
            )


def _is_over(file: StoredFile) -> bool:
    return file.expires_at is not None and file.expires_at <= time.time()

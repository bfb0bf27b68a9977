"""What is known of a server's batches, on the disk before anybody is told. Any thread may ask and
change. Knows no rows and no engine."""

import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from windlass.errors import RequestError, UsageError
from windlass.server.batch_record import Batch, BatchWish, Status
from windlass.server.file_store import FileStore, new_id

MOST_BATCHES = 10_000


class BatchBook:
    """The batches in `folder`, over the files of `files`. `changed`: told of each change; it guards
    them all."""

    def __init__(self, folder: Path, files: FileStore) -> None:
        self._folder = folder
        self._files = files
        self.changed = threading.Condition()
        folder.mkdir(parents=True, exist_ok=True)
        found = (Batch.read(path) for path in folder.glob("*.json"))
        self._batches = {one.id: one for one in sorted(found, key=lambda one: one.number)}
        for path in folder.iterdir():
            batch = self._batches.get(path.name)
            if path.is_dir() and (batch is None or not batch.is_open):
                shutil.rmtree(path)  # the server was killed before it did

    def create(self, wish: BatchWish) -> Batch:
        """Raises RequestError, UsageError where there are too many, OSError."""
        file = self._files.get(wish.input_file_id)
        if file is None or file.purpose != "batch":
            got = "no such file" if file is None else f"a file with purpose {file.purpose!r}"
            raise RequestError(
                f"input_file_id: got {got}, allowed a file with purpose 'batch'",
                param="input_file_id",
            )
        with self.changed:
            if len(self._batches) >= MOST_BATCHES:
                raise UsageError(f"batches: there are {len(self._batches)}, allowed {MOST_BATCHES}")
            now = int(time.time())
            batch = Batch(
                id=new_id("batch_"),
                number=max((one.number for one in self._batches.values()), default=0) + 1,
                wish=wish,
                created_at=now,
                expires_at=now + wish.window_s,
                status=Status.VALIDATING,
                output_file_id=new_id("file-"),
                error_file_id=new_id("file-"),
            )
            self._put(batch)
        return batch

    def get(self, batch_id: str) -> Batch | None:
        return self._batches.get(batch_id)

    def all(self) -> list[Batch]:
        """The newest first."""
        with self.changed:
            return list(self._batches.values())[::-1]

    def open(self) -> list[Batch]:
        """Those that have not ended, the oldest first."""
        with self.changed:
            return [one for one in self._batches.values() if one.is_open]

    def uses(self, file_id: str) -> Batch | None:
        """The batch that has not ended and reads this file."""
        users = (one for one in self.open() if one.wish.input_file_id == file_id)
        return next(users, None)

    def cancel(self, batch_id: str) -> Batch:
        """Raises RequestError where it is too late, OSError."""
        with self.changed:
            batch = self._batches[batch_id]
            if batch.status in (Status.VALIDATING, Status.IN_PROGRESS):
                return self.become(batch_id, Status.CANCELLING)
            if batch.status is not Status.CANCELLING:
                raise RequestError(f"Cannot cancel a batch with status '{batch.status}'.")
            return batch

    def become(self, batch_id: str, status: Status, **more: Any) -> Batch:
        """Raises OSError."""
        with self.changed:
            batch = self._batches[batch_id]
            moments = {**batch.moments, status: int(time.time())}
            batch = replace(batch, status=status, moments=moments, **more)
            self._put(batch)
            return batch

    def count(self, batch_id: str, *, total: int, ok: int, bad: int) -> None:
        """How far its rows are. Not on the disk: the job's journal says it."""
        with self.changed:
            batch = self._batches[batch_id]
            self._batches[batch_id] = replace(batch, total=total, ok=ok, bad=bad)

    def work_folder(self, batch: Batch) -> Path:
        """Where its job is, until it has ended."""
        return self._folder / batch.id

    def stats(self) -> dict[str, Any]:
        """Batches by status; rows of those that have not ended."""
        with self.changed:
            by_status = Counter(one.status for one in self._batches.values())
        left = self.open()
        return {
            "by_status": {str(status): by_status[status] for status in Status},
            "rows": {
                "left": sum(one.total - one.ok - one.bad for one in left),
                "completed": sum(one.ok for one in left),
                "failed": sum(one.bad for one in left),
            },
        }

    def _put(self, batch: Batch) -> None:
        batch.write(self._folder / f"{batch.id}.json")
        self._batches[batch.id] = batch
        self.changed.notify_all()

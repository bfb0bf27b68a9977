"""The files of results that a job ends with."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

from windlass.batch.job_options import JobOptions
from windlass.batch.journal import JournalState, write_error
from windlass.files import sync_folder, temporary_file


def write_output(options: JobOptions, lines: Iterator[tuple[JournalState, bytes]]) -> None:
    """Each file appears whole or not at all. Raises JobError."""
    targets = [options.output_file]
    if options.error_file is not None:
        targets.append(options.error_file)
    temporary = [temporary_file(target) for target in targets]
    try:
        with ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context(path.open("wb")) for path in temporary]
            for state, line in lines:
                files[0 if state is JournalState.OK else -1].write(line)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for path, target in zip(temporary, targets, strict=True):
            path.replace(target)
            sync_folder(target.resolve().parent)
    except OSError as error:
        for path in temporary:
            path.unlink(missing_ok=True)
        raise write_error(options.output_file, error) from error

"""What an actor of Ray Data runs: the actor of run-batch, and tables of rows through it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from windlass.batch.jobfile import read_line
from windlass.errors import RequestError
from windlass.ray.actors import actor_class
from windlass.ray.data_rows import ERROR, REQUEST, answered, failed
from windlass.ray.messages import ReplicaSpec
from windlass.ray.row_feed import RowFeed


class EngineStage:
    """Adds the columns of answers to tables, several of which are under way at once. `raises`:
    RequestError for the first row without an answer, instead of a word in its ERROR column.
    `cpus`: what Ray gives an actor."""

    def __init__(self, spec: ReplicaSpec, *, raises: bool, cpus: float) -> None:
        replica = actor_class()(cpus)
        replica.open(spec)
        self._feed = RowFeed(replica)
        self._raises = raises

    async def __call__(self, table: Any) -> AsyncIterator[Any]:
        """`table`: of pyarrow, whose other columns come out as they came in."""
        if table.num_rows == 0:
            yield table
            return
        given = zip(*(table.column(name).to_pylist() for name in (REQUEST, ERROR)), strict=True)
        rows = await asyncio.gather(*(self._answer(line, error) for line, error in given))
        taken = {REQUEST, *rows[0]}
        table = table.drop_columns([name for name in table.column_names if name in taken])
        for name in rows[0]:
            table = table.append_column(name, [[row[name] for row in rows]])
        yield table

    def close(self) -> None:
        self._feed.close()

    async def _answer(self, line: str, error: str) -> dict[str, Any]:
        if error:
            columns = failed(error)
        else:
            row = read_line(line.encode(), 0)
            ended = await asyncio.wrap_future(self._feed.submit(row))
            columns = answered(ended.line)
        if self._raises and columns[ERROR]:
            raise RequestError(columns[ERROR])
        return columns

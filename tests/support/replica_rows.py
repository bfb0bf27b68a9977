"""What a replica makes of some rows."""

from collections.abc import Sequence

from windlass.batch.jobfile import JobRow
from windlass.ray.messages import EndedRow
from windlass.ray.replica import Replica


def computed(replica: Replica, rows: Sequence[JobRow]) -> list[EndedRow]:
    """Their results, in their order, of one that has no rows under way. Their indices differ."""
    found = {one.index: one for one in replica.exchange(rows, 0).ended}
    while len(found) < len(rows):
        found.update({one.index: one for one in replica.exchange((), 1.0).ended})
    return [found[row.index] for row in rows]

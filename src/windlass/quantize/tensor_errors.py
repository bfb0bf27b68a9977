"""What is printed of a quantised checkpoint: one line per tensor, experts of a layer and projection
on one, then a table by kind. Knows records, no tensors."""

import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from windlass.units import counted

Record = Mapping[str, Any]

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def tensor_lines(records: Sequence[Record], *, verbose: bool) -> Iterator[str]:
    """Relative RMS error and largest error of each tensor. Experts share a line, with their median
    and the worst of them, unless `verbose`."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        name = record["tensor"]
        groups.setdefault(name if verbose else _EXPERT.sub(".experts.*.", name), []).append(record)
    for name, group in groups.items():
        if "kept" in group[0]:
            yield f"{name}: kept: {group[0]['kept']}"
        elif len(group) == 1:
            error, most = group[0]["relative_rms_error"], group[0]["max_error"]
            yield f"{name}: error {error:.3g}, largest {most:.3g}"
        else:
            yield f"{name}: {_spread(group)}"


def kind_lines(records: Sequence[Record]) -> Iterator[str]:
    """A table: kind of tensor, how many, median and worst error."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        if "kept" not in record:
            kinds.setdefault(record["kind"], []).append(record)
    width = max([len(kind) for kind in kinds], default=0)
    yield f"{'tensors':{width}}  number  median error   worst  largest error"
    for kind, group in sorted(kinds.items()):
        errors = [record["relative_rms_error"] for record in group]
        most = max(record["max_error"] for record in group)
        yield (
            f"{kind:{width}}  {len(group):6}  {median(errors):12.3g}  {max(errors):6.3g}"
            f"  {most:13.3g}"
        )


def _spread(group: Sequence[Record]) -> str:
    errors = [record["relative_rms_error"] for record in group]
    worst = max(group, key=lambda record: record["relative_rms_error"])
    match = _EXPERT.search(worst["tensor"])
    assert match is not None, "only experts share a line"
    most = max(record["max_error"] for record in group)
    return (
        f"{counted(len(group), 'expert')}, error {median(errors):.3g} median, {max(errors):.3g}"
        f" worst"
        f" (expert {match[1]}), largest {most:.3g}"
    )

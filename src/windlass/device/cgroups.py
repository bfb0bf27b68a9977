"""Control groups of this process, of either version: where the kernel keeps their limits."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Group(NamedTuple):
    """`folder`: of its files. `is_v1`: which version names them."""

    folder: Path
    is_v1: bool


def groups_of(controller: str, proc: Path = PROC) -> Iterator[Group]:
    """This process's group of a controller and all above, as far as they are mounted here; in a
    container, its own group is often the topmost."""
    mine = _own_groups(proc)
    for line in lines_of(proc / "self/mountinfo"):
        before, _, after = line.partition(" - ")
        root, mount = (_unescaped(word) for word in before.split()[3:5])
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup2":
            path = mine.get("")
        elif kind == "cgroup" and controller in options.split(","):
            path = mine.get(controller)
        else:
            continue
        inside = Path(path).parts[1:] if path and _is_under(path, root) else ()
        names = inside[len(Path(root).parts) - 1 :]
        for count in range(len(names), -1, -1):
            yield Group(Path(mount).joinpath(*names[:count]), kind == "cgroup")


def _own_groups(proc: Path) -> dict[str, str]:
    """Path of this process's group by controller; version 2 has the name ""."""
    groups = {}
    for line in lines_of(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), path))
    return groups


def _is_under(path: str, root: str) -> bool:
    """Whether the group `path` can be seen in a mount that begins at `root`. Outside of its own
    namespace a group has a path with `..`."""
    return ".." not in Path(path).parts and Path(path).is_relative_to(root)


def _unescaped(word: str) -> str:
    """mountinfo writes blanks as octal."""
    return word.replace("\\040", " ")


def lines_of(path: Path) -> list[str]:
    """Empty where there is no such file."""
    return path.read_text().splitlines() if path.exists() else []


def number_of(path: Path) -> int | None:
    """None where the file is absent or says `max`."""
    text = path.read_text().strip() if path.exists() else "max"
    return None if text == "max" else int(text)

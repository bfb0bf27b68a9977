"""The changelog: the form of Keep a Changelog, and the version that the package has."""

import re
from itertools import pairwise
from pathlib import Path

from windlass.version import VERSION

FILE = Path(__file__).parent.parent / "CHANGELOG.md"
RELEASE = re.compile(r"## \[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d{2}-\d{2})")
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
LINES = FILE.read_text(encoding="utf-8").splitlines()
HEADINGS = [line for line in LINES if line.startswith("## ")]


def test_the_newest_release_is_the_version_of_the_package() -> None:
    assert HEADINGS[0] == "## [Unreleased]"
    newest = RELEASE.fullmatch(HEADINGS[1])
    assert newest and ".".join(newest.group(1, 2, 3)) == VERSION


def test_releases_are_dated_and_in_order() -> None:
    found = [RELEASE.fullmatch(heading) for heading in HEADINGS[1:]]
    assert all(found), HEADINGS
    releases = [(tuple(map(int, m.group(1, 2, 3))), m[4]) for m in found if m]
    for (later, later_day), (earlier, earlier_day) in pairwise(releases):
        assert later > earlier and later_day >= earlier_day


def test_every_line_stands_under_a_kind_of_change() -> None:
    """Kinds come once per release, in their order; what is under them is a list of short lines."""
    seen: list[str] = []
    for line in LINES[LINES.index(HEADINGS[0]) :]:
        if line.startswith("## "):
            seen = []
        elif line.startswith("#"):
            assert line.startswith("### ") and line[4:] in KINDS, line
            seen.append(line[4:])
            assert seen == sorted(set(seen), key=KINDS.index), (line, seen)
        elif line and not line.startswith("["):  # links at the end
            assert bool(seen) == line.startswith(("- ", "  ")), line  # before the first: a summary
            assert len(line) <= 100, line

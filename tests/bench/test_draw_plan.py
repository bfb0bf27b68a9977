"""The picture of a plan: well-formed, with every point on the roof that it names, and bars inside
the pass, from the very line that `windlass plan --json` prints."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from devices import quick_search
from windlass.checkpoint.synthetic import preset
from windlass.cli import main as windlass
from windlass.runtime.clock import Span

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import draw_plan

_SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration without weights."""
    found = tmp_path_factory.mktemp("plan")
    config = preset("olmoe-1b-7b", num_layers=4)
    (found / "config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(scope="module")
def printed(folder):
    """What the command prints for a laptop with room for a part of the weights."""
    lengths = ["--prompt-len", "64", "--output-len", "16", "--num-requests", "32"]
    where = ["-m", str(folder), "--machine", "laptop", "--host-memory", "2GiB"]
    with pytest.MonkeyPatch.context() as patch, quick_search():
        said: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(words)))
        assert windlass(["plan", *where, *lengths, "--json"]) == 0
    return said[-1]


@pytest.fixture(scope="module")
def planned(folder, printed):
    return draw_plan.read(json.loads(printed), str(folder), "laptop")


def test_points_lie_on_the_lowest_roof(planned):
    found = list(draw_plan.points(planned))
    roofs, peak = draw_plan.roofs(planned), draw_plan.peak(planned)
    assert {point.source for point in found} == {"host", "disk"}
    assert len({point.label for point in found}) == len(found) == 6
    for point in found:
        assert point.rate == pytest.approx(min(peak, roofs[point.source] * point.intensity))


def test_bars_are_what_the_lanes_do_within_the_pass(planned):
    found, seconds, title = draw_plan.bars(planned)
    assert {bar.lane for bar in found} == set(draw_plan.LANES) and "4 of 4 layers" in title
    for lane in draw_plan.LANES:
        own = [bar for bar in found if bar.lane == lane]
        assert all(0 <= bar.begin < bar.end <= seconds for bar in own)
        ends = [bar.end for bar in own]
        assert all(a <= b.begin + 1e-12 for a, b in zip(ends, own[1:], strict=False))


def test_short_bars_of_one_kind_are_joined():
    spans = [Span("disk", "expert", i * 1e-5, i * 1e-5 + 9e-6) for i in range(100)]
    spans += [Span("disk", "head", 0.5, 0.6), Span("link", "expert", 0.0, 1.0)]
    found = draw_plan.join(spans, 0.0, 1.0)
    assert [bar.label for bar in found] == ["expert", "head"]
    assert found[0].end == spans[99].end


@pytest.mark.parametrize("ending", ["svg", "html"])
def test_the_command_draws_both_pictures(folder, printed, tmp_path, ending):
    plan, picture = tmp_path / "plan.json", tmp_path / f"plan.{ending}"
    plan.write_text(printed)
    draw_plan.main([str(plan), str(picture), "-m", str(folder), "--machine", "laptop"])
    text = picture.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    drawn = root if ending == "svg" else root.find(f".//{_SVG}svg")
    assert drawn is not None
    width, height = float(drawn.get("width", "")), float(drawn.get("height", ""))
    circles = drawn.findall(f".//{_SVG}circle")
    assert len(circles) == 6 and len(drawn.findall(f".//{_SVG}polyline")) == 2
    for circle in circles:
        assert 0 < float(circle.get("cx", "")) < width and 0 < float(circle.get("cy", "")) < height
    with pytest.raises(SystemExit):
        draw_plan.main([str(plan), "plan.png", "-m", str(folder), "--machine", "laptop"])

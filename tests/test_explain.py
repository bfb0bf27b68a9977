"""What `windlass plan` says: tiers that add up, sentences that follow the numbers, pictures, and
the command on checkpoints, configurations and machines that one does not have."""

import json
import math
import re
import sys
import types
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from engines import make_model
from machines import machine
from planning import few_layers
from published import PUBLISHED
from windlass.cli import main
from windlass.cli.engine_flags import refuse_known
from windlass.cli.plan import COMMAND
from windlass.errors import BudgetError, UsageError
from windlass.model import read_model, sizes_of
from windlass.options import EngineOptions
from windlass.planner.activations import Backend
from windlass.planner.budget import Wanted
from windlass.planner.explain import Explanation, explain, weight_bytes
from windlass.planner.roofline import machine_of
from windlass.plot.chart import Axis, Bar, Chart, Line, Panel, Point
from windlass.plot.files import check_plot, save_chart
from windlass.plot.pictures import bars_of, chart_of, operating_points, roofline_panel
from windlass.plot.svg import ticks, to_html, to_svg
from windlass.schedule.clock import Span
from windlass.units import GIB, MIB
from windlass.workload import Workload


@pytest.fixture(scope="module", autouse=True)
def fast():
    """What is said follows from an estimate, however many layers it rests on."""
    with few_layers():
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """OLMoE-1B-7B by its configuration alone: 12.9 GiB of weights."""
    folder = tmp_path_factory.mktemp("config")
    folder.joinpath("config.json").write_text(
        json.dumps({"model_type": "olmoe", **PUBLISHED["olmoe"][0]})
    )
    return folder


@pytest.fixture(scope="module")
def olmoe(config):
    from contextlib import ExitStack

    options = EngineOptions(model=str(config), load_format="dummy")
    model = read_model(options, ExitStack())
    sizes = sizes_of(model, options, Backend("cpu", 2))
    return model.spec, replace(sizes, process_bytes=400 * MIB)


WORK = Workload.from_lengths(128, 32, 64)


@pytest.fixture(scope="module")
def found(olmoe) -> Explanation:
    spec, sizes = olmoe
    return explain(spec, sizes, machine(), WORK, 4 * GIB, Wanted())


# --- explanations ---------------------------------------------------------------------------------


def test_tiers_add_up(found, olmoe):
    _, sizes = olmoe
    host, disk = found.tiers
    assert host.used == found.best.plan.total_bytes <= host.budget == 4 * GIB
    assert disk.used == sum(weight_bytes(sizes).values()) > 12 * GIB
    kept = sum(size for name, size in host.holds.items() if " of " in name)
    assert kept == disk.holds["weights also in memory"] > 0


def test_more_memory_brings_what_a_search_with_it_brings(found, olmoe):
    spec, sizes = olmoe
    richer = explain(spec, sizes, machine(), WORK, 5 * GIB, Wanted())
    assert found.more_host_s == richer.best.estimate.total_s < found.best.estimate.total_s
    text = "\n".join(found.lines())
    saved = found.best.estimate.total_s - found.more_host_s
    share = 100 * saved / found.best.estimate.total_s
    assert f"one more GiB of host memory would save {saved:.2f} s ({share:.0f} %)" in text or (
        f"({share:.0f} %)" in text
    )
    rich = explain(spec, sizes, machine(), WORK, 64 * GIB, Wanted())
    assert "one more GiB of host memory would bring nothing" in rich.lines()
    assert rich.tiers[1].holds["weights read"] == 0


def test_the_best_comes_first_and_three_follow(found):
    times = [one.estimate.total_s for one in (found.best, *found.alternatives)]
    assert times == sorted(times) and len(times) == 4
    assert len({one.plan for one in (found.best, *found.alternatives)}) == 4
    lines = found.lines()
    at = lines.index("alternatives, the best first:")
    assert [line.startswith("  ") for line in lines[at + 1 :]] == [True] * 3


def test_a_slow_disk_binds_and_a_slow_host_does(olmoe):
    spec, sizes = olmoe
    plain = machine()
    for rate, binds in ((1e7, "disk"), (1e13, "host")):
        disk = replace(plain.disk, points=((1 << 20, rate), (4 << 20, 2 * rate)))
        one = explain(spec, sizes, replace(plain, disk=disk), WORK, 4 * GIB, Wanted())
        assert any(line.startswith(f"binds: {binds};") for line in one.lines())


def test_what_prompts_share_is_said(found):
    assert "128 tokens in and 32 out" in found.lines()[2]
    shared = replace(found, workload=replace(WORK, shared_tokens=(0,) + (64,) * 63))
    assert "128 tokens in (63 of them computed by earlier ones) and 32 out" in shared.lines()[2]
    assert shared.to_json()["workload"]["shared_prompt_tokens"] == 63 * 64


def test_json_has_the_numbers_and_a_plan_to_replay(found):
    document = json.loads(json.dumps(found.to_json()))
    assert document["plan"] == found.best.plan.to_json()
    assert document["estimate"]["total_s"] == found.best.estimate.total_s
    saves = document["one_more_gib"]["host"]["saves_s"]
    assert saves == pytest.approx(found.best.estimate.total_s - found.more_host_s)
    assert [tier["name"] for tier in document["tiers"]] == ["host", "disk"]
    assert len(document["alternatives"]) == 3 and document["workload"]["num_sequences"] == 64


def test_nothing_that_fits_is_refused(olmoe):
    spec, sizes = olmoe
    with pytest.raises(BudgetError, match="at least"):
        explain(spec, sizes, machine(), WORK, 500 * MIB, Wanted())


# --- pictures -------------------------------------------------------------------------------------


def test_points_lie_on_their_roofs(found, olmoe):
    spec, sizes = olmoe
    profile, plan = machine(), found.best.plan
    level = machine_of(profile, kind="bfloat16")
    points = {p.label: p for p in operating_points(spec, sizes, plan, level, WORK)}
    decode = points["experts, decode (disk)"]
    assert decode.y == pytest.approx(decode.x * profile.disk.best)  # the disk is its roof
    assert decode.y < points["experts, mixed (disk)"].y <= 1e11
    # fewer bytes from the disk where memory holds more of them
    more = replace(plan, expert_slots=plan.num_experts // 2)
    other = {p.label: p for p in operating_points(spec, sizes, more, level, WORK)}
    held = plan.expert_slots / plan.num_experts
    ratio = other["experts, decode (disk)"].x / decode.x
    assert ratio == pytest.approx((1 - held) / 0.5)
    whole = replace(plan, expert_slots=plan.num_experts)
    labels = [p.label for p in operating_points(spec, sizes, whole, level, WORK)]
    assert "experts, decode (host)" in labels
    panel = roofline_panel(spec, sizes, plan, profile, WORK)
    for line in panel.lines[1:]:
        (x0, y0), (x1, y1) = line.points
        assert y0 / x0 == pytest.approx(y1 / x1) and y1 == 1e11
    for point in panel.points:
        assert panel.x.low <= point.x <= panel.x.high and panel.y.low < point.y < panel.y.high


def test_a_timeline_shows_both_lanes_of_the_last_pass(found, olmoe):
    spec, sizes = olmoe
    roofline, timeline = chart_of(found, spec, sizes, machine(with_device=True)).panels
    assert len(roofline.lines) == 3  # the host, its memory, the disk: no device is used
    assert {bar.y for bar in timeline.bars} == {0, 1}
    assert all(0 <= bar.begin < bar.end <= timeline.x.high * (1 + 1e-9) for bar in timeline.bars)
    assert any(bar.label == "expert" for bar in timeline.bars if bar.y == 0)
    assert any(bar.label == "attention" for bar in timeline.bars if bar.y == 1)


def test_spans_become_bars():
    spans = [
        Span("disk", "expert[0][1]", 0.0, 1.0), Span("disk", "expert[0][2]", 1.05, 2.0),
        Span("disk", "block[1]", 2.0, 2.5), Span("disk", "expert[1][0]", 2.5, 9.0),
        Span("host", "attention", 1.2, 1.4), Span("host", "attention", 1.9, 2.0),
        Span("up", "copy", 1.0, 2.0), Span("host", "", 8.0, 9.0),
    ]  # fmt: skip
    assert bars_of(spans, 0.5, 4.0, merge_s=0.1) == [
        Bar("expert", 0, 0.0, 1.5), Bar("attention", 1, 0.7, pytest.approx(0.9)),
        Bar("attention", 1, 1.4, 1.5), Bar("block", 0, 1.5, 2.0), Bar("expert", 0, 2.0, 3.5),
    ]  # fmt: skip


CHART = Chart(
    "a <title>",
    (
        Panel(
            title="roofs", x=Axis("x", 0.1, 1000, is_log=True), y=Axis("y", 1, 100, is_log=True),
            lines=(Line("roof & wall", ((0.01, 0.1), (10, 100)), is_dashed=True),),
            points=(Point("here", 1.0, 10.0), Point("far", math.inf, 10.0)),
        ),
        Panel(
            title="lanes", x=Axis("s", 0, 4), y=Axis("lane", -0.5, 1.5, names=("disk", "host")),
            bars=(Bar("read", 0, 0, 3), Bar("work", 1, 1, 4)),
        ),
    ),
    ("line 1 < line 2",),
)  # fmt: skip


def test_svg_is_well_formed_and_to_scale():
    root = ElementTree.fromstring(to_svg(CHART))
    tag = "{http://www.w3.org/2000/svg}"
    circle, far = root.iter(f"{tag}circle")
    # a quarter of four decades from 90 to 750, in the middle of 410 to 70
    assert float(circle.get("cx")) == pytest.approx(90 + 660 / 4)
    assert float(circle.get("cy")) == pytest.approx((70 + 440) / 2)
    assert float(far.get("cx")) == 750
    bars = [rect for rect in root.iter(f"{tag}rect") if rect.find(f"{tag}title") is not None]
    assert [float(bar.get("width")) for bar in bars] == [495, 495]
    texts = {element.text for element in root.iter(f"{tag}text")}
    assert {"a <title>", "roof & wall", "2  far", "disk", "host", "1e1", "read"} <= texts


def test_html_stands_alone():
    page = to_html(CHART)
    assert "line 1 &lt; line 2" in page and page.count("<svg") == 1
    assert not re.search(r"(src|href)=", page)


def test_ticks_are_round():
    assert [name for _, name in ticks(Axis("", 0.1, 100, is_log=True))] == [
        "1e-1", "1e0", "1e1", "1e2"
    ]  # fmt: skip
    assert [place for place, _ in ticks(Axis("", 0, 4))] == [0, 1, 2, 3, 4]
    assert 3 <= len(ticks(Axis("", 0.0, 0.00371))) <= 8


@pytest.mark.parametrize("ending", [".html", ".svg"])
def test_charts_are_written(tmp_path, ending):
    path = tmp_path / f"plan{ending}"
    save_chart(CHART, path)
    assert path.read_text() == (to_html if ending == ".html" else to_svg)(CHART)


def test_plots_that_cannot_be_written_are_refused_at_once(tmp_path, monkeypatch):
    for path, message in (
        (tmp_path / "plan.pdf", "ending in .html, .svg, .png"),
        (tmp_path / "absent" / "plan.svg", "no such folder"),
    ):
        with pytest.raises(UsageError, match=message):
            check_plot(path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"install windlass\[plot\]"):
        check_plot(tmp_path / "plan.png")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        save_chart(CHART, tmp_path / "folder.svg")


def test_png_is_drawn_with_matplotlib(tmp_path, monkeypatch):
    """With a stand-in that notes what it is asked for: it is no dependency of the tests."""
    calls: list[str] = []

    class Anything:
        def __getattr__(self, name):
            def call(*args, **settings):
                calls.append(name)
                if name == "subplots":
                    return self, [[self] for _ in range(args[0])]
                if name == "savefig":
                    args[0].write_bytes(b"png")
                return self

            return call

    pyplot = Anything()
    fake = types.ModuleType("matplotlib")
    fake.use = lambda name: calls.append(name)
    monkeypatch.setitem(sys.modules, "matplotlib", fake)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    save_chart(CHART, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes() == b"png" and calls[0] == "Agg"
    assert calls.count("barh") == 2 and calls.count("plot") == 3 and "set_yscale" in calls


# --- the command ----------------------------------------------------------------------------------


def plan(capsys, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_a_configuration_alone_is_planned_for_every_preset(config, capsys):
    from windlass.hardware.preset import preset_names

    for name in preset_names():
        text = plan(capsys, "-m", str(config), "--machine", name, "--num-requests", "32")
        assert "predicted:" in text and "32 sequences, 512 tokens in and 128 out" in text
        assert ("does not run on it yet" in text) == (name != "laptop")


def test_the_host_memory_of_a_machine_is_the_default_and_a_flag_wins(config, capsys):
    for words, budget in (((), int(0.8 * 16 * GIB)), (("--host-memory", "5GiB"), 5 * GIB)):
        text = plan(capsys, "-m", str(config), "--machine", "laptop", "--json", *words)
        document = json.loads(text)
        assert document["plan"]["host_memory"] == budget
        assert document["plan"]["total_bytes"] <= budget


def test_a_device_is_planned_for_beside_the_host(config, capsys):
    words = ("-m", str(config), "--machine", "t4", "--num-requests", "512", "--json")
    small, whole = (
        json.loads(plan(capsys, *words, *more))["device"]
        for more in (("--device-memory", "6GiB"), ())
    )
    assert small["memory"] == 6 * GIB and small["plan"]["device_bytes"] <= 6 * GIB
    assert small["plan"]["resident"] < whole["plan"]["resident"]
    assert small["plan"]["output_tokens_s"] <= whole["plan"]["output_tokens_s"]
    assert small["device_gain"] >= 0 and whole["plan"]["sequences"] <= 512
    text = plan(capsys, *words[:-1], "--device-memory", "1GiB")
    assert "its memory, or the host's, is too small" in text


def test_what_is_fixed_stays_fixed(config, capsys):
    words = ("--machine", "laptop", "--max-num-seqs", "5", "--kv-cache-dtype", "int8", "--json")
    document = json.loads(plan(capsys, "-m", str(config), *words))
    assert document["plan"]["max_num_seqs"] == 5
    assert document["plan"]["kv_cache_dtype"] == "int8"


def test_a_job_file_is_planned_for_by_its_own_lengths(tmp_path, capsys):
    make_model("qwen3_moe", tmp_path / "model")
    job = tmp_path / "job.jsonl"
    rows = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions",
         "body": {"model": f"name {i % 2}", "prompt": "w1 " * (i + 70), "max_tokens": 4 + i,
                  "n": 1 + (i == 3)}}
        for i in range(4)
    ]  # fmt: skip
    job.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("-m", str(tmp_path / "model"), "--machine", "laptop", "--json")
    work = json.loads(plan(capsys, *words, "--workload", str(job)))["workload"]
    assert work == {
        "num_sequences": 5, "prompt_tokens": 70 + 71 + 72 + 2 * 73, "longest": 80,
        "shared_prompt_tokens": 4 * 64, "output_tokens": 4 + 5 + 6 + 14,
    }  # fmt: skip
    off = plan(capsys, *words, "--workload", str(job), "--no-enable-prefix-caching")
    assert json.loads(off)["workload"] == {**work, "shared_prompt_tokens": 0}
    job.write_text("{}\n")
    assert main(["plan", *words, "--workload", str(job)]) == 2
    assert "no row can run" in capsys.readouterr().err


def test_without_a_machine_this_one_is_measured(tmp_path, monkeypatch, capsys):
    import windlass.doctor.examine as examine

    make_model("qwen3_moe", tmp_path)
    asked = []

    class Report:
        profile = replace(machine(), captured="2026-01-01")
        noise = "noisy machine: very"

    def fake(subject, *, tell):
        asked.append(subject)
        tell("measuring")
        return Report

    monkeypatch.setattr(examine, "examine", fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["plan", "-m", str(tmp_path), "-t", "1", "--moe-backend", "torch",
                 "--num-requests", "3", "--prompt-len", "9", "--output-len", "4"]) == 0  # fmt: skip
    shown = capsys.readouterr()
    assert "rates: measured 2026-01-01" in shown.out and "3 sequences, 9 tokens in" in shown.out
    assert "plan: measuring" in shown.err and "very" in shown.err
    (subject,) = asked
    assert (subject.model, subject.threads) == (tmp_path, 1)
    assert (subject.cache, subject.moe_backend) == (tmp_path / "cache", "torch")


def test_a_plot_is_written(config, tmp_path, capsys):
    path = tmp_path / "plan.html"
    plan(capsys, "-m", str(config), "--machine", "laptop", "--num-requests", "8", "--plot",
         str(path))  # fmt: skip
    assert "Hierarchical roofline" in path.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workload", "x.jsonl", "--prompt-len", "3"), "not beside --workload"),
        (("--device-memory", "1GiB"), "--machine that has a GPU"),
        (("--machine", "laptop", "--device-memory", "1GiB"), "has no GPU"),
        (("--machine", "cray"), "allowed a5000"),
        (("--plot", "plan.pdf"), "plot: got"),
        (("--num-requests", "0"), "num-requests"),
        (("--machine", "laptop", "--host-memory", "100MiB"), "needs at least"),
    ],
)
def test_what_cannot_be_planned_is_one_error(config, capsys, words, message):
    assert main(["plan", "-m", str(config), *words]) in (1, 2)
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""


def test_device_memory_is_refused_where_nothing_has_a_device():
    with pytest.raises(UsageError, match="--device-memory"):
        refuse_known(["--device-memory", "1GiB"])
    own = {name for flag in COMMAND.flags for name in flag.names}
    words = ["--device-memory", "1GiB"]
    assert refuse_known(words, own=own) == words

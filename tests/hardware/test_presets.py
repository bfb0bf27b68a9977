"""Machines by name or file: curves as the roofline has them, files that are refused by name."""

import json
from pathlib import Path

import pytest

from machines import machine
from windlass.errors import UsageError
from windlass.hardware.preset import FOLDER, in_fp32, load_machine, preset_names

ALL = ("a100", "a5000", "h100", "h200", "l4", "laptop", "rtx4090", "t4")


def test_the_presets_that_ship():
    assert tuple(preset_names()) == ALL
    for name in ALL:
        profile = load_machine(name)
        assert profile.source != "measured" and (profile.device is None) == (name == "laptop")
        assert profile.host.memory_bytes >= 16 << 30 and not profile.spread


def test_cards_are_known_by_their_usual_names():
    for name, preset in (("4090", "rtx4090"), ("H200", "h200"), ("L4", "l4"), ("A100", "a100")):
        assert load_machine(name) == load_machine(preset)
    with pytest.raises(UsageError, match="machine: got '5090', allowed a100, a5000, h100"):
        load_machine("5090")


def test_fp32_rows_are_multiplied_at_the_rate_of_fp32():
    """Whatever weights are stored in; few rows wait for memory, and are no slower."""
    profile = load_machine("l4")
    wide = in_fp32(profile).device
    assert wide is not None and profile.device is not None
    for kind, curve in wide.experts.items():
        assert curve.best <= 30.3e12 < profile.device.experts["bfloat16"].best
        assert curve.at(1) == profile.device.experts[kind].at(1)
    assert wide.prefill_attention == 30.3e12 / 2
    laptop = load_machine("laptop")
    assert in_fp32(laptop) == laptop


@pytest.mark.parametrize("name", ALL)
def test_every_number_of_a_preset_says_where_it_comes_from(name):
    for line in (FOLDER / f"{name}.toml").read_text().splitlines():
        key, equals, rest = line.partition(" = ")
        if equals and not key.startswith("#") and not rest.startswith('"'):
            assert any(mark in rest for mark in ("# [D] ", "# [P] ", "# [A]")), line


def test_curves_follow_the_roofline():
    profile = load_machine("l4")
    device = profile.device
    assert device is not None and profile.down is not None
    # 2 FLOP for each weight and row; a weight of bf16 has 2 bytes: 1 FLOP per byte and row
    assert device.experts["bfloat16"].at(1) == pytest.approx(device.memory_rate)
    assert device.experts["bfloat16"].at(16) == pytest.approx(16 * device.memory_rate)
    assert device.experts["bfloat16"].at(1e6) == 104e12
    assert device.experts["fp8"].at(1) == pytest.approx(2 * device.memory_rate)
    assert device.experts["float32"].at(1e6) == 30.3e12
    assert profile.down.rate.at(1 << 28) == pytest.approx(12.3e9, rel=0.01)
    assert profile.down.rate.at(1 << 16) == pytest.approx(65536 / (1e-5 + 65536 / 12.3e9))
    assert profile.disk.best < 1.2e9 and profile.disk.at(1 << 16) == pytest.approx(
        4 * 65536 / (1e-4 + 4 * 65536 / 1.2e9)
    )


def test_a_machine_may_be_a_file(tmp_path):
    copy = tmp_path / "mine.toml"
    copy.write_text((FOLDER / "laptop.toml").read_text().replace("2.0e9", "1.0e9"))
    assert load_machine(str(copy)).disk.best < 1e9 < load_machine("laptop").disk.best
    profile = machine(with_device=True)
    for document in (profile.to_json(), {"profile": profile.to_json(), "noise": None}):
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(document))
        assert load_machine(str(path)) == profile


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rate = 1.2e9 ", "rat = 1.2e9 ", "disk: unknown key: rat"),
        ("rate = 1.2e9 ", "rate = -1.2e9 ", "disk: rate: got -1"),
        ("rate = 1.2e9 ", "rate = inf ", "disk: rate: got inf"),
        ("rate = 1.2e9 ", 'rate = "fast" ', "allowed a number"),
        ("threads = 24 ", "threads = 24.5 ", "allowed a whole number"),
        ("threads = 24 ", "threads = true ", "threads: got True"),
        ("threads = 24 ", "", "threads: got None"),
        ("[disk]", "[disc]", "unknown table: disc"),
        ("[link.up]", "[link.sideways]", "link: unknown key: sideways"),
        ("[link.down]", "[device.down]", "device: unknown key: down"),
        ('name = "NVIDIA L4 24', 'nam = "NVIDIA L4 24', "unknown key: nam"),
        ("rate = 1.2e9 ", "rate = = ", "cannot be read"),
    ],
)
def test_a_broken_preset_is_refused_by_name(tmp_path, old, new, message):
    text = (FOLDER / "l4.toml").read_text()
    assert old in text
    path = tmp_path / "broken.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError, match=message):
        load_machine(str(path))


def test_an_unknown_machine_names_the_known_ones(tmp_path):
    for name in ("t5", str(tmp_path), str(tmp_path / "absent.toml"), "../preset"):
        with pytest.raises(
            UsageError, match="allowed a100, a5000, h100, h200, l4, laptop, rtx4090, t4"
        ):
            load_machine(name)


def test_presets_are_package_data():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"hardware/presets/*.toml"' in text

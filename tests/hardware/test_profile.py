"""Curves between and outside their points; profiles and workloads that are refused by name."""

import json
from dataclasses import replace

import pytest

from machines import curve, machine
from windlass.errors import UsageError
from windlass.hardware.profile import Curve, HardwareProfile
from windlass.workload import Workload


def test_a_curve_is_linear_in_the_logarithm_and_constant_outside():
    rates = curve((1, 10), (4, 20), (16, 40))
    assert [rates.at(size) for size in (0, 1, 2, 4, 8, 16, 1e9)] == [10, 10, 15, 20, 30, 40, 40]
    assert curve((4, 40), (64, 20)).best == 40


@pytest.mark.parametrize(
    "points", [(), ((1, 0.0),), ((0, 1.0),), ((2, 1.0), (2, 2.0)), ((4, 1.0), (2, 2.0)),
               ((1, float("nan")),), ((1, float("inf")),), ((1, -1.0),)]
)  # fmt: skip
def test_a_curve_refuses_points_without_meaning(points):
    with pytest.raises(UsageError, match="curve"):
        Curve(points)


def test_what_is_measured_beside_copies_survives_json():
    profile = machine(with_device=True)
    assert profile.down is not None
    link = replace(profile.down, alone=curve((1 << 16, 6e9), (1 << 24, 2.4e10)))
    host = replace(profile.host, attention_beside_copies=1.5e10)
    measured = replace(profile, host=host, down=link)
    document = json.loads(measured.dumps())
    assert HardwareProfile.from_json(document) == measured != profile
    assert link.weights == link.alone and profile.down.weights == profile.down.rate
    document["host"]["attention_beside_copies"] = -1.0
    with pytest.raises(UsageError, match="attention_beside_copies: got -1"):
        HardwareProfile.from_json(document)


@pytest.mark.parametrize("with_device", [False, True])
def test_a_profile_survives_json(with_device):
    profile = machine(with_device=with_device)
    assert HardwareProfile.from_json(json.loads(profile.dumps())) == profile


def _broken(path: str, value: object) -> dict:
    document = json.loads(machine(with_device=True).dumps())
    *parents, last = path.split(".")
    inner = document
    for name in parents:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("version", 99, "version: got 99"),
        ("threads", "two", "threads: got 'two'"),
        ("threads", 0, "threads: got 0"),
        ("threads", True, "threads: got True"),
        ("disk", [[1]], "disk: got"),
        ("disk", [[2, 1], [1, 1]], "disk: curve"),
        ("disks", 1, "unknown key: disks"),
        ("host.memory_rate", -1, "memory_rate: got -1"),
        ("host.memory_rate", None, "host: memory_rate is missing"),
        ("host.experts", {}, "experts"),
        ("host.experts.int4", 3, "host: experts: int4: got 3"),
        ("host.call_s", -1.0, "call_s"),
        ("device.more", 1, "device: unknown key: more"),
        ("down", None, "links down and up"),
        ("up.rate", None, "up: rate is missing"),
        ("spread", {"disk": "much"}, "spread"),
        ("name", None, "name is missing"),
    ],
)
def test_a_broken_profile_is_refused_by_name(path, value, message):
    with pytest.raises(UsageError, match=message):
        HardwareProfile.from_json(_broken(path, value), what="file.json")


def test_a_profile_that_is_no_object_is_refused():
    with pytest.raises(UsageError, match="allowed an object"):
        HardwareProfile.from_json([])


def test_a_workload_counts():
    workload = Workload((10, 20, 30), (1, 2, 6))
    assert workload.num_sequences == 3
    assert (workload.total_prompt_tokens, workload.mean_prompt_tokens) == (60, 20)
    assert (workload.total_output_tokens, workload.mean_output_tokens) == (9, 3)
    assert workload.longest == 36
    assert Workload.from_lengths(5, 7, 2) == Workload((5, 5), (7, 7))


@pytest.mark.parametrize(
    ("prompts", "outputs"), [((), ()), ((1,), ()), ((0,), (1,)), ((1,), (0,)), ((1, -2), (1, 1))]
)
def test_a_workload_without_meaning_is_refused(prompts, outputs):
    with pytest.raises(UsageError, match="workload"):
        Workload(prompts, outputs)


@pytest.mark.parametrize("shared", [(1,), (2, 0), (0, -1), (0, 0, 0)])
def test_shared_tokens_without_meaning_are_refused(shared):
    with pytest.raises(UsageError, match=r"workload: .*shared tokens.*allowed"):
        Workload((2, 3), (1, 1), shared)


def test_shared_tokens_stay_with_their_sequences():
    work = Workload((100, 90, 80, 70), (5, 6, 7, 8), (0, 64, 64, 0))
    assert work.computed_prompt_tokens == 340 - 128 and work.computed_tokens == 212 + 26
    assert work.mean_shared_tokens == 32
    assert work.evenly(2) == Workload((100, 80), (5, 7), (0, 64))
    assert work.shortened(60) == Workload((59,) * 4, (1,) * 4, (0, 58, 58, 0))
    assert work.sharing(True) is work
    assert work.sharing(False) == Workload((100, 90, 80, 70), (5, 6, 7, 8))

"""Threads under a quota of processor time: fake trees of cgroups."""

import pytest

import windlass.device.processors as processors
from cgroups import V1_CPU, V2, tree
from windlass.device.processors import cpu_quota, default_threads, quota_note


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(processors, "_RUNNABLE", 8)


def of_v2(tmp_path, quota, name="in"):
    return tree(tmp_path / name, "0::/a\n", [V2], {"sys/a/cpu.max": quota})


def test_without_a_quota_every_processor_computes(tmp_path):
    free = of_v2(tmp_path, "max 100000")
    bare = tree(tmp_path / "bare", "", [], {})
    for proc in (free, bare):
        assert (cpu_quota(proc), default_threads(proc), quota_note(proc)) == (None, 8, None)


@pytest.mark.parametrize(
    ("quota", "threads"),
    [(5_000, 1), (100_000, 1), (149_000, 1), (150_000, 2), (250_000, 3), (749_000, 7),
     (760_000, 8), (6_400_000, 8)],
)  # fmt: skip
def test_a_quota_is_rounded_to_the_nearest_thread(tmp_path, quota, threads):
    proc = of_v2(tmp_path, f"{quota} 100000")
    assert cpu_quota(proc) == quota / 100_000
    assert default_threads(proc) == threads
    note = quota_note(proc)
    assert (note is None) == (threads == 8)
    assert note is None or note.startswith(f"threads: {threads}, as the quota")


def test_the_least_of_all_groups_above_counts(tmp_path):
    files = {"sys/a/b/cpu.max": "600000 100000", "sys/a/cpu.max": "50000 20000",
             "sys/a/b/c/cpu.max": "max 100000"}  # fmt: skip
    assert cpu_quota(tree(tmp_path, "0::/a/b/c\n", [V2], files)) == 2.5


def test_version_1_has_minus_one_for_none(tmp_path):
    files = {"sys/cpu/cpu.cfs_quota_us": -1, "sys/cpu/cpu.cfs_period_us": 100_000,
             "sys/cpu/job/cpu.cfs_quota_us": 30_000,
             "sys/cpu/job/cpu.cfs_period_us": 10_000}  # fmt: skip
    for name, own, quota in (("job", "/job", 3.0), ("root", "/", None)):
        groups = f"4:cpu,cpuacct:{own}\n3:memory:/other\n"
        proc = tree(tmp_path / name, groups, [V1_CPU.replace("rw,cpu", "rw,cpu,cpuacct")], files)
        assert cpu_quota(proc) == quota


def test_an_engine_says_once_that_a_quota_decides(tmp_path, monkeypatch, caplog):
    from contextlib import ExitStack

    import windlass.build.checkpoint_sizes as sizes
    from windlass.checkpoint.folder import read_model
    from windlass.options import EngineOptions

    proc = of_v2(tmp_path, "200000 100000")
    monkeypatch.setattr(sizes, "default_threads", lambda: default_threads(proc))
    monkeypatch.setattr(sizes, "quota_note", lambda: quota_note(proc))
    monkeypatch.setattr(sizes, "_ELEMENTS_PER_THREAD", 1)
    with ExitStack() as opened:
        model = read_model(EngineOptions(), opened)
        assert sizes.useful_threads(model) == 2
        assert [one.getMessage() for one in caplog.records] == [quota_note(proc)]
        monkeypatch.setattr(sizes, "_ELEMENTS_PER_THREAD", 1 << 30)  # an expert too small for two
        assert sizes.useful_threads(model) == 1 and len(caplog.records) == 1

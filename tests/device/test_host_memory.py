"""Memory of machine and container: fake trees of /proc and cgroups, and one real cgroup."""

import json
import sys

import pytest
import torch

import windlass.build.host_budget as build
from cgroups import MACHINE, V1, V1_CPU, V2, memory_group, tree
from windlass.build.open import open_engine
from windlass.device.host_memory import HostAllocator
from windlass.device.process_memory import MemoryLimit, available_bytes, memory_limits
from windlass.errors import UsageError
from windlass.options import EngineOptions
from windlass.units import GIB, MIB

HOST = HostAllocator()
V1_UNLIMITED = 9223372036854771712


def test_no_limit_is_the_machine(tmp_path):
    proc = tree(tmp_path, "0::/user\n", [V2], {"sys/user/memory.max": "max"})
    assert available_bytes(proc) == MACHINE and memory_limits(proc) == []
    bare = tree(tmp_path / "bare", "", [], {})
    (bare / "self/cgroup").unlink()  # a kernel without cgroups
    (bare / "self/mountinfo").unlink()
    assert available_bytes(bare) == MACHINE


def test_version_2_subtracts_usage_and_looks_at_every_ancestor(tmp_path):
    files = {
        "sys/a/memory.max": 3 * GIB,
        "sys/a/memory.high": "max",
        "sys/a/memory.current": 2 * GIB,
        "sys/a/memory.stat": f"anon 5\ninactive_file {GIB // 2}\nactive_file 7",
        "sys/a/b/memory.max": "max",
        "sys/a/b/memory.current": GIB,
        "sys/a/b/c/memory.max": 8 * GIB,
        "sys/a/b/c/memory.high": 4 * GIB,
        "sys/a/b/c/memory.current": GIB,
        "sys/memory.current": 9 * GIB,
    }
    proc = tree(tmp_path, "0::/a/b/c\n", [V2], files)
    assert sorted(memory_limits(proc)) == [
        MemoryLimit(3 * GIB, 3 * GIB // 2), MemoryLimit(4 * GIB, 3 * GIB),
    ]  # fmt: skip
    assert available_bytes(proc) == 3 * GIB // 2


def test_version_1_takes_the_memory_controller(tmp_path):
    files = {
        "sys/memory/memory.limit_in_bytes": V1_UNLIMITED,
        "sys/memory/memory.usage_in_bytes": 20 * GIB,
        "sys/memory/job/memory.limit_in_bytes": 2 * GIB,
        "sys/memory/job/memory.usage_in_bytes": GIB,
        "sys/memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {MIB}",
        "sys/cpu/other/memory.limit_in_bytes": 1,
    }
    proc = tree(tmp_path, "4:cpu:/other\n3:memory:/job\n0::/\n", [V1_CPU, V1], files)
    assert available_bytes(proc) == GIB + MIB


def test_a_container_sees_its_group_at_the_top(tmp_path):
    files = {"sys/memory/memory.limit_in_bytes": GIB, "sys/memory/memory.usage_in_bytes": MIB}
    mount = V1.replace(" / ", " /docker/x ", 1)
    for name, own in (("same", "/docker/x"), ("other", "/elsewhere"), ("above", "/../y")):
        proc = tree(tmp_path / name, f"3:memory:{own}\n", [mount], files)
        assert available_bytes(proc) == GIB - MIB, name
    files = {"sys/in/memory.max": GIB, "sys/in/memory.current": 0}
    proc = tree(tmp_path / "in", "0::/docker/x/in\n", [V2.replace(" / ", " /docker/x ", 1)], files)
    assert available_bytes(proc) == GIB


def test_a_group_above_its_limit_has_nothing_left(tmp_path):
    files = {"sys/memory.max": MIB, "sys/memory.current": 2 * MIB}
    assert available_bytes(tree(tmp_path, "0::/\n", [V2], files)) == 0


def test_the_default_budget_is_below_every_limit(monkeypatch):
    monkeypatch.setattr(build, "resident_bytes", lambda: 900 * MIB)
    monkeypatch.setattr(build, "available_bytes", lambda: 200 * MIB)
    monkeypatch.setattr(build, "memory_limits", list)
    assert build.default_budget() == 1060 * MIB
    groups = [MemoryLimit(GIB, 0), MemoryLimit(2 * GIB, GIB)]
    monkeypatch.setattr(build, "memory_limits", lambda: groups)
    assert GIB - 64 * MIB <= build.default_budget() < GIB


def test_a_budget_beyond_the_machine_is_refused(monkeypatch):
    limits = [MemoryLimit(3 * GIB, 0)]
    monkeypatch.setattr(build, "machine_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(build, "memory_limits", lambda: limits)
    build.check_budget(None)
    build.check_budget(3 * GIB)
    what = "^host_memory: got 10.00 TiB, allowed up to 3072MiB: the limit of its memory cgroup, of "
    with pytest.raises(UsageError, match=what + "the machine's 8.00 GiB$"):
        open_engine(EngineOptions(host_memory=10 << 40))
    limits.clear()
    build.check_budget(8 * GIB)
    with pytest.raises(UsageError, match="allowed up to 8192MiB: all that this machine has$"):
        build.check_budget(8 * GIB + 1)


@pytest.mark.parametrize("rows", [3, 1 << 12])  # malloc's memory, and pages of its own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_zeros_are_zero_where_other_tensors_were(rows, dtype):
    for _ in range(3):
        for make in (HOST.empty, HOST.zeros):
            found = make(rows, 2, 1024, dtype=dtype)
            assert (found.shape, found.dtype) == ((rows, 2, 1024), dtype)
            assert make == HOST.empty or not found.any()
            found.fill_(1)  # what it leaves behind must not be seen again


def test_large_zeros_are_cleared_by_the_system_alone(monkeypatch):
    def cleared(*_args, **_more):
        raise AssertionError("cleared twice")

    for name in ("zero_", "fill_", "__setitem__"):
        monkeypatch.setattr(torch.Tensor, name, cleared)
    monkeypatch.setattr(torch, "zeros", cleared)
    assert not HOST.zeros(2, 1 << 20).any()
    with pytest.raises(AssertionError, match="cleared twice"):
        HOST.zeros(2)


@pytest.mark.cgroup
def test_the_demo_runs_within_a_container_without_a_budget(tmp_path):
    row = {"custom_id": "r", "method": "POST", "url": "/v1/completions",
           "body": {"prompt": "The cat", "max_tokens": 4}}  # fmt: skip
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    command = [
        sys.executable, "-m", "windlass.cli", "run-batch", "-i", str(tmp_path / "in.jsonl"),
        "-o", str(tmp_path / "out.jsonl"), "--model", "demo", "--json",
    ]  # fmt: skip
    limit = 640 * MIB
    with memory_group(limit) as group:
        if group is None:
            pytest.skip("no memory cgroup can be made here (needs root and the memory controller)")
        done = group.run(command, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert group.num_kills == 0 and group.peak_bytes <= limit
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["plan"]["tiers"]["host"]["budget_bytes"] < limit, summary["plan"]

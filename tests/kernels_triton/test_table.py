"""The kernel table finds what got worse; the committed one is without spills where kernels run."""

from pathlib import Path

import pytest
from gpu.ahead_of_time import Resources
from gpu.kernel_table import SHARED, faults, read, to_text, worse

BENCH = Path(__file__).parents[2] / "bench"
SPILT = {("sm_120", "prompts Qwen3-Next, 16 bits: attend_split")}  # known, docs/gpu.md
GOOD = Resources(registers=80, spills=0, shared=40960, mma="HMMA.16816", mma_count=16,
                 widest_load=16, narrow_loads=3, instructions=482, warps=4)  # fmt: skip


@pytest.mark.parametrize(("change", "fault"), [
    ({"spills": 1}, "spills: got 1, allowed 0"),
    ({"shared": 101377}, "shared memory: got 101377 bytes, allowed 101376"),
    ({"mma": ""}, "matrix instruction: got none, was HMMA.16816"),
    ({"mma": "HGMMA.64x64x16"}, "matrix instruction: got HGMMA.64x64x16, was HMMA.16816"),
    ({"widest_load": 4}, "widest load: got 4 bytes, allowed 8"),
    ({"narrow_loads": 4}, "loads below 8 bytes: got 4, allowed 3"),
    ({"registers": 255, "instructions": 900, "mma_count": 17, "widest_load": 8}, None),
])  # fmt: skip
def test_what_got_worse_is_named(change, fault) -> None:
    assert worse(GOOD._replace(**change), GOOD, SHARED[86]) == ([fault] if fault else [])


def test_kernels_that_come_or_go_are_named() -> None:
    known = {"sm_80": {"a": GOOD, "b": GOOD}}
    assert faults(known, known) == []
    assert faults({"sm_80": {"a": GOOD, "c": GOOD}}, known) == [
        "sm_80, b: only in one of both; make kernel-table",
        "sm_80, c: only in one of both; make kernel-table",
    ]


def test_the_committed_table(tmp_path: Path) -> None:
    """Where kernels are meant to be fast: no spills, a matrix instruction of one kind in all that
    multiply by tiles, and shared memory that fits."""
    path = BENCH / "gpu" / "kernel_table.json"
    table = read(path)
    assert set(table) == {f"sm_{capability}" for capability in SHARED}
    spilt = {(one, name) for one, rows in table.items() for name, r in rows.items() if r.spills}
    assert spilt == SPILT
    for architecture, rows in table.items():
        if architecture != "sm_75":
            tiles = [r for name, r in rows.items() if name.endswith((": gate_up", ": down"))
                     and "by 16 bits" in name]  # fmt: skip
            assert {r.mma for r in tiles} == {"HMMA.16816"}
            limit = SHARED[int(architecture.removeprefix("sm_"))]
            assert all(r.shared <= limit for r in rows.values())
            few = [r for name, r in rows.items() if name.endswith((": gate_up_few", ": down_few"))]
            assert {r.mma for r in few} == {""} and max(r.registers for r in few) <= 96
            assert all(r.widest_load >= 8 for n, r in rows.items() if "plan_tiles" not in n)
    again = tmp_path / "table.json"
    again.write_text(to_text(table))
    assert read(again) == table

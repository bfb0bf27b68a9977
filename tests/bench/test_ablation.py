"""The ablation bench alone, without a run: every variant is a plan that differs where it says."""

import sys
from pathlib import Path

import pytest

from engines import engine_for, make_model
from windlass.errors import UsageError
from windlass.plan import Plan

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import ablation


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    make_model("qwen3_moe", folder)
    return folder


def test_every_variant_of_a_plan_can_be_replayed(path):
    with engine_for(path) as engine:
        plan = engine.plan
    found = ablation.variants([64, 128])
    assert len({one.name for one in found}) == len(found)
    for one in found:
        if one.changes is None:
            continue
        own = Plan.from_json(ablation.changed(plan.to_json(), one.changes))
        before, after = plan.to_json(), own.to_json()
        different = {name for name, value in before.items() if after[name] != value}
        assert different == set(one.changes), one.name
        engine_for(path, plan=own).close()
    with pytest.raises(AssertionError):
        ablation.changed(plan.to_json(), {"overlapp": False})
    with pytest.raises(UsageError):
        ablation.changed(plan.to_json(), {"overlap": 0})


def test_each_job_begins_with_the_variant_that_makes_its_plan():
    found = ablation.variants([64])
    seen = set()
    for place in ablation.turns(len(found), 3):
        one = found[place]
        assert one.job in seen or (one.changes == {} and not one.flags)
        seen.add(one.job)
    order = list(ablation.turns(3, 3))
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]


def test_the_grid_has_enough_settings():
    assert len(ablation.grid(128)) >= 30
    assert len(set(ablation.grid(256))) == len(ablation.grid(256)) >= 30


def test_medians_of_a_variant():
    one = ablation.Measured(ablation.Variant("x"))
    plan = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "schedule": "module-based",
            "page_tokens": 9, "tiers": {"host": {"parts": {"expert": {"slots": 8}}}}}  # fmt: skip
    for seconds, disk in ((1.0, 0.5), (9.0, 4.5), (2.0, 2.0)):
        total = {"seconds": seconds, "disk_s": disk, "host_s": 0.0, "wait_s": 0.0, "other_s": 0.0}
        one.said.append(
            dict(elapsed_time=seconds, load_time=1.0, prefill_time=0, decode_time=0, passes=3,
                 bytes_read=5, peak_rss_bytes=1, total_token_throughput=1.0, plan=plan,
                 phases={"total": total})
        )  # fmt: skip
    found = one.to_json(6.0)
    assert (found["seconds"], found["slowdown"], found["runs"]) == (3.0, 0.5, 3)
    assert found["share_of_pass_time"]["disk_s"] == 0.5
    assert found["plan"]["max_num_seqs"] == 4 and found["plan"]["expert_slots"] == 8
    assert "page_tokens" not in found["plan"]

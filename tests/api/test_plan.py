"""A plan can be written, read back and replayed: the same values, or one clear error."""

import json
from dataclasses import fields, replace

import pytest

from engines import engine_for, make_model, prompts, request, run_all
from windlass import LLM
from windlass.cli import main
from windlass.errors import BudgetError, UsageError
from windlass.plan import SCHEDULES, Plan
from windlass.units import GIB, MIB


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    make_model("qwen3_moe", folder)
    return folder


@pytest.fixture(scope="module")
def plan(path):
    with engine_for(path, moe_expert_cache_size="130KiB", max_num_seqs=3) as engine:
        return engine.plan


def test_json_brings_every_value_back(plan):
    for schedule in SCHEDULES:
        one = replace(plan, schedule=schedule, overlap=False, resident_embedding=False)
        assert Plan.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert set(plan.to_json()) == {field.name for field in fields(Plan)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_slot": 3}, r"x: unknown key: expert_slot \(did you mean expert_slots\?\)"),
        ({"expert_slots": "3"}, "x: expert_slots: got '3', allowed a value of type int"),
        ({"expert_slots": 3.0}, "x: expert_slots: got 3.0, allowed"),
        ({"expert_slots": True}, "x: expert_slots: got True, allowed"),
        ({"expert_slots": -1}, "x: expert_slots: got -1, allowed 0 or more"),
        ({"overlap": 1}, "x: overlap: got 1, allowed a value of type bool"),
        ({"schedule": "layers"}, "x: schedule: got 'layers', allowed module-based, model-based"),
    ],
)
def test_what_is_no_plan_is_refused(plan, change, message):
    with pytest.raises(UsageError, match=message):
        Plan.from_json({**plan.to_json(), **change}, what="x")


def test_missing_values_and_other_documents_are_refused(plan, tmp_path):
    document = plan.to_json()
    del document["kv_pages"]
    with pytest.raises(UsageError, match="plan: kv_pages is missing"):
        Plan.from_json(document)
    with pytest.raises(UsageError, match="plan: got a list, allowed an object"):
        Plan.from_json([1])
    (tmp_path / "torn.json").write_text("{")
    for name, message in (("torn.json", "not readable as JSON"), ("none.json", "No such file")):
        with pytest.raises(UsageError, match=message):
            LLM(plan=tmp_path / name)


def test_a_replayed_plan_is_the_same_to_the_last_value(path, plan):
    """Also where the process weighs something else, and other options would plan otherwise."""
    wanted = replace(plan, process_bytes=plan.process_bytes + 1, kv_pages=plan.kv_pages - 1)
    free = dict(max_num_seqs=None, max_num_batched_tokens=None, max_model_len=None)
    with engine_for(path, plan=wanted, **free) as engine:
        assert engine.plan == wanted
        assert engine.capacity == 3 and engine.max_model_len == wanted.max_model_len
        results = run_all(engine, [request(f"r{i}", p) for i, p in enumerate(prompts((70,) * 5))])
    assert len(results) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 8}, "num_experts: got 8, allowed .*another checkpoint or other options"),
        ({"expert_slot_bytes": 4096}, "expert_slot_bytes: got 4096, allowed"),
        ({"kv_page_bytes": 1}, "kv_page_bytes: got 1, allowed"),
        ({"kv_cache_dtype": "int8"}, "kv_page_bytes: got"),  # whose pages are smaller
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype: got 'int3', allowed bfloat16"),
        ({"page_tokens": 16}, "page_tokens: got 16, allowed 32"),
        ({"expert_slots": 0}, "expert_slots: got 0, allowed 1 to"),
        ({"expert_slots": 10**6}, "expert_slots: got 1000000, allowed 1 to"),
        ({"block_slots": 0}, "block_slots: got 0, allowed"),
        ({"max_num_seqs": 512}, "max_num_batched_tokens: got 512, allowed 576 or more"),
        ({"micro_batch_tokens": 8}, "micro_batch_tokens: got 8, allowed 64 or more"),
        ({"state_slots": 1}, "state_slots: got 1, allowed 0 to 0"),
        ({"kv_pages": 1}, "max_model_len: got 256, allowed 2 to 32"),
        ({"read_threads": 0}, "read_threads: got 0, allowed 1 or more"),
    ],
)
def test_plans_of_other_checkpoints_or_that_cannot_run_are_refused(path, plan, change, message):
    with pytest.raises(UsageError, match=f"plan: {message}"):
        engine_for(path, plan=replace(plan, **change), max_num_seqs=None).close()


def test_plans_that_do_not_fit_the_budget_are_refused(path, plan):
    with pytest.raises(BudgetError, match="plan: needs .* got 100 MiB"):
        engine_for(path, plan=plan, max_num_seqs=3, host_memory=100 * MIB).close()
    with pytest.raises(BudgetError, match="plan: needs .* got 64.00 MiB"):
        engine_for(path, plan=replace(plan, host_memory=64 * MIB), max_num_seqs=3).close()
    large = replace(plan, host_memory=2**50, kv_pages=2**36 // plan.kv_page_bytes * 1024)
    with pytest.raises(BudgetError, match="plan: needs"):  # no flag: what this machine has
        engine_for(path, plan=large, max_num_seqs=3, host_memory=None).close()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_num_seqs": 4}, "max_num_seqs"),
        ({"max_num_batched_tokens": 513}, "max_num_batched_tokens"),
        ({"micro_batch_size": 65}, "micro_batch_tokens"),
        ({"max_model_len": 255}, "max_model_len"),
        ({"moe_expert_cache_size": "64KiB"}, "expert_slots"),
        ({"schedule": "model-based"}, "schedule"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype"),
    ],
)
def test_flags_beside_a_plan_may_only_agree(path, plan, options, name):
    agreeing = dict(max_num_seqs=3, moe_expert_cache_size="130KiB", schedule=plan.schedule)
    engine_for(path, plan=plan, **agreeing).close()
    with pytest.raises(UsageError, match=f"{name}: got"):
        engine_for(path, plan=plan, **{"max_num_seqs": 3, **options}).close()


def test_run_batch_leaves_its_plan_and_takes_it_again(tmp_path, capsys):
    body = {"prompt": "The history of", "max_tokens": 3}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    job = ["run-batch", "--json", "-i", str(tmp_path / "in.jsonl"), "-o"]
    assert main([*job, str(tmp_path / "a"), "--max-num-seqs", "5", "--host-memory", "1GiB"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads((tmp_path / "a.plan.json").read_text())
    assert written == first["plan"] and first["plan_file"] == str(tmp_path / "a.plan.json")
    written["overlap"], written["process_bytes"] = False, written["process_bytes"] + 4096
    (tmp_path / "mine.json").write_text(json.dumps(written))
    assert main([*job, str(tmp_path / "b"), "--plan", str(tmp_path / "mine.json")]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["plan"] == written
    assert f"plan: {tmp_path / 'b.plan.json'}" in captured.out.splitlines()
    assert json.loads((tmp_path / "b.plan.json").read_text()) == written
    assert "no overlap" in captured.err
    results = [json.loads((tmp_path / name).read_text())["response"]["body"] for name in "ab"]
    for body in results:
        del body["created"]  # when
    assert results[0] == results[1]
    assert first["plan"]["host_memory"] == GIB and first["phases"]["total"]["passes"] == 3
    assert main(["run-batch", *job[1:], str(tmp_path / "c"), "--trace", f"{tmp_path}/c.plan.json"])

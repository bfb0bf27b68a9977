"""A plan can be written, read back and replayed: the same values, or one clear error."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from engines import engine_for, make_model, prompts, request, run_all
from planning import with_host
from windlass import LLM
from windlass.cli import main
from windlass.errors import BudgetError, UsageError
from windlass.ids import Part
from windlass.plan import SCHEDULES, PartSlots, Plan
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
        one = replace(with_host(plan, embed=0), schedule=schedule, overlap=False)
        assert Plan.from_json(json.loads(json.dumps(one.to_json()))) == one
    document = plan.to_json()
    # a plan without a device does not speak of what it leaves to the host
    assert set(document) == {field.name for field in fields(Plan)} - {
        "host_attention",
        "kv_offloading_share",
        "host_experts",
        "generated_experts",
    }
    assert set(document["tiers"]) == {"host"}
    assert document["tiers"]["host"]["parts"]["expert"]["slots"] == plan.host.slots[Part.EXPERT]


def test_a_second_tier_is_one_more_entry(plan):
    device = replace(plan.host, name="device", budget_bytes=2 * GIB, kv_pages=7)
    both = replace(plan, tiers=(plan.host, device))
    assert Plan.from_json(json.loads(json.dumps(both.to_json()))) == both and both.host == plan.host
    assert any("device: " in line and "of 2.00 GiB" in line for line in both.lines())
    document = both.to_json()
    del document["tiers"]["host"]
    with pytest.raises(UsageError, match="plan: tiers.host is missing"):
        Plan.from_json(document)


# Written by run-batch when plans had no tiers: the demo model within 1 GiB, five sequences.
FLAT = Path(__file__).parent / "data" / "flat_plan.json"


def test_flat_plan_files_are_read(tmp_path, capsys):
    """The same plan: every slot, page and choice; what a flat file does not say of the checkpoint
    stays unknown. It runs, and is written again with tiers."""
    flat = json.loads(FLAT.read_text())
    plan = Plan.from_json(flat)
    host = plan.host
    assert host.slots == {
        Part.EXPERT: 144, Part.BLOCK: 6, Part.HEAD: 1, Part.FINAL: 1, Part.EMBED: 1
    }  # fmt: skip
    assert host.of(Part.EXPERT) == PartSlots(
        part=Part.EXPERT, slots=144, slot_bytes=61440, num_parts=144
    )
    assert (host.budget_bytes, host.total_bytes, host.kv_pages) == (GIB, 295673382, 16)
    same = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_dtype", "schedule")
    assert [getattr(plan, name) for name in same] == [flat[name] for name in same]
    assert "experts resident 144 of 144 (8.44 MiB)" in plan.lines()[1]
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    with LLM(plan=FLAT) as llm:
        assert llm.plan == plan
    with LLM(host_memory="4GiB", max_num_seqs=5, max_model_len=512) as llm:
        today = llm.plan.host
        assert {part: n for part, n in today.slots.items()} == host.slots
        assert today.of(Part.BLOCK) == host.of(Part.BLOCK)
        assert today.kv_page_bytes == host.kv_page_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_slots": "3"}, "x: tiers.host.parts.expert: slots: got '3', allowed a value of"),
        ({"kv_pages": -1}, "x: tiers.host: kv_pages: got -1, allowed 0 or more"),
        ({"resident_embedding": 1}, "x: resident_embedding: got 1, allowed a value of type bool"),
        ({"expert_slot": 3}, "x: unknown key: expert_slot"),
    ],
)
def test_flat_plan_files_are_read_strictly(change, message):
    flat = json.loads(FLAT.read_text())
    with pytest.raises(UsageError, match=message):
        Plan.from_json({**flat, **change}, what="x")
    for name in ("head_slots", "host_memory", "overlap"):
        with pytest.raises(UsageError, match=f"x: {name} is missing"):
            Plan.from_json({key: flat[key] for key in flat if key != name}, what="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot": 3}, r"x: tiers.host.parts.expert: unknown key: slot \(did you mean slots\?\)"),
        ({"slots": "3"}, "x: tiers.host.parts.expert: slots: got '3', allowed a value of type int"),
        ({"slots": 3.0}, "slots: got 3.0, allowed"),
        ({"slots": True}, "slots: got True, allowed"),
        ({"slots": -1}, "slots: got -1, allowed 0 or more"),
    ],
)
def test_what_is_no_room_for_a_part_is_refused(plan, change, message):
    document = plan.to_json()
    document["tiers"]["host"]["parts"]["expert"] |= change
    with pytest.raises(UsageError, match=message):
        Plan.from_json(document, what="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlap": 1}, "x: overlap: got 1, allowed a value of type bool"),
        ({"schedule": "layers"}, "x: schedule: got 'layers', allowed module-based, model-based"),
        ({"max_num_seq": 3}, r"x: unknown key: max_num_seq \(did you mean max_num_seqs\?\)"),
        ({"tiers": 3}, "x: tiers: got a int, allowed an object"),
        ({"tiers": {"host": []}}, "x: tiers.host: got a list, allowed an object"),
    ],
)
def test_what_is_no_plan_is_refused(plan, change, message):
    with pytest.raises(UsageError, match=message):
        Plan.from_json({**plan.to_json(), **change}, what="x")


def test_missing_values_and_other_documents_are_refused(plan, tmp_path):
    document = plan.to_json()
    document["tiers"]["host"]["parts"]["gate"] = {}
    with pytest.raises(UsageError, match=r"plan: tiers.host.parts: unknown key: gate, allowed"):
        Plan.from_json(document)
    del document["tiers"]["host"]["kv_pages"]
    with pytest.raises(UsageError, match="plan: tiers.host: kv_pages is missing"):
        Plan.from_json(document)
    with pytest.raises(UsageError, match="plan: got a list, allowed an object"):
        Plan.from_json([1])
    (tmp_path / "torn.json").write_text("{")
    for name, message in (("torn.json", "not readable as JSON"), ("none.json", "No such file")):
        with pytest.raises(UsageError, match=message):
            LLM(plan=tmp_path / name)


def test_a_replayed_plan_is_the_same_to_the_last_value(path, plan):
    """Also where the process weighs something else, and other options would plan otherwise."""
    host = plan.host
    wanted = with_host(plan, process_bytes=host.process_bytes + 1, kv_pages=host.kv_pages - 1)
    free = dict(max_num_seqs=None, max_num_batched_tokens=None, max_model_len=None)
    with engine_for(path, plan=wanted, **free) as engine:
        assert engine.plan == wanted
        assert engine.capacity == 3 and engine.max_model_len == wanted.max_model_len
        results = run_all(engine, [request(f"r{i}", p) for i, p in enumerate(prompts((70,) * 5))])
    assert len(results) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": {"num_parts": 8}}, "expert num_parts: got 8, allowed .*another checkpoint or"),
        ({"expert": {"slot_bytes": 4096}}, "expert slot_bytes: got 4096, allowed"),
        ({"kv_page_bytes": 1}, "kv_page_bytes: got 1, allowed"),
        ({"expert": 0}, "expert slots: got 0, allowed 1 to"),
        ({"expert": 10**6}, "expert slots: got 1000000, allowed 1 to"),
        ({"block": 0}, "block slots: got 0, allowed"),
        ({"parts": ()}, "kinds of parts: got"),
        ({"state_slots": 1}, "state_slots: got 1, allowed 0 to 0"),
        ({"kept_states": 1}, "kept_states: got 1, allowed 0 to 0"),
        ({"kv_pages": 1}, "max_model_len: got 256, allowed 2 to 32"),
    ],
)
def test_tiers_of_other_checkpoints_or_that_cannot_run_are_refused(path, plan, change, message):
    with pytest.raises(UsageError, match=f"plan: {message}"):
        engine_for(path, plan=with_host(plan, **change), max_num_seqs=None).close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_cache_dtype": "int8"}, "kv_page_bytes: got"),  # whose pages are smaller
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype: got 'int3', allowed bfloat16"),
        ({"page_tokens": 16}, "page_tokens: got 16, allowed 32"),
        ({"max_num_seqs": 512}, "max_num_batched_tokens: got 512, allowed 576 or more"),
        ({"micro_batch_tokens": 8}, "micro_batch_tokens: got 8, allowed 64 or more"),
        ({"read_threads": 0}, "read_threads: got 0, allowed 1 or more"),
    ],
)
def test_plans_of_other_options_or_that_cannot_run_are_refused(path, plan, change, message):
    with pytest.raises(UsageError, match=f"plan: {message}"):
        engine_for(path, plan=replace(plan, **change), max_num_seqs=None).close()


def test_plans_that_do_not_fit_the_budget_are_refused(path, plan):
    with pytest.raises(BudgetError, match="plan: needs .* got 100 MiB"):
        engine_for(path, plan=plan, max_num_seqs=3, host_memory=100 * MIB).close()
    with pytest.raises(BudgetError, match="plan: needs .* got 64.00 MiB"):
        engine_for(path, plan=with_host(plan, budget_bytes=64 * MIB), max_num_seqs=3).close()
    pages = 2**36 // plan.host.kv_page_bytes * 1024
    large = with_host(plan, budget_bytes=2**50, kv_pages=pages)
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
    assert main([*job, str(tmp_path / "a"), "--max-num-seqs", "5", "--host-memory", "4GiB"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads((tmp_path / "a.plan.json").read_text())
    assert written == first["plan"] and first["plan_file"] == str(tmp_path / "a.plan.json")
    written["overlap"] = False
    written["tiers"]["host"]["process_bytes"] += 4096
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
    assert (
        first["plan"]["tiers"]["host"]["budget_bytes"] == 4 * GIB
        and first["phases"]["total"]["passes"] == 3
    )
    assert main(["run-batch", *job[1:], str(tmp_path / "c"), "--trace", f"{tmp_path}/c.plan.json"])

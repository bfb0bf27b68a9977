"""What `windlass plan` says: tiers that add up, sentences that follow the numbers, pictures, and
the command on checkpoints, configurations and machines that one does not have."""

import json
from dataclasses import replace

import pytest

from devices import quick_search
from engines import make_model
from machines import machine
from published import PUBLISHED
from windlass.build.checkpoint_sizes import sizes_of
from windlass.checkpoint.folder import read_model
from windlass.cli import main
from windlass.errors import BudgetError
from windlass.hardware.preset import preset_names
from windlass.options import EngineOptions
from windlass.perf.sizes import Backend, Problem
from windlass.planner.constraints import PlanConstraints
from windlass.planner.explain import Explanation, explain, weight_bytes
from windlass.units import GIB, MIB
from windlass.workload import Workload


@pytest.fixture(scope="module", autouse=True)
def fast():
    """What is said follows from estimates, however few they are and layers they rest on."""
    with quick_search():
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """OLMoE-1B-7B by its configuration alone, with a quarter of the experts, each four times as
    wide: 12.9 GiB of weights in few parts, which is quick on the clock."""
    folder = tmp_path_factory.mktemp("config")
    wide = {"num_experts": 16, "num_experts_per_tok": 2, "intermediate_size": 4096}
    folder.joinpath("config.json").write_text(
        json.dumps({"model_type": "olmoe", **PUBLISHED["olmoe"][0], **wide})
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
    return explain(Problem(spec, sizes, machine()), WORK, 4 * GIB, PlanConstraints())


# --- explanations ---------------------------------------------------------------------------------


def test_tiers_add_up(found, olmoe):
    _, sizes = olmoe
    host, disk = found.tiers
    assert host.used == found.best.plan.host.total_bytes <= host.budget == 4 * GIB
    assert disk.used == sum(weight_bytes(sizes).values()) > 12 * GIB
    kept = sum(size for name, size in host.holds.items() if " of " in name)
    assert kept == disk.holds["weights also in memory"] > 0


def test_more_memory_brings_what_a_search_with_it_brings(found, olmoe):
    spec, sizes = olmoe
    richer = explain(Problem(spec, sizes, machine()), WORK, 5 * GIB, PlanConstraints())
    assert found.more_host_s == richer.best.estimate.total_s < found.best.estimate.total_s
    text = "\n".join(found.lines())
    saved = found.best.estimate.total_s - found.more_host_s
    share = 100 * saved / found.best.estimate.total_s
    assert f"one more GiB of host memory would save {saved:.2f} s ({share:.0f} %)" in text or (
        f"({share:.0f} %)" in text
    )
    rich = explain(Problem(spec, sizes, machine()), WORK, 64 * GIB, PlanConstraints())
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
    for rate, bottleneck in ((1e7, "disk"), (1e13, "host")):
        disk = replace(plain.disk, points=((1 << 20, rate), (4 << 20, 2 * rate)))
        problem = Problem(spec, sizes, replace(plain, disk=disk))
        one = explain(problem, WORK, 4 * GIB, PlanConstraints(max_num_seqs=64))
        assert any(line.startswith(f"bottleneck: {bottleneck};") for line in one.lines())


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
        explain(Problem(spec, sizes, machine()), WORK, 500 * MIB, PlanConstraints())


# --- pictures -------------------------------------------------------------------------------------


# What is fixed need not be searched for: these tests are about other things.
FEW = ("--max-num-seqs", "16", "--max-num-batched-tokens", "512")


def plan(capsys, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", preset_names())
def test_a_configuration_alone_is_planned_for_every_preset(config, capsys, name):
    words = ("--hardware", name, "--num-requests", "16", "--prompt-len", "64", *FEW)
    with quick_search():
        text = plan(capsys, "-m", str(config), *words)
    assert "predicted:" in text and "16 sequences, 64 tokens in and 128 out" in text
    assert ("device: " in text) == ("of attention on the host" in text) == (name != "laptop")


def test_a_card_that_one_does_not_have_is_planned_for_within_its_memory(config, capsys):
    words = ("-m", str(config), "--hardware", "T4", "--num-requests", "64", *FEW, "--json")
    with quick_search():
        small, whole = (
            json.loads(plan(capsys, *words, *more)) for more in (("--device-memory", "4GiB"), ())
        )
        cpu = json.loads(plan(capsys, *words, "--device", "cpu"))
    tiers = [one["plan"]["tiers"]["device"] for one in (small, whole)]
    assert tiers[0]["budget_bytes"] == 4 * GIB >= tiers[0]["total_bytes"]
    assert tiers[1]["budget_bytes"] == int(0.9 * 15 * GIB) >= tiers[1]["total_bytes"]
    experts = [tier["parts"]["expert"]["slots"] for tier in tiers]
    assert experts[0] < experts[1] and "device" not in cpu["plan"]["tiers"]
    assert whole["estimate"]["total_s"] < small["estimate"]["total_s"]
    assert whole["estimate"]["total_s"] < cpu["estimate"]["total_s"]
    # rows of fp32 cannot be multiplied as fast as those of 16 bits
    with quick_search():
        rounded = json.loads(plan(capsys, *words, "--dtype", "bfloat16"))
    assert rounded["estimate"]["total_s"] < whole["estimate"]["total_s"]


def test_the_host_memory_of_a_machine_is_the_default_and_a_flag_wins(config, capsys):
    for words, budget in (((), int(0.8 * 16 * GIB)), (("--host-memory", "5GiB"), 5 * GIB)):
        text = plan(capsys, "-m", str(config), "--machine", "laptop", "--json", *words, *FEW)
        document = json.loads(text)
        assert document["plan"]["tiers"]["host"]["budget_bytes"] == budget
        assert document["plan"]["tiers"]["host"]["total_bytes"] <= budget


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workload", "x.jsonl", "--prompt-len", "3"), "not beside --workload"),
        (("--device-memory", "1GiB"), "--device-memory: this machine has no GPU"),
        (("--device", "cuda"), "device: got 'cuda', allowed auto or cpu: torch "),
        (("--machine", "laptop", "--device", "cuda"), "--device: "),
        (("--machine", "laptop", "--device-memory", "1GiB"), "has no GPU"),
        (("--machine", "cray"), "allowed a100, a5000"),
        (("--hardware", "5090"), "windlass: --hardware: got '5090', allowed a100, a5000"),
        (("--hardware", "t4", "--device-memory", "100MiB"), "raise --device-memory"),
        (
            ("--machine", "l4", "--device-memory", "160GiB"),
            "--device-memory: got 160 GiB, allowed up to 24576MiB: all that the machine has, ",
        ),
        (
            ("--machine", "l4", "--host-memory", "1TiB"),
            "--host-memory: got 1.00 TiB, allowed up to 188713MiB: all that the machine has, ",
        ),
        (("--host-memory", "100TiB"), "--host-memory: got 100 TiB, allowed up to "),
        (("--num-requests", "0"), "num-requests"),
        (("--machine", "laptop", "--host-memory", "100MiB"), "needs at least"),
    ],
)
def test_what_cannot_be_planned_is_one_error(config, capsys, monkeypatch, words, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["plan", "-m", str(config), *words]) in (1, 2)
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""

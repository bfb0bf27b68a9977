"""The whole process inside a memory cgroup of exactly the budget, with a checkpoint four times
larger: it ends, is not killed, and its peak stays below."""

import json
import sys

import pytest

from cgroups import memory_group
from windlass.checkpoint.synthetic import preset, write_random_checkpoint
from windlass.units import MIB

BUDGET = 400 * MIB
CONFIG = preset("qwen3-moe-1b", num_layers=17) | {
    "hidden_size": 512,
    "num_experts": 16,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
}
PROMPTS, PROMPT_TOKENS, OUTPUT_TOKENS = 6, 40, 2


def _job(path):
    with path.open("w") as file:
        for i in range(PROMPTS):
            prompt = [(37 * i + 11 * j) % 250 for j in range(PROMPT_TOKENS)]
            body = {"prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0,
                    "ignore_eos": True}  # fmt: skip
            row = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(row) + "\n")


@pytest.mark.cgroup
def test_a_checkpoint_four_times_the_budget_runs_inside_it(tmp_path):
    model = tmp_path / "model"
    assert write_random_checkpoint(CONFIG, model) >= 4 * BUDGET
    _job(tmp_path / "in.jsonl")
    command = [
        sys.executable, "-m", "windlass.cli", "run-batch", "-i", str(tmp_path / "in.jsonl"),
        "-o", str(tmp_path / "out.jsonl"), "--model", str(model),
        "--host-memory", f"{BUDGET // MIB}MiB", "--json",
    ]  # fmt: skip
    with memory_group(BUDGET) as group:
        if group is None:
            pytest.skip("no memory cgroup can be made here (needs root and the memory controller)")
        done = group.run(command, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert group.num_kills == 0
        assert group.peak_bytes <= BUDGET
    summary = json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == PROMPTS
    usage = [row["response"]["body"]["usage"]["completion_tokens"] for row in rows]
    assert usage == [OUTPUT_TOKENS] * PROMPTS
    assert 0 < summary["peak_rss_bytes"] < BUDGET, summary


# What a process has in memory of mapped libraries differs by 130 MiB between machines.
ROWS_BUDGET = 480 * MIB


@pytest.mark.cgroup
def test_rows_of_megabytes_are_refused_inside_the_budget(tmp_path):
    texts = ["Hello", "The quick brown fox. " * 300_000, "Hello", "x" * 10_000_000 + "é", "Hello"]
    with (tmp_path / "in.jsonl").open("w") as file:
        for i, text in enumerate(texts):
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
            row = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions",
                   "body": body}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    command = [
        sys.executable, "-m", "windlass.cli", "run-batch", "-i", str(tmp_path / "in.jsonl"),
        "-o", str(tmp_path / "out.jsonl"), "--model", "demo",
        "--host-memory", f"{ROWS_BUDGET // MIB}MiB", "--json",
    ]  # fmt: skip
    with memory_group(ROWS_BUDGET) as group:
        if group is None:
            pytest.skip("no memory cgroup can be made here (needs root and the memory controller)")
        done = group.run(command, timeout=120)
        assert done.returncode == 3, done.stderr[-2000:]
        assert group.num_kills == 0
        assert group.peak_bytes <= ROWS_BUDGET
    assert json.loads(done.stdout.splitlines()[-1])["peak_rss_bytes"] < ROWS_BUDGET
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["response"]["status_code"] for row in rows] == [200, 400, 200, 400, 200]
    for row in (rows[1], rows[3]):
        assert row["response"]["body"]["error"]["code"] == "context_length_exceeded"


@pytest.mark.cgroup
def test_too_small_a_budget_is_refused_with_the_smallest_that_works(tmp_path):
    _job(tmp_path / "in.jsonl")
    command = [
        sys.executable, "-m", "windlass.cli", "run-batch", "-i", str(tmp_path / "in.jsonl"),
        "-o", str(tmp_path / "out.jsonl"), "--model", "demo", "--host-memory", "50MiB",
    ]  # fmt: skip
    with memory_group(BUDGET) as group:
        if group is None:
            pytest.skip("no memory cgroup can be made here (needs root and the memory controller)")
        refused = group.run(command, timeout=300)
        assert refused.returncode == 1
        smallest = refused.stderr.split("at least ")[1].split()[0]
        command[-1] = smallest
        done = group.run(command, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]

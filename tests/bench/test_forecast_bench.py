"""What the forecast benches run on: padded experts compute the same bits, prompts are whole."""

import json
import sys
from pathlib import Path

import pytest

from engines import engine_for, make_model, prompts, request, run_all
from windlass.errors import UsageError
from windlass.options import read_config
from windlass.units import KIB

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import forecast_models
import forecast_traces


def answers(path):
    requests = [request(f"{i}", ids, logprobs=3) for i, ids in enumerate(prompts((5, 40)))]
    with engine_for(path) as engine:
        results = run_all(engine, requests)
    return {name: (o.outputs[0].token_ids, o.outputs[0].logprobs) for name, o in results.items()}


def test_padded_experts_are_large_and_compute_the_same(tmp_path):
    make_model("qwen3_moe", model := tmp_path / "model")
    rows = forecast_models.pad_checkpoint(model, tmp_path / "padded", 200 * KIB)
    config, own = read_config(tmp_path / "padded"), read_config(model)
    assert config == {**own, "moe_intermediate_size": rows}
    assert rows > 4 * own["moe_intermediate_size"]
    assert answers(tmp_path / "padded") == answers(model)


def test_experts_are_not_made_smaller(tmp_path):
    make_model("qwen3_moe", tmp_path / "model")
    with pytest.raises(UsageError, match="expert-bytes: got 16 B, allowed at least the"):
        forecast_models.pad_checkpoint(tmp_path / "model", tmp_path / "padded", 16)


def test_checkpoints_of_other_layouts_are_refused(tmp_path):
    make_model("gpt_oss", tmp_path / "model")
    with pytest.raises(UsageError, match="has no tensor named"):
        forecast_models.pad_checkpoint(tmp_path / "model", tmp_path / "padded", 1 << 20)


def test_prompts_are_pieces_of_every_domain_in_turn():
    documents = [
        {"domain": domain, "text": " ".join(str(i) for i in range(first, first + size))}
        for domain, first in (("a", 0), ("b", 1000))
        for size in (5, 50)  # the first is too short for any
    ]
    rows = forecast_traces.prompts(documents, lambda t: [*map(int, t.split())], [8, 16], 2)
    assert [row["custom_id"] for row in rows] == [
        "a-8-0", "a-8-1", "b-8-0", "b-8-1", "a-16-0", "a-16-1", "b-16-0", "b-16-1",
    ]  # fmt: skip
    for row in rows:
        ids = row["ids"]
        assert ids == list(range(ids[0], ids[0] + int(row["custom_id"].split("-")[1])))
        assert (ids[0] >= 1000) == (row["custom_id"][0] == "b")
    lines = [json.loads(line) for line in forecast_traces.job_lines(rows, 4).splitlines()]
    assert [line["body"]["prompt"] for line in lines] == [row["ids"] for row in rows]
    assert len({line["body"]["seed"] for line in lines}) == len(rows)

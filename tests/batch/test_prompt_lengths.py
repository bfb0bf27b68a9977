"""What is planned for: lengths from a job file, kinds of weights from a layout, and a real engine
that is planned for its job."""

import io
import json
from typing import Any

import numpy as np
import pytest

from engines import engine_for, make_model, prompts, request, run_all
from fake_engine import FakeTokenizer
from windlass.batch.job import run_job
from windlass.batch.job_options import JobOptions
from windlass.batch.jobfile import JobFile
from windlass.batch.progress import LineProgress
from windlass.batch.prompt_lengths import job_lengths
from windlass.build.open import open_engine
from windlass.checkpoint.weight_kinds import weight_kinds
from windlass.engine.engine import Engine
from windlass.engine.text_limits import LONG_TEXT
from windlass.formats import WeightFormat
from windlass.ids import Part, WeightKey
from windlass.models.names import Layout, PackedShape, Piece, TensorInfo
from windlass.options import EngineOptions
from windlass.params import SamplingParams
from windlass.protocol.openai import ServedModel
from windlass.units import GIB
from windlass.workload import Job, Workload


def _job(folder, *bodies):
    path = folder / "in"
    lines = [
        json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body})
        if isinstance(body, dict)
        else body
        for i, body in enumerate(bodies)
    ]
    path.write_text("\n".join(lines) + "\n")
    return JobFile(path)


def _lengths(job, wanted=None):
    model = ServedModel(("m",), FakeTokenizer(), 4096, SamplingParams(max_tokens=None), now=0)
    return job_lengths(job, np.ones(len(job), dtype=bool) if wanted is None else wanted, model)


def test_lengths_are_those_of_the_rows_that_are_left(tmp_path):
    job = _job(
        tmp_path,
        {"prompt": [5] * 10, "max_tokens": 7},
        {"prompt": [[5] * 3, [6] * 4], "max_tokens": 2, "n": 2},
        "not json",
        {"prompt": [5], "max_tokens": 100_000},  # will be refused
        {"prompt": [5] * 20, "max_tokens": 9},
    )
    found = _lengths(job)
    assert found.is_bounded
    assert set(zip(found.workload.prompt_tokens, found.workload.output_tokens, strict=True)) == {
        (10, 7), (3, 2), (4, 2), (20, 9)
    }  # fmt: skip
    wanted = np.array([False, False, False, False, True])
    assert _lengths(job, wanted).workload == Workload((20,), (9,), (0,))
    assert _lengths(job, np.array([False, False, True, True, False])) is None


def test_a_row_without_a_limit_leaves_the_job_open(tmp_path):
    found = _lengths(_job(tmp_path, {"prompt": [5], "max_tokens": 3}, {"prompt": [5] * 2}))
    assert not found.is_bounded


def test_a_checkpoints_own_length_limits_answers_that_name_none(tmp_path):
    job = _job(tmp_path, {"prompt": [5], "max_tokens": 3}, {"prompt": [5] * 2})
    model = ServedModel(("m",), FakeTokenizer(), 4096, SamplingParams(max_tokens=77), now=0)
    found = job_lengths(job, np.ones(2, dtype=bool), model)
    assert found and found.is_bounded and found.workload.output_tokens == (3, 77)


def test_a_long_text_is_looked_at_in_pieces(tmp_path):
    given = []

    class Watched(FakeTokenizer):
        def encode(self, text, *, add_special_tokens=True, at_most=None):
            given.append(len(text))
            return super().encode(text, add_special_tokens=add_special_tokens)

    text = "word " * 400_000
    bodies = [{"prompt": text, "max_tokens": 1}, {"prompt": text * 9, "max_tokens": 1}]
    model = ServedModel(("m",), Watched(), len(text) + 9, SamplingParams(max_tokens=None), now=0)
    found = job_lengths(_job(tmp_path, *bodies), np.ones(2, dtype=bool), model)
    assert found and found.workload.prompt_tokens == (len(text),)  # and the other does not fit
    assert sum(given) <= 2 * LONG_TEXT and max(given) <= LONG_TEXT // 8


def test_some_rows_of_a_large_job_stand_for_all(tmp_path):
    bodies = [{"prompt": [5] * (1 + i % 7), "max_tokens": 1 + i % 3} for i in range(2000)]
    found = _lengths(_job(tmp_path, *bodies)).workload
    assert found.num_sequences == 2000
    assert found.mean_prompt_tokens == pytest.approx(4, rel=0.05)
    assert found.mean_output_tokens == pytest.approx(2, rel=0.05)


HEADER = list(range(3, 153))  # 128 tokens in two blocks may be shared


def test_what_prompts_share_is_counted_as_the_engine_finds_it(tmp_path):
    job = _job(
        tmp_path,
        {"prompt": [*HEADER, 5], "max_tokens": 1},
        {"prompt": [*HEADER, 6], "max_tokens": 1, "prompt_logprobs": 0, "n": 2},  # one is scored
        {"prompt": [*HEADER, 7], "max_tokens": 1, "prompt_logprobs": 1},  # tells the same
        {"prompt": [*HEADER[:128], 7], "max_tokens": 1, "prompt_logprobs": 1},
        {"prompt": [*HEADER, 7], "max_tokens": 1, "prompt_logprobs": 2},
        {"prompt": HEADER[:128], "max_tokens": 1},  # its last token is computed: so is its block
        {"prompt": [[7] * 64, [7] * 65, [7] * 200], "max_tokens": 1},
        {"prompt": [8, *HEADER], "max_tokens": 1, "n": 3},
    )
    shared = _lengths(job).workload.shared_tokens
    assert shared == (0, 0, 128, 128, 64, 0, 64, 0, 64, 64, 0, 128, 128)
    wanted = np.array([False, True, *[False] * 5, True])
    assert _lengths(job, wanted).workload.shared_tokens == (0, 128, 0, 128, 128)


def test_what_rows_of_a_large_job_share_is_that_of_all(tmp_path):
    header = {"prompt": [*HEADER, 5], "max_tokens": 1}
    alike = [{**header, "prompt": [*HEADER, 5 + i % 300]} for i in range(600)]
    found = _lengths(_job(tmp_path, *alike)).workload
    assert found.computed_prompt_tokens == 600 * 151 - 599 * 128
    others = [{"prompt": [i % 800] * 150, "max_tokens": 1, "n": 2} for i in range(600)]
    found = _lengths(_job(tmp_path, *others)).workload
    second = 600 * 128  # tokens of the second of each two
    assert found.computed_prompt_tokens == pytest.approx(600 * 300 - second, rel=0.02)


@pytest.mark.parametrize("is_on", [True, False])
def test_prompt_tokens_that_are_predicted_are_those_that_are_computed(tmp_path, is_on):
    folder = tmp_path / "model"
    make_model("qwen3_moe", folder)
    groups = prompts((130, 70, 200))
    bodies: list[dict[str, Any]] = [
        {"prompt": groups[i % 3] + own, "max_tokens": 2, "ignore_eos": True, "n": 1 + i % 2}
        for i, own in enumerate(prompts([9 + 3 * i for i in range(17)], seed=1))
    ]
    options = JobOptions(
        input_file=_job(tmp_path, *bodies).path, output_file=tmp_path / "out", error_file=None,
        served_names=("m",), identity={}, recorded={}, max_model_len=None, created=0,
    )  # fmt: skip
    engine_options = EngineOptions(
        model=str(folder), generation_config="vllm", enable_prefix_caching=is_on,
        host_memory=4 * GIB,
    )  # fmt: skip
    opened: list[Engine] = []

    class Opens:
        def open(self, context, left):
            opened.append(open_engine(engine_options, source=left))
            return opened[0]

        def is_stopping(self):
            return False

    summary = run_job(options, Opens(), progress=LineProgress(io.StringIO()), stopping=Opens())
    stats, whole = summary.stats, sum(len(b["prompt"]) * b["n"] for b in bodies)
    expected: Any = opened[0]._expectation
    predicted = expected._chosen.prediction.estimate
    assert stats is not None
    assert summary.ok == len(bodies) and stats.input_tokens == whole
    assert sum(p.prompt_tokens for p in predicted.phases.values()) == stats.prompt_tokens
    assert (stats.prompt_tokens < whole / 2) if is_on else (stats.prompt_tokens == whole)
    check: Any = summary.check
    assert check.accuracy.done == 1
    assert predicted.total_tokens_s == pytest.approx(
        (whole + stats.generated_tokens) / predicted.total_s
    )


def test_kinds_of_weights_are_those_of_most_elements():
    form = WeightFormat(code="int4", packing="gptq", columns=32)
    packed = PackedShape(form, (64, 64))
    layout = Layout(
        {
            WeightKey(Part.BLOCK, 0): (
                Piece("a", "f32", 0, 10, (10,)), Piece("b", "bf", 0, 99, (99,)),
            ),
            WeightKey(Part.EXPERT, 0, 0): (
                Piece("up", "words", 0, 512, (8, 64), role="codes", packed=packed),
                Piece("up", "f32", 0, 128, (2, 64), role="scales", packed=packed),
            ),
        },
        (),
    )  # fmt: skip
    tensors = {
        name: TensorInfo(name, "file", dtype, (4096,), 0, 4096)
        for name, dtype in (("f32", "F32"), ("bf", "BF16"), ("words", "I32"))
    }
    assert weight_kinds(layout, tensors) == {Part.BLOCK: "bfloat16", Part.EXPERT: "gptq"}


def test_an_engine_that_is_planned_for_its_job_gives_the_same_answers(tmp_path):
    make_model("qwen3_moe", tmp_path)
    given = [request(str(i), p, max_tokens=5) for i, p in enumerate(prompts((30, 7, 12)))]
    with engine_for(tmp_path) as engine:
        expected = {name: out.outputs[0].token_ids for name, out in run_all(engine, given).items()}
        assert engine.notes == ()
    options = EngineOptions(model=str(tmp_path), generation_config="vllm", seed=0)
    asked = []

    class Three:
        def job(self, tokenizer, params, longest):
            asked.append(longest)
            return Job(Workload((30, 7, 12), (5, 5, 5)), True)

        def row_bytes(self, max_model_len, vocab_size):
            return 0

    with open_engine(options, source=Three()) as engine:
        (note,) = engine.notes
        assert "3 sequences of 16 tokens in and 5 out" in note and "rates assumed" in note
        assert engine.plan.host.total_bytes <= engine.plan.host.budget_bytes
        found = {name: out.outputs[0].token_ids for name, out in run_all(engine, given).items()}
    assert found == expected
    assert asked == [256]

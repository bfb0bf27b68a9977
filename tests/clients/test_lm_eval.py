"""lm-eval-harness: in this process, against the server and with transformers, on the same made
tasks. Numbers are what the harness logs of each request."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from processes import PATIENCE_S
from serving import Running
from windlass.options import resolve_model

HERE = Path(__file__).parent
TASKS = ("made_choice", "made_text", "made_answer")
NUM_CHOICES = 4 + 3 + 3 + 3 + 2
LONG_S = 5 * PATIENCE_S

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", exc_type=ImportError)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made tasks, with the place of their data written in."""
    folder = tmp_path_factory.mktemp("tasks")
    for path in (HERE / "tasks").glob("*.yaml"):
        text = path.read_text().replace("DATA", str(HERE / "tasks" / "made.jsonl"))
        (folder / path.name).write_text(text)
    return folder


def evaluated(tasks: Path, *arguments: str, names: tuple[str, ...] = TASKS) -> tuple[Any, str]:
    """Answers by task and document, and what the program said."""
    out = tasks / "out" / str(len(list(tasks.glob("out/*"))))
    environment = {
        "PATH": "/usr/bin:/bin", "HF_HOME": str(tasks / "home"), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "windlass.evals", "run", *arguments, "--tasks", *names,
         "--include_path", tasks, "--log_samples", "--output_path", out],
        capture_output=True, text=True, timeout=LONG_S, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = {}
    for name in names:
        (path,) = out.rglob(f"samples_{name}_*.jsonl")
        rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
        found[name] = [row["resps"] for row in rows]
    return found, done.stderr


@pytest.fixture(scope="module")
def expected(tasks: Path) -> Any:
    model = f"pretrained={resolve_model('demo')},dtype=float32"
    return evaluated(tasks, "--model", "hf", "--model_args", model, "--device", "cpu")[0]


def assert_alike(found: Any, expected: Any) -> None:
    def numbers(choices: Any) -> list[float]:
        return [float(each) for (answer,) in choices for each in answer[:1]]

    def greedy(choices: Any) -> list[str]:
        return [str(answer[1]) for (answer,) in choices]

    assert found["made_answer"] == expected["made_answer"]
    count = 0
    for ours, theirs in zip(found["made_choice"], expected["made_choice"], strict=True):
        assert numbers(ours) == pytest.approx(numbers(theirs), abs=1e-4, rel=0)
        assert greedy(ours) == greedy(theirs)
        count += len(numbers(ours))
    assert count == NUM_CHOICES
    for ours, theirs in zip(found["made_text"], expected["made_text"], strict=True):
        assert float(ours[0][0]) == pytest.approx(float(theirs[0][0]), abs=1e-4, rel=0)


def test_scores_in_this_process_are_those_of_transformers(tasks: Path, expected: Any) -> None:
    options = "pretrained=demo,host_memory=1GiB,threads=1,expert_usage=off"
    found, _ = evaluated(tasks, "--model", "windlass", "--model_args", options)
    assert_alike(found, expected)


def test_scores_of_the_server_are_those_of_transformers(
    tasks: Path, expected: Any, server: Running
) -> None:
    options = (
        f"model=demo,base_url=http://127.0.0.1:{server.port}/v1/completions,"
        "tokenizer_backend=remote,num_concurrent=2"
    )
    found, _ = evaluated(tasks, "--model", "local-completions", "--model_args", options)
    assert_alike(found, expected)


def test_chats_of_the_server(tasks: Path, server: Running) -> None:
    options = f"model=demo,base_url=http://127.0.0.1:{server.port}/v1/chat/completions"
    found, _ = evaluated(
        tasks, "--model", "local-chat-completions", "--model_args", options,
        "--apply_chat_template", names=("made_answer",),
    )  # fmt: skip
    own, _ = evaluated(
        tasks, "--model", "windlass", "--model_args", "pretrained=demo,host_memory=1GiB,threads=1",
        "--apply_chat_template", names=("made_answer",),
    )  # fmt: skip
    assert len(found["made_answer"]) == 5
    assert found == own


def test_a_run_goes_on_from_the_harness_cache(tasks: Path) -> None:
    options = ("--model", "windlass", "--model_args", "pretrained=demo,host_memory=1GiB,threads=1",
               "--use_cache", str(tasks / "cache" / "db"))  # fmt: skip
    some, _ = evaluated(tasks, *options, "--limit", "2", names=("made_choice",))
    every, said = evaluated(tasks, *options, names=("made_choice",))
    assert f"Cached requests: 7, Requests remaining: {NUM_CHOICES - 7}" in said
    again, said = evaluated(tasks, *options, names=("made_choice",))
    assert f"Cached requests: {NUM_CHOICES}, Requests remaining: 0" in said
    assert some["made_choice"] == every["made_choice"][:2]
    assert again == every

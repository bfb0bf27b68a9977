"""lm-eval-harness: in this process, against the server and with transformers, on the same made
tasks. Numbers are what the harness logs of each request."""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from live_server import Running
from processes import PATIENCE_S
from windlass.options import resolve_model

HERE = Path(__file__).parent
TASKS = ("made_choice", "made_text", "made_answer")
NUM_CHOICES = 4 + 3 + 3 + 3 + 2
# transformers keeps keys and values as it computes them
HERE_ARGS = "pretrained=demo,host_memory=1GiB,threads=1,expert_usage=off,kv_cache_dtype=float32"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the harness and what it imports
]
lm_eval = pytest.importorskip("lm_eval", exc_type=ImportError)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The made tasks, with the place of their data written in; the model is registered."""
    folder = tmp_path_factory.mktemp("tasks")
    for path in (HERE / "tasks").glob("*.yaml"):
        text = path.read_text().replace("DATA", str(HERE / "tasks" / "made.jsonl"))
        (folder / path.name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HOME", str(folder / "home"))
        from windlass.evals.harness import register

        register()
        yield folder


def evaluated(
    tasks: Path, model: str, arguments: str, names: tuple[str, ...] = TASKS, **more: Any
) -> dict[str, list[Any]]:
    """What the model answered, by task and document."""
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=list(names), log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks)), **more,
    )  # fmt: skip
    samples = found["samples"]
    return {
        name: [row["resps"] for row in sorted(samples[name], key=lambda row: row["doc_id"])]
        for name in names
    }


@pytest.fixture(scope="module")
def expected(tasks: Path) -> dict[str, list[Any]]:
    return evaluated(tasks, "hf", f"pretrained={resolve_model('demo')},dtype=float32", device="cpu")


def assert_alike(found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    """Scores to 1e-4, everything else equal."""
    assert found["made_answer"] == expected["made_answer"]
    count = 0
    for ours, theirs in zip(found["made_choice"], expected["made_choice"], strict=True):
        for ((logprob, is_greedy),), ((other, other_is),) in zip(ours, theirs, strict=True):
            assert math.isclose(logprob, other, abs_tol=1e-4, rel_tol=0)
            assert is_greedy == other_is
            count += 1
    assert count == NUM_CHOICES
    for ours, theirs in zip(found["made_text"], expected["made_text"], strict=True):
        assert math.isclose(_total(ours), _total(theirs), abs_tol=1e-4, rel_tol=0)


def _total(answers: Any) -> float:
    """The one number of a document, however it is wrapped."""
    while isinstance(answers, (list, tuple)):
        (answers,) = answers
    return float(answers)


def test_scores_in_this_process_are_those_of_transformers(
    tasks: Path, expected: dict[str, list[Any]]
) -> None:
    assert_alike(evaluated(tasks, "windlass", HERE_ARGS), expected)


def test_scores_of_the_server_are_those_of_transformers(
    tasks: Path, expected: dict[str, list[Any]], server: Running
) -> None:
    arguments = (
        f"model=demo,base_url=http://127.0.0.1:{server.port}/v1/completions,"
        "tokenizer_backend=remote,num_concurrent=2"
    )
    assert_alike(evaluated(tasks, "local-completions", arguments), expected)


def test_chats_of_the_server(tasks: Path, server: Running) -> None:
    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    chats: dict[str, Any] = {"names": ("made_answer",), "apply_chat_template": True}
    found = evaluated(tasks, "local-chat-completions", f"model=demo,base_url={url}", **chats)
    assert len(found["made_answer"]) == 5
    assert found == evaluated(tasks, "windlass", HERE_ARGS, **chats)


def test_a_run_goes_on_from_the_harness_cache(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from windlass.evals import harness, scoring

    asked: list[int] = []
    inner = scoring.scores

    def breaking(jobs: Any, pairs: Any, note: Any) -> None:
        def noting(place: int, score: Any) -> None:
            note(place, score)
            asked.append(place)
            if len(asked) == 5:
                raise KeyboardInterrupt

        inner(jobs, pairs, noting)

    monkeypatch.setattr(harness, "scores", breaking)
    cache: dict[str, Any] = {"names": ("made_choice",), "use_cache": str(tasks / "cache" / "db")}
    with pytest.raises(KeyboardInterrupt):
        evaluated(tasks, "windlass", HERE_ARGS, **cache)
    found = evaluated(tasks, "windlass", HERE_ARGS, **cache)
    assert len(asked) == NUM_CHOICES  # none twice
    assert evaluated(tasks, "windlass", HERE_ARGS, **cache) == found
    assert len(asked) == NUM_CHOICES


def test_the_command(tasks: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "windlass.evals", "run", "--model", "windlass", "--model_args",
         HERE_ARGS, "--tasks", "made_choice", "--include_path", tasks, "--limit", "1"],
        capture_output=True, text=True, timeout=5 * PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|made_choice|" in done.stdout

"""Ray Data on a local cluster, with the demo model. Each driver is a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="ray is not installed: `make test-cluster` does it")
pytest.importorskip("pyarrow")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own are its business

HEAD = """
import json, sys
from pathlib import Path
import ray
ray.init(log_to_driver=False)
from windlass.ray import WindlassEngineProcessorConfig, build_processor
FOLDER = Path(sys.argv[1])
MODEL = {"model_source": "demo", "engine_kwargs": {"host_memory": "512MiB"}, "created": 0}
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster with one node, which is not given up while the machine is busy."""
    patient = {"health_check_timeout_ms": 60_000, "health_check_failure_threshold": 20}
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False,
        _system_config=patient,
    )  # fmt: skip
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def start(address: str, folder: Path, code: str) -> "subprocess.Popen[str]":
    """A driver of that code."""
    script = folder / "driver.py"
    script.write_text(HEAD + textwrap.dedent(code))
    environment = {**os.environ, "RAY_ADDRESS": address, "SOURCE_DATE_EPOCH": "0"}
    return subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def output_of(driver: "subprocess.Popen[str]", *, code: int = 0) -> tuple[str, str]:
    """What it said, once it has ended so."""
    said, complained = driver.communicate(timeout=400)
    assert driver.returncode == code, complained[-3000:]
    return said, complained


def test_the_example_of_the_documents(address: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    example = next(block for block in blocks if "build_processor" in block)
    said, _ = output_of(start(address, tmp_path, example))
    rows = sorted(line.split(" | ") for line in said.splitlines() if " | " in line)
    (first, answer, good), (second, _, bad) = rows
    assert (first, second, good) == ("a", "b", "") and answer
    assert "max_tokens: got -1" in bad


BODIES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Tell of the sea."}], "max_tokens": 9},
    {"prompt": "The town", "max_tokens": 7, "n": 2, "temperature": 0.9, "logprobs": 2},
    {"input": "Once", "max_output_tokens": 6, "seed": 3},
    {"prompt": "no such", "max_tokens": 5, "wind": 1},
]
URLS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/completions"]


def test_rows_have_the_answers_of_a_batch(address: str, tmp_path: Path) -> None:
    lines = [
        {"custom_id": f"row {i}", "method": "POST", "url": url, "body": body}
        for i, (url, body) in enumerate(zip(URLS, BODIES, strict=True))
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = ["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", "demo"]
    done = subprocess.run(
        [sys.executable, "-m", "windlass.cli", *batch, "--host-memory", "512MiB"],
        cwd=tmp_path, env={**os.environ, "SOURCE_DATE_EPOCH": "0"}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr  # one row is refused
    code = """
        config = WindlassEngineProcessorConfig(**MODEL, should_continue_on_error=True, batch_size=2)
        rows = [json.loads(line) for line in (FOLDER / "in.jsonl").read_text().splitlines()]
        rows = [{"custom_id": row["custom_id"], "text": json.dumps(row["body"])} for row in rows]
        ask = build_processor(config, preprocess=lambda row: {"body": json.loads(row["text"])})
        names = ("custom_id", "response", "__inference_error__")
        for row in ask(ray.data.from_items(rows)).take_all():
            print("ROW", json.dumps([row[name] for name in names]))
        try:
            config = WindlassEngineProcessorConfig(**MODEL)
            ask = build_processor(config, preprocess=lambda row: {"body": json.loads(row["text"])})
            ask(ray.data.from_items(rows[-1:])).take_all()
        except Exception as error:
            print("RAISED", "wind: not supported" in str(error))
    """
    said, _ = output_of(start(address, tmp_path, code))
    rows = [json.loads(line[4:]) for line in said.splitlines() if line.startswith("ROW ")]
    found = {name: (response, error) for name, response, error in rows}
    assert len(rows) == len(lines)
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        result = json.loads(line)
        response, error = found[result["custom_id"]]
        body = result["response"]["body"]
        if result["response"]["status_code"] == 200:
            assert json.loads(response) == body and error == ""
        else:
            assert body["error"]["message"] in error and response == ""
    assert "RAISED True" in said


def test_a_killed_run_goes_on_where_ray_has_marked_it(address: str, tmp_path: Path) -> None:
    count = 24
    code = f"""
        from ray.data.checkpoint import CheckpointConfig

        ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
            id_column="id", checkpoint_path=str(FOLDER / "checkpoint"),
            delete_checkpoint_on_success=False,
        )
        log = str(FOLDER / "asked")

        def preprocess(row):
            with open(log, "a") as file:
                file.write(f"{{row['id']}}\\n")
            params = {{"max_tokens": 100, "min_tokens": 100, "temperature": 1.0}}
            return {{"prompt": f"Row {{row['id']}}", "sampling_params": params}}

        config = WindlassEngineProcessorConfig(
            **MODEL, id_column="id", batch_size=2, max_concurrent_batches=1
        )
        ask = build_processor(
            config, preprocess=preprocess,
            postprocess=lambda row: {{"id": row["id"], "text": row["generated_text"]}},
        )
        rows = ray.data.range({count}, override_num_blocks={count // 2})
        ask(rows).write_json(str(FOLDER / "out"))
    """
    driver = start(address, tmp_path, code)
    marked = tmp_path / "checkpoint"
    deadline = time.monotonic() + 400
    while len(list(marked.glob("**/*.parquet"))) < 3:
        assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()[1][
            -3000:
        ]
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    output_of(driver, code=-signal.SIGKILL)
    first = rows_of(tmp_path / "out")
    assert 0 < len(first) < count
    (tmp_path / "asked").rename(tmp_path / "asked before")
    output_of(start(address, tmp_path, code))
    every = rows_of(tmp_path / "out")
    assert sorted(row["id"] for row in every) == list(range(count))
    assert all(row in every for row in first)
    again = (tmp_path / "asked").read_text().split()
    assert len(again) == len(set(again)) < count


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of all files."""
    files = sorted(folder.glob("**/*.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]

"""The command line in processes of its own: kill -9, signals, full disks, exit codes, options."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from processes import PATIENCE_S, running
from windlass import __version__
from windlass.cli import COMMANDS, main
from windlass.cli.engine_flags import REFUSED, engine_options, refuse_known, translate_known
from windlass.cli.flags import read_values
from windlass.errors import UsageError
from windlass.speculative import SpeculativeConfig

FAKE = Path(__file__).parents[1] / "support/fake_engine.py"
SRC = Path(__file__).parents[2] / "src"
NUM_ROWS = 30
# no file may grow beyond 5000 bytes: what a full disk looks like to a process
FULL_DISK = (
    "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY));"
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder and a job of `NUM_ROWS` rows, one of them malformed."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    lines = [
        json.dumps(
            {
                "custom_id": f"r{i}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": f"row {i}", "max_tokens": 4 + 5 * (i % 4), "n": 1 + i % 2},
            }
        )
        for i in range(NUM_ROWS - 1)
    ]
    lines.insert(7, "{torn")
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(FAKE), *arguments]


def batch(*more: str) -> list[str]:
    return command("run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "-m", "model", *more)


def environment(**changes: str) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("WINDLASS_")}
    return {**kept, "PYTHONPATH": str(SRC), "SOURCE_DATE_EPOCH": "1790000000", **changes}


def run(
    arguments: Sequence[str], folder: Path, **variables: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        arguments,
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def start(
    arguments: Sequence[str], folder: Path, **variables: str
) -> "AbstractContextManager[subprocess.Popen[str]]":
    return running(arguments, cwd=folder, env=environment(**variables))


def wait_for_records(folder: Path, number: int) -> None:
    """Until the journal has that many whole records."""
    journal = folder / "out.jsonl.journal"
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.005)
    raise AssertionError("the job did not get there")


def undisturbed(folder: Path) -> bytes:
    result = run(
        command("run-batch", "-i", "in.jsonl", "-o", "plain.jsonl", "-m", "model"),
        folder,
        FAKE_LOG="plain.log",
    )
    assert result.returncode == 3, result.stderr
    return (folder / "plain.jsonl").read_bytes()


def test_kill_9_at_any_moment_changes_no_byte_and_recomputes_little(folder: Path) -> None:
    expected = undisturbed(folder)
    slow = {"FAKE_STEP_S": "0.03", "FAKE_LOG": "log"}
    chance = random.Random(5)
    num_kills = 5
    for kill in range(num_kills):
        with start(batch(), folder, **slow) as process:
            wait_for_records(folder, 1 + kill * 5)
            time.sleep(chance.random() * 0.05)
            process.kill()
            process.communicate()
            assert process.returncode == -signal.SIGKILL
        assert not (folder / "out.jsonl").exists()
        if kill == 2:  # as if the machine had died inside a write
            with (folder / "out.jsonl.journal").open("ab") as file:
                file.write(b'{"id":"batch_req_')
    done = (folder / "out.jsonl.journal").read_bytes().count(b"\n")
    assert 15 < done < NUM_ROWS
    result = run(batch(), folder, **slow)
    assert result.returncode == 3, result.stderr
    assert result.stderr.startswith(f"resuming out.jsonl: {done} of {NUM_ROWS} rows done")
    assert (folder / "out.jsonl").read_bytes() == expected
    # every record once: no finished row was computed again
    records = (folder / "out.jsonl.journal").read_bytes().splitlines()
    assert len(records) == NUM_ROWS
    computed, needed = (folder / "log").stat().st_size, (folder / "plain.log").stat().st_size
    in_flight = 4 * 19 * 2  # capacity, longest row, n; at each kill
    assert needed < computed <= needed + num_kills * in_flight


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_cleanly_and_says_how_to_go_on(folder: Path, number: int) -> None:
    expected = undisturbed(folder)
    with start(batch("--overwrite", "--json"), folder, FAKE_STEP_S="0.05") as process:
        wait_for_records(folder, 3)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "Traceback" not in err
    again = "windlass run-batch -i in.jsonl -o out.jsonl -m model --json"
    assert err.rstrip().endswith(again)
    document = json.loads(out.splitlines()[-1])
    assert document["status"] == "interrupted"
    assert document["request_counts"]["total"] == NUM_ROWS
    result = run(command(*again.split()[1:]), folder)
    assert result.returncode == 3
    assert (folder / "out.jsonl").read_bytes() == expected


def test_two_signals_end_at_once(folder: Path) -> None:
    with start(batch(), folder, FAKE_STEP_S="60") as process:
        while not (folder / "out.jsonl.manifest.json").exists():  # written before the first step
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        assert process.stderr is not None
        while "finishing the pass under way" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert time.monotonic() - begin < 55, "a step takes 60"
    assert err.endswith("Go on with:\n  windlass run-batch -i in.jsonl -o out.jsonl -m model\n")
    assert run(batch(), folder).returncode == 3


def test_a_signal_while_loading_says_what_is_true_and_overwrites_nothing(folder: Path) -> None:
    with start(batch(), folder, FAKE_STEP_S="0.05") as process:
        wait_for_records(folder, 3)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
    before = (folder / "out.jsonl.journal").read_bytes()
    for more, again in (((), ""), (("--overwrite",), " --overwrite")):
        with start(batch(*more), folder, FAKE_OPEN_S="30") as process:
            assert process.stderr is not None
            while "loading" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130
        assert "interrupted before this run computed a row; results of earlier runs are safe" in err
        assert err.endswith(f"windlass run-batch -i in.jsonl -o out.jsonl -m model{again}\n")
        assert (folder / "out.jsonl.journal").read_bytes() == before


def test_a_full_disk_is_reported_and_the_job_goes_on_later(folder: Path) -> None:
    expected = undisturbed(folder)
    result = run([sys.executable, "-c", FULL_DISK, *batch()[1:]], folder)
    assert result.returncode == 1, result.stderr
    assert "no room left" in result.stderr and "same command again" in result.stderr
    assert "Traceback" not in result.stderr
    data = (folder / "out.jsonl.journal").read_bytes()
    assert 0 < len(data) <= 5000 and data.endswith(b"\n")
    done = data.count(b"\n")
    result = run(batch(), folder)
    assert f"{done} of {NUM_ROWS} rows done" in result.stderr
    assert (folder / "out.jsonl").read_bytes() == expected


def test_a_disk_too_full_for_the_output_keeps_the_results(folder: Path) -> None:
    expected = undisturbed(folder)
    assert run(batch(), folder).returncode == 3
    (folder / "out.jsonl").unlink()
    result = run([sys.executable, "-c", FULL_DISK, *batch()[1:]], folder)
    assert result.returncode == 1
    assert "no room left" in result.stderr
    assert not list(folder.glob("*.tmp"))
    assert run(batch(), folder).returncode == 3
    assert (folder / "out.jsonl").read_bytes() == expected


def test_a_rival_and_other_settings_are_refused(folder: Path) -> None:
    with start(batch(), folder, FAKE_STEP_S="0.5") as process:
        wait_for_records(folder, 2)
        rival = run(batch(), folder)
        assert (rival.returncode, "another windlass process" in rival.stderr) == (1, True)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
    for more, variables, text in (
        (["--seed", "4"], {}, "seed: the job has 0, now 4"),
        (["-ctk", "q8_0", "-ctv", "q8_0"], {}, "kv_cache_dtype: the job has 'auto', now 'int8'"),
        (["-a", "x"], {"FAKE_FINGERPRINT": "b"}, "served_model_name: the job has 'model', now 'x'"),
        ([], {"WINDLASS_GENERATION_CONFIG": "vllm"}, "generation_config: the job has 'auto'"),
    ):
        result = run(batch(*more), folder, **variables)
        assert result.returncode == 2
        assert text in result.stderr
    (folder / "model" / "config.json").write_text('{"a": 1}')
    assert "checkpoint: the job has" in run(batch(), folder).stderr
    assert run(batch("--threads", "1", "--overwrite"), folder).returncode == 3


def test_exit_codes_summary_and_json(folder: Path) -> None:
    result = run(batch("--json", "--error-file", "err.jsonl"), folder)
    assert result.returncode == 3
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"rows: {NUM_ROWS - 1} done, 1 with errors (in err.jsonl)")
    assert any(line.startswith("tokens: ") for line in lines)
    assert any(line.startswith("disk: ") and "75.0 %" in line for line in lines)
    assert any(line.startswith("memory: 1.00 MiB") for line in lines)
    document = json.loads(lines[-1])
    asked, found = document["prefix_cache_queries"], document["prefix_cache_hits"]
    assert document["total_input_tokens"] == asked > 0 and found == asked // 4
    assert any(line.startswith(f"tokens: {asked} in") for line in lines)
    said = f"shared prefixes: {found} of {asked} prompt tokens found ({100 * found / asked:.1f} %)"
    assert said in lines
    assert document["status"] == "completed"
    assert document["request_counts"] == {
        "total": NUM_ROWS, "completed": NUM_ROWS - 1, "failed": 1,
    }  # fmt: skip
    assert document["bytes_read"] > 0 and document["output_throughput"] > 0
    assert document["peak_rss_bytes"] == 1 << 20
    assert document["plan"] == {"host_memory": 1 << 20}
    good = [text for text in (folder / "in.jsonl").read_text().splitlines() if "torn" not in text]
    (folder / "in.jsonl").write_text("\n".join(good))
    assert run(batch(), folder).returncode == 0
    for wrong in ("now", "999999999999"):
        late = run(batch(), folder, SOURCE_DATE_EPOCH=wrong)
        assert (late.returncode, f"SOURCE_DATE_EPOCH: got '{wrong}'" in late.stderr) == (2, True)
    failed = run(batch("--json", "-m", "nowhere"), folder)
    assert failed.returncode == 2
    assert json.loads(failed.stdout.splitlines()[-1])["status"] == "failed"


def test_a_trace_never_lands_on_a_file_of_the_job(folder: Path) -> None:
    before = (folder / "in.jsonl").read_bytes()
    result = run(batch("--trace", "./in.jsonl"), folder)
    assert (result.returncode, "trace: got 'in.jsonl'" in result.stderr) == (2, True)
    assert (folder / "in.jsonl").read_bytes() == before


def test_duplicates_are_refused_before_anything_is_loaded(folder: Path) -> None:
    with (folder / "in.jsonl").open("a") as file:
        file.write((folder / "in.jsonl").read_text().splitlines()[0])
    result = run(batch(), folder)
    assert result.returncode == 2
    assert f"'r0': lines 1 and {NUM_ROWS + 1}" in result.stderr
    assert "loading" not in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "model"]


def test_generate_streams_and_ends_with_json(folder: Path) -> None:
    result = run(command("generate", "-m", "model", "Hello", "-n", "8", "--json"), folder)
    assert result.returncode == 0, result.stderr
    text, document = result.stdout.splitlines()
    assert json.loads(document)["text"] == text
    assert 0 < len(text) <= 8
    assert result.stderr.startswith("plan: a fake one\n") and "tokens in" in result.stderr
    assert json.loads(document)["prediction"] is None  # a fake has none
    piped = subprocess.run(
        command("generate", "-m", "model", "-n", "8"),
        cwd=folder, env=environment(), input="Hello\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert piped.stdout == text + "\n"
    chat = run(command("generate", "-m", "model", "--chat", "--system", "Be", "Hello"), folder)
    assert chat.returncode == 0 and chat.stdout != text + "\n"
    wrong = run(command("generate", "-m", "model", "--system", "Be", "Hello"), folder)
    assert wrong.returncode == 2
    hot = run(command("generate", "-m", "model", "--temperature", "-3", "Hello"), folder)
    assert (hot.returncode, "temperature" in hot.stderr) == (2, True)


@pytest.mark.parametrize("name", ["generate", "run-batch"])
def test_output_that_cannot_be_written_is_one_line(folder: Path, name: str) -> None:
    """Of a job, nobody needs to read the summary; on a full disk it was asked for and is lost."""
    words = batch("--json") if name == "run-batch" else command("generate", "-m", "model", "Hello")
    for target, code, said in (
        (">/dev/full", 1, "windlass: standard output: cannot be written: No space left on device"),
        (">&-", 3 if name == "run-batch" else 1, "windlass: standard output is closed"),
        ("| true", 3 if name == "run-batch" else 1, ""),
    ):
        line = f"{shlex.join(words)} {target}; exit ${{PIPESTATUS[0]}}"
        result = run(["bash", "-c", line], folder)
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr and "Exception" not in result.stderr
        own = [text for text in result.stderr.splitlines() if text.startswith("windlass:")]
        assert own == ([said] if said and code == 1 else [])
        if name == "run-batch":
            assert len((folder / "out.jsonl").read_bytes().splitlines()) == NUM_ROWS
            assert (folder / "out.jsonl.journal").read_bytes().count(b"\n") == NUM_ROWS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("slow", ["FAKE_OPEN_S", "FAKE_STEP_S"])
def test_a_signal_ends_generate_with_the_same_code(folder: Path, number: int, slow: str) -> None:
    line = command("generate", "-m", "model", "Hello")
    more = {slow: "30", "FAKE_LOG": "begun", "FAKE_OPENING": "opening"}
    with start(line, folder, **more) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not (folder / ("opening" if slow == "FAKE_OPEN_S" else "begun")).exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130
        assert "Traceback" not in err


def test_synth_writes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "vocab_size": 300,
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "norm_topk_prob": False, "max_position_embeddings": 64,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "clip_qkv": None,
        "attention_bias": False, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(config))
    out = tmp_path / "model"
    words = ["synth", "--config", str(tmp_path / "c.json"), "--out", str(out), "--json"]
    assert main([*words, "--num-layers", "1", "--dtype", "float32"]) == 0
    written = json.loads((out / "config.json").read_text())
    assert (written["num_hidden_layers"], written["dtype"]) == (1, "float32")
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["bytes"] == (out / "model.safetensors").stat().st_size
    assert main(words) == 2  # the folder is not empty
    assert main(["synth", "--config", "nowhere.json", "--out", str(out)]) == 2
    assert main(["synth", "--config", "no-preset", "--out", str(out)]) == 2
    assert "qwen3-30b-a3b" in capsys.readouterr().err


def test_a_finished_job_is_told_from_the_outside_without_torch() -> None:
    code = (
        "import sys, windlass.batch.job, windlass.batch.progress\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
    )
    result = run([sys.executable, "-c", code], SRC)
    assert result.returncode == 0, result.stderr


def test_help_and_import_load_nothing_heavy() -> None:
    code = (
        "import sys, windlass.cli\n"
        "for words in (['--help'], ['run-batch', '--help'], ['generate', '--help'],\n"
        "              ['quantize', '--help'], ['synth', '--help'], ['--version'],\n"
        "              ['bench', 'serve', '--help'],\n"
        "              ['run-batch', '--nope']):\n"
        "    windlass.cli.main(words)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers', 'jinja2', 'rich',\n"
        "         'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = run([sys.executable, "-c", code], SRC)
    assert result.returncode == 0, result.stderr
    assert "run-batch" in result.stdout
    assert run([sys.executable, "-m", "windlass.cli", "-V"], SRC).stdout == (
        f"windlass {__version__}\n"
    )


# --- options ---

MODEL = {"--model", "-m", "-hf", "--hf-repo", "--revision"}
ENGINE = MODEL | {
    "--tokenizer", "--tokenizer-revision", "--dtype", "--quantization", "-q", "--load-format",
    "--load-mode", "-lm",
    "--generation-config", "--max-model-len", "-c", "--ctx-size", "--seed", "-s", "--host-memory",
    "--moe-expert-cache-size", "--moe-expert-cache", "--kv-cache-dtype",
    "--max-num-seqs", "-np", "--parallel",
    "--max-num-batched-tokens", "-b", "--batch-size", "--micro-batch-size", "-ub", "--ubatch-size",
    "--threads", "-t", "--moe-backend", "--trace", "--config", "--schedule", "--plan", "--strict",
    "--routing-trace", "--routing-trace-inputs",
    "--speculative-config",
    "--enable-prefix-caching",
    "--expert-usage", "--expert-forecast", "--expert-cache-policy", "--expert-map-store",
    "--no-enable-prefix-caching",
    "--burst-tokens", "--batch-groups", "--enforce-eager", "--device", "-dev", "--device-memory",
    "--kv-offloading-share",
}  # fmt: skip
OPTIONS = {
    "run-batch": ENGINE | {
        "--input-file", "-i", "--output-file", "-o", "--error-file", "--overwrite", "--resume",
        "--max-retries", "--no-retry-failed", "--json", "--served-model-name", "-a", "--alias",
        "--tool-call-parser", "--reasoning-parser", "--replicas", "--ray-address",
    },
    "serve": ENGINE | {
        "--host", "--port", "--api-key", "--served-model-name", "-a", "--alias",
        "--sse-ping-interval", "--max-requests", "--max-body-size", "--shutdown-timeout",
        "--data-dir", "--max-file-size", "--max-stored-size", "--request-timeout",
        "--tool-call-parser", "--reasoning-parser",
    },
    "bench serve": {
        "--backend", "--endpoint-type", "--base-url", "--host", "--port", "--endpoint", "--api-key",
        "--model", "-m", "--dataset-name", "--dataset-path", "--num-prompts", "--random-input-len",
        "--input-len", "--random-output-len", "--output-len", "--random-prefix-len",
        "--random-range-ratio", "--custom-output-len", "--seed", "--ignore-eos", "--temperature",
        "--extra-body", "--request-rate", "--burstiness", "--max-concurrency",
        "--ready-check-timeout-sec", "--num-warmups", "--percentile-metrics",
        "--metric-percentiles", "--goodput", "--save-result", "--save-detailed", "--result-dir",
        "--result-filename", "--label", "--disable-tqdm", "--config",
    },
    "generate": ENGINE | {
        "--chat", "--system", "--max-tokens", "-n", "--temperature", "--temp", "--top-p", "--top-k",
        "--min-p", "--repetition-penalty", "--stop", "--ignore-eos", "--json",
    },
    "quantize": MODEL | {
        "--out", "-o", "--format", "--group", "--experts-only", "--threads", "-t",
        "--text", "--window", "--host-memory", "--verbose", "--json", "--config",
    },
    "synth": {
        "--model-config", "--config", "--out", "-o", "--num-layers", "--dtype", "--shard-size",
        "--seed", "-s", "--json",
    },
    "plan": (ENGINE - {"--plan", "--trace", "--routing-trace", "--routing-trace-inputs",
                       "--expert-cache-policy", "--expert-map-store", "--load-format",
                       "--generation-config"}) | {
        "--workload", "-i", "--prompt-len", "--output-len", "--num-requests", "--machine",
        "--hardware", "--replay", "--json",
    },
    "replay": {
        "--expert-forecast", "--expert-cache-policy", "--resident", "--oracle", "--max-num-seqs",
        "-np", "--passes", "--guard", "--no-guard", "--prompts", "--rho", "--machine", "--model",
        "-m", "-hf", "--hf-repo", "--json", "--page", "--config",
    },
    "doctor": MODEL | {
        "--fresh", "--json", "--device", "-dev", "--threads", "-t", "--moe-backend", "--dtype",
        "--load-mode", "-lm", "--config",
    },
}  # fmt: skip


def test_every_option_of_every_command_is_known_here() -> None:
    """A new option needs a test and a line in the documentation: then add it here."""
    found = {each.name: {name for flag in each.flags for name in flag.names} for each in COMMANDS}
    assert found == OPTIONS
    for each in COMMANDS:
        names = [name for flag in each.flags for name in flag.names]
        assert len(names) == len(set(names))
        assert not set(names) & set(REFUSED)


def values(*arguments: str, name: str = "run-batch", **variables: str) -> dict[str, Any]:
    found = next(each for each in COMMANDS if each.name == name)
    needed = ["-i", "a", "-o", "b"] if name == "run-batch" else []
    return read_values(found, [*needed, *arguments], variables)


def test_values_become_engine_options() -> None:
    options = engine_options(
        values(
            "-m",
            "demo",
            "--host-memory",
            "2GiB",
            "--moe-expert-cache",
            "8",
            "-np",
            "5",
            "-b",
            "6",
            "-ub",
            "7",
            "-c",
            "8k",
            "-s",
            "9",
            "-t",
            "1",
            "--load-format",
            "dummy",
            "-lm",
            "dio",
            "--trace",
            "t.json",
            "--routing-trace",
            "t.routes",
            "--routing-trace-inputs",
            "--generation-config",
            "vllm",
            "--tokenizer",
            "tok",
            "--moe-backend",
            "torch",
            "--kv-cache-dtype",
            "int8",
            "--schedule",
            "model-based",
            "--burst-tokens",
            "0",
            "--batch-groups",
            "3",
            "-dev",
            "cuda:1",
            "--device-memory",
            "7GiB",
            "--kv-offloading-share",
            "0.5",
            "--plan",
            "p.json",
            "--speculative-config",
            '{"method": "ngram", "num_speculative_tokens": 2}',
        )  # fmt: skip
    )
    assert (options.model, options.host_memory, options.moe_expert_cache_size) == (
        "demo", 2 << 30, "8",
    )  # fmt: skip
    assert options.speculative_config == SpeculativeConfig(method="ngram", num_speculative_tokens=2)
    with pytest.raises(UsageError, match=r"^--speculative-config: method: got 'eagle'"):
        values("--speculative-config", '{"method": "eagle"}')
    assert (options.max_num_seqs, options.max_num_batched_tokens) == (5, 6)
    assert (options.micro_batch_size, options.max_model_len) == (7, 8192)
    assert (options.seed, options.threads, options.load_format) == (9, 1, "dummy")
    assert (options.load_mode, options.trace) == ("dio", Path("t.json"))
    assert (options.routing_trace, options.routing_trace_inputs) == (Path("t.routes"), True)
    assert (options.generation_config, options.tokenizer) == ("vllm", "tok")
    assert (options.moe_backend, options.kv_cache_dtype) == ("torch", "int8")
    assert (options.schedule, options.plan) == ("model-based", Path("p.json"))
    assert (options.burst_tokens, engine_options(values()).burst_tokens) == (0, None)
    assert (options.batch_groups, engine_options(values()).batch_groups) == (3, None)
    assert (options.device, options.device_memory) == ("cuda:1", 7 << 30)
    assert (options.kv_offloading_share, values()["kv_offloading_share"]) == (0.5, None)
    assert (engine_options(values()).device, values()["device_memory"]) == ("auto", None)
    for wrong in ("gpu", "cuda:", "cuda:x", "CUDA"):
        with pytest.raises(UsageError, match=rf"^--device: got '{wrong}', allowed auto, cpu, cuda"):
            values("--device", wrong)
    with pytest.raises(UsageError, match="^--device-memory: got '7', allowed a number with a unit"):
        values("--device-memory", "7")
    with pytest.raises(UsageError, match="^device_memory: got one beside device cpu, allowed"):
        engine_options(values("--device", "cpu", "--device-memory", "7GiB"))
    with pytest.raises(UsageError, match="burst-tokens"):
        values("--burst-tokens", "-1")
    plain = engine_options(values())
    assert (plain.model, plain.host_memory, plain.max_model_len) == ("demo", None, None)
    assert engine_options(values("-c", "-1")).max_model_len is None


def test_what_is_on_by_default_can_be_switched_off(tmp_path: Path) -> None:
    def found(*arguments: str, **variables: str) -> bool:
        return engine_options(values(*arguments, **variables)).enable_prefix_caching

    off, on = "--no-enable-prefix-caching", "--enable-prefix-caching"
    assert found() and found(on) and not found(off)
    assert not found(WINDLASS_ENABLE_PREFIX_CACHING="0")
    assert found(on, WINDLASS_ENABLE_PREFIX_CACHING="0") and found(off, on) and not found(on, off)
    (tmp_path / "c.toml").write_text("enable-prefix-caching = false")
    assert not found("--config", str(tmp_path / "c.toml"))
    assert values()["no_retry_failed"] is False and values("--no-retry-failed")["no_retry_failed"]
    with pytest.raises(UsageError, match="unknown option: --no-no-retry-failed"):
        values("--no-no-retry-failed")


def test_context_length_0_is_the_models_own(tmp_path: Path) -> None:
    from windlass.checkpoint.synthetic import preset

    (tmp_path / "config.json").write_text(json.dumps(preset("olmoe-1b-7b")))
    assert engine_options(values("-c", "0", "-m", str(tmp_path))).max_model_len == 4096


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('seed = 1\nthreads = 2\nhost-memory = "1GiB"\n[run-batch]\nstrict = true\n')
    got = values("--config", str(file), "--seed", "3", WINDLASS_SEED="2", WINDLASS_THREADS="4")
    assert (got["seed"], got["threads"], got["host_memory"]) == (3, 4, 1 << 30)
    assert got["strict"] is True and got["max_retries"] == 2
    assert values(WINDLASS_CONFIG=str(file))["seed"] == 1
    assert values(WINDLASS_STRICT="off", WINDLASS_CONFIG=str(file))["strict"] is False


@pytest.mark.parametrize(
    ("arguments", "variables", "text"),
    [
        (["--max-num-seq", "3"], {}, "did you mean --max-num-seqs?"),
        (["extra"], {}, "unexpected argument: 'extra'"),
        (["--seed", "x"], {}, "--seed: got 'x', allowed an integer"),
        (["--seed", "-3"], {}, "--seed: got '-3'"),
        (["--max-num-seqs", "0"], {}, "from 1"),
        (["--max-model-len", "-2"], {}, "--max-model-len: got '-2'"),
        (["--max-model-len=-1k"], {}, "--max-model-len: got '-1'"),
        (["--host-memory", "24"], {}, "--host-memory: got '24', allowed a number with a unit"),
        (["--moe-expert-cache-size", "lots"], {}, "--moe-expert-cache-size: got 'lots'"),
        (["--load-mode", "mmap"], {}, "allowed auto, dio, buffered"),
        (["--moe-backend", "marlin"], {}, "allowed auto, triton, torch, cpu"),
        (["--dtype", "int3"], {}, "--dtype: got 'int3'"),
        (
            ["--kv-cache-dtype", "fp8"],
            {},
            "got 'fp8', allowed auto, bfloat16, float16, float32, int8",
        ),
        (["-i", "http://x"], {}, "--input-file: got 'http://x', allowed a local file"),
        (["-i", "-"], {}, "allowed a local file"),
        (["--seed"], {}, "expected one argument"),
        ([], {"WINDLASS_SEED": "x"}, "WINDLASS_SEED: got 'x'"),
        ([], {"WINDLASS_STRICT": "maybe"}, "WINDLASS_STRICT: got 'maybe'"),
        (["--config", "nowhere.toml"], {}, "nowhere.toml: No such file"),
    ],
)
def test_wrong_values_name_flag_value_and_what_is_allowed(
    arguments: list[str], variables: dict[str, str], text: str
) -> None:
    with pytest.raises(UsageError) as caught:
        values(*arguments, **variables)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("sed = 1", "unknown option: sed (did you mean seed?)"),
        ("seed = [1]", "seed: got [1]"),
        ("seed = ", "c.toml"),
        ("seed = 1.5", "seed: got '1.5'"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "c.toml").write_text(content)
    with pytest.raises(UsageError) as caught:
        values("--config", str(tmp_path / "c.toml"))
    assert text in str(caught.value)


def test_known_flags_of_others_are_refused_unless_they_ask_for_nothing() -> None:
    for name, (harmless, _) in REFUSED.items():
        with pytest.raises(UsageError, match="not supported"):
            refuse_known(["-i", "a", name, "7"])
        with pytest.raises(UsageError, match="not supported"):
            refuse_known([f"{name}=7"])
        for value in harmless:
            assert refuse_known(["-i", "a", name, value, "-o"]) == ["-i", "a", "-o"]
            assert refuse_known([f"{name}={value}"]) == []
    assert refuse_known(["--", "-ngl"]) == ["--", "-ngl"]


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("f16", "float16"), ("bf16", "bfloat16"), ("f32", "float32"), ("q8_0", "int8")],
)
def test_llama_cpps_cache_types_are_one_option_here(word: str, dtype: str) -> None:
    wanted = ["--kv-cache-dtype", dtype]
    assert translate_known(["-i", "a", "-ctk", word, f"-ctv={word}"]) == ["-i", "a", *wanted]
    words = [f"--cache-type-v={word}", "--cache-type-k", word, "-s", "1", "--", "-ctk"]
    assert translate_known(words) == ["-s", "1", *wanted, "--", "-ctk"]
    assert values(*translate_known(words[:-2]))["kv_cache_dtype"] == dtype


@pytest.mark.parametrize(
    "words", [["-ctk", "q8_0"], ["-ctk", "q8_0", "-ctv", "f16"], ["-ctk", "q4_0", "-ctv", "q4_0"],
              ["-ctv"]],
)  # fmt: skip
def test_other_cache_types_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"allowed f16, bf16, f32, q8_0, the same for -ctk and"):
        translate_known(words)
    assert main(["generate", *words, "Hello"]) == 2


@pytest.mark.parametrize("own", [["--kv-cache-dtype", "float16"], ["--kv-cache-dtype=auto"]])
def test_cache_types_that_contradict_each_other_are_refused(own: list[str]) -> None:
    types = ["-ctk", "q8_0", "-ctv", "q8_0"]
    for words in ([*own, *types], [*types, *own]):
        with pytest.raises(UsageError, match="allowed only int8: they mean the same"):
            translate_known(words)
        assert main(["generate", *words, "Hello"]) == 2
    same = ["--kv-cache-dtype", "int8"]
    assert values(*translate_known([*same, *types]))["kv_cache_dtype"] == "int8"


def test_usage_errors_exit_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run-batch"]) == 2
    assert "--input-file is missing" in capsys.readouterr().err
    assert main(["run-bach"]) == 2
    assert "did you mean run-batch?" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["run-batch", "--help=nothing-like-it"]) == 2
    assert main(["run-batch", "--help=memory"]) == 0
    assert "--host-memory SIZE" in capsys.readouterr().out
    monkeypatch.setenv("WINDLASS_SEDE", "1")
    assert main(["run-batch", "-i", "a", "-o", "b"]) == 2
    assert "unknown variable: WINDLASS_SEDE (did you mean WINDLASS_SEED?)" in (
        capsys.readouterr().err
    )

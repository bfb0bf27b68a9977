"""`windlass quantize` in processes of its own: kill -9, a full disk, memory, the command line."""

import json
import os
import random
import re
import resource
import signal
import sys
import time
from contextlib import AbstractContextManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from dequantised import dequantised
from processes import PATIENCE_S, forked, library_bytes, printing_to
from windlass.checkpoint import synthetic as synth
from windlass.cli import main
from windlass.device.process_memory import peak_resident_bytes
from windlass.quantize import output_folder, writer
from windlass.quantize.convert import QuantizeOptions, quantize
from windlass.quantize.scheme import make_scheme

CONFIG: dict[str, Any] = {
    **synth.PRESETS["qwen3-moe-1b"],
    "vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256,
    "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
}  # fmt: skip
SHARD_BYTES = 80_000  # many small files, so that there are many places to be killed at


def job(model: Path, out: Path, limits: dict[str, float]) -> None:
    """What a process of its own does. No file may grow beyond `file_bytes`: what a full disk looks
    like to a process. Without `sync_s` every tensor is made durable."""
    output_folder._SYNC_EVERY_S = limits.get("sync_s", 0)
    if file_bytes := limits.get("file_bytes"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_bytes), resource.RLIM_INFINITY))
    before, libraries = peak_resident_bytes(), library_bytes()
    options = QuantizeOptions(
        model=str(model), out=out, scheme=make_scheme("int4", 32), threads=2,
        shard_bytes=int(limits.get("shard_bytes", SHARD_BYTES)),
    )  # fmt: skip
    result = quantize(options, say=print)
    more = max(0, library_bytes() - libraries)
    print("bytes", result.source_bytes, "KiB", (peak_resident_bytes() - before - more) >> 10)


def started(model: Path, out: Path, **limits: float) -> AbstractContextManager[BaseProcess]:
    """The job under way; what it prints goes to the folder of `out`."""
    return forked(printing_to, out.parent, job, model, out, limits)


class Ended(NamedTuple):
    returncode: int | None
    stdout: str
    stderr: str


def run(model: Path, out: Path, **limits: float) -> Ended:
    with started(model, out, **limits) as process:
        process.join(PATIENCE_S)
        printed = [(out.parent / name).read_text() for name in ("stdout", "stderr")]
        return Ended(process.exitcode, *printed)


def undisturbed(model: Path, out: Path, *, shard_bytes: int) -> None:
    """The same in this process."""
    options = QuantizeOptions(
        model=str(model), out=out, scheme=make_scheme("int4", 32), shard_bytes=shard_bytes
    )
    quantize(options, say=lambda text: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    synth.write_random_checkpoint(CONFIG, tmp_path / "model")
    return tmp_path / "model"


def test_kill_9_at_any_moment_changes_no_byte_and_repeats_one_tensor(
    model: Path, tmp_path: Path
) -> None:
    undisturbed(model, tmp_path / "plain", shard_bytes=SHARD_BYTES)
    expected = contents(tmp_path / "plain")
    assert len([name for name in expected if name.endswith(".safetensors")]) > 4
    total = len(expected["quantize-report.jsonl"].splitlines())
    out, chance = tmp_path / "out", random.Random(7)
    report = out / "quantize-report.jsonl"
    done = 0
    for kill in range(3):
        wanted = done + (0 if kill == 0 else chance.randrange(1, total // 3))
        with started(model, out) as process:
            while process.is_alive():
                if report.exists() and report.read_bytes().count(b"\n") >= wanted:
                    break
                time.sleep(0.001)
            time.sleep(chance.random() * 0.01)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
        assert not (out / "config.json").exists()
        whole = report.read_bytes()
        done = whole.count(b"\n")
        if kill == 1:  # as if the machine had died inside a write
            report.write_bytes(whole + b'{"tensor": "model.lay')
    assert 5 < done < total
    result = run(model, out)
    assert result.returncode == 0, result.stderr
    assert f"going on: {done} of {total} tensors finished" in result.stdout
    assert contents(out) == expected
    read = int(re.findall(r"bytes (\d+)", result.stdout)[0])
    tensors = load_file(model / "model.safetensors")
    sizes = {name: x.numel() * x.element_size() for name, x in tensors.items()}
    names = [json.loads(line)["tensor"] for line in report.read_text().splitlines()]
    assert read == sum(sizes[name] for name in names[done:])  # nothing that was finished


def test_a_full_disk_is_reported_and_the_command_goes_on_later(model: Path, tmp_path: Path) -> None:
    undisturbed(model, tmp_path / "plain", shard_bytes=10**9)
    result = run(model, tmp_path / "out", shard_bytes=10**9, file_bytes=400_000)
    assert result.returncode == 1
    assert "model.safetensors: cannot be written: File too large; what is finished" in result.stderr
    result = run(model, tmp_path / "out", shard_bytes=10**9)
    assert result.returncode == 0 and "going on: " in result.stdout
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_memory_does_not_depend_on_the_size_of_the_model_or_of_a_tensor(tmp_path: Path) -> None:
    """Single tensors of 40 and 62 MiB, 185 MiB in all, which the job needs 90 MiB for."""
    config = {
        **CONFIG, "hidden_size": 2048, "vocab_size": 16_000, "num_hidden_layers": 2,
        "intermediate_size": 10_000, "num_experts": 4, "tie_word_embeddings": True,
        "mlp_only_layers": [0],
    }  # fmt: skip
    size = synth.write_random_checkpoint(config, tmp_path / "model", tokenizer=False)
    assert size > 180 << 20
    result = run(tmp_path / "model", tmp_path / "out", shard_bytes=4 << 30, sync_s=1)
    assert result.returncode == 0, result.stderr
    read, kib = map(int, re.findall(r"bytes (\d+) KiB (\d+)", result.stdout)[0])
    assert read > 180 << 20
    assert kib < 110 << 10


# --- the command line ---


def words(model: Path, out: Path, *more: str) -> list[str]:
    return ["quantize", "-m", str(model), "-o", str(out), *more]


def test_the_command_prints_every_error_and_says_when_nothing_is_left_to_do(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(model, tmp_path / "out", "--format", "int4", "--json", "-t", "1")
    assert main(arguments) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    tensors = load_file(model / "model.safetensors")
    grouped = {re.sub(r"\.experts\.\d+\.", ".experts.*.", name) for name in tensors}
    # rows of 64 do not fit groups of 128: said on standard error, and on the line
    assert {line.partition(": ")[0] for line in lines[: len(grouped)]} == grouped
    assert "which vLLM does not load" in printed.err
    (line,) = [one for one in lines if one.startswith("model.layers.0.mlp.experts.*.up_proj")]
    assert re.search(r": 8 experts, error 0\.10\d median, 0\.10\d worst \(expert \d+\)", line)
    assert "model.layers.1.mlp.up_proj.weight: error 0.10" in printed.out
    document = json.loads(lines[-1])
    assert document["bytes_before"] > 1.5 * document["bytes_after"]
    assert (document["format"], document["was_finished"]) == ("int4", False)
    before = contents(tmp_path / "out")
    assert main([*arguments, "--verbose"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "was finished before; nothing was written" in lines[-2]
    assert {line.partition(": ")[0] for line in lines[: len(tensors)]} == set(tensors)
    assert contents(tmp_path / "out") == before
    assert main(words(model, tmp_path / "out", "--format", "int8")) == 2
    assert "belongs to another command" in capsys.readouterr().err


def test_threads_change_no_byte(model: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for threads in ("1", "3"):
        out = tmp_path / threads
        assert main(words(model, out, "--format", "int8", "--group", "64", "-t", threads)) == 0
    assert torch.get_num_threads() == 2  # as it was
    torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert len(dequantised(tmp_path / "1")) == len(load_file(model / "model.safetensors"))


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--format", "int4", "--group", "16"], "--group: got '16', allowed 32, 64, 128"),
        (["--format", "fp8"], "--format: got 'fp8', allowed int4, int8"),
        ([], "--format is missing"),
        (["--format", "int8", "--window", "64"], "--window: allowed only with --text"),
        (["--format", "int8", "--host-memory", "1GiB"], "--host-memory: allowed only with --text"),
        (["--format", "int8", "--text", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--format", "int8", "--text", "."], "text: .: Is a directory"),
        (["--format", "int8", "--text", "bad.txt"], "bad.txt: not UTF-8"),
        (["--format", "int8", "--text", "empty.txt"], "empty.txt is empty"),
        (["--format", "int8", "--text", "big.txt"], "big.txt has 64.00 MiB, allowed"),
        (["--format", "int8", "--text", "a.txt", "--window", "32768"], "window: got 32768"),
        (["--format", "int8", "--text", "a.txt", "--window", "1"], "--window: got '1'"),
    ],
)  # fmt: skip
def test_wrong_usage_ends_before_anything_is_written(
    model: Path,
    tmp_path: Path,
    more: list[str],
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.txt").write_bytes(b"\xff\xfe")
    Path("empty.txt").write_text(" \n")
    Path("a.txt").write_text("a b c")
    with Path("big.txt").open("wb") as file:
        file.truncate((64 << 20) + 1)
    assert main(words(model, tmp_path / "out", *more)) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def interrupted_job(arguments: list[str]) -> None:
    """The command, which gets a Ctrl-C while it rounds its 20th tile."""
    real, calls = writer._round, []

    def slow(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_round", slow)
        sys.exit(main(arguments))


def test_ctrl_c_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    arguments = words(model, tmp_path / "out", "--format", "int8")
    with forked(printing_to, tmp_path, interrupted_job, arguments) as process:
        process.join(PATIENCE_S)
        assert process.exitcode == 130
    again = (tmp_path / "stderr").read_text().rstrip().splitlines()[-1].split()
    assert again == ["windlass", *arguments]
    assert len((tmp_path / "out" / "quantize-report.jsonl").read_text().splitlines()) > 10
    assert main(again[1:]) == 0
    assert main(words(model, tmp_path / "plain", "--format", "int8")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")

"""Names on the hub become folders here: which files come, what goes on after an interruption, and
what is said where they do not come. A server on this machine speaks the hub's protocol."""

import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants as constants
import pytest

import windlass.hub.download as download
import windlass.hub.headers as headers
from hub_server import TOKEN, Repo, environment, files_of, hub_server, is_large
from windlass import LLM, SamplingParams
from windlass.checkpoint.safetensors import INDEX_FILE, read_headers
from windlass.checkpoint.synthetic import write_random_checkpoint
from windlass.cli import main
from windlass.errors import CheckpointError, ModelError, UsageError
from windlass.hub.locate import identity_of, locate
from windlass.options import EngineOptions
from windlass.units import MIB

CONFIG = {
    "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "vocab_size": 300,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "norm_topk_prob": False, "max_position_embeddings": 64,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "clip_qkv": None,
    "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
# What other programs keep beside: none of it is needed
OTHERS = {
    name: b"{}" * 50
    for name in ("README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf",
                 "original/consolidated.00.pth", "original/params.json", "onnx/config.json",
                 "consolidated.safetensors", "consolidated.safetensors.index.json",
                 "modeling_olmoe.py", "model-extra.safetensors", "logo.png")
}  # fmt: skip
WEIGHTS = ".safetensors"
FAKE = Path(__file__).parents[1] / "support/fake_engine.py"
SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of several weight files."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    write_random_checkpoint(CONFIG, folder, shard_bytes=20_000)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture
def repo(checkpoint: Path) -> Repo:
    return Repo.of({**files_of(checkpoint), **OTHERS})


@pytest.fixture
def hub(repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub with org/tiny, and huggingface_hub led there: it reads its variables at import."""
    with hub_server(org__tiny=repo) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home/token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(download, "_PAUSES_S", (0.0, 0.0))
        monkeypatch.setattr(headers, "_PAUSES_S", (0.0, 0.0))
        monkeypatch.chdir(tmp_path)
        yield server


def fetch(name="org/tiny", **more) -> Path:
    return Path(locate(EngineOptions(model=name, **more)).with_weights().model)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def weights_of(files) -> list[str]:
    return sorted(name for name in files if name.startswith("model-0"))


# --- what comes, and from where ---


def test_only_the_files_that_are_needed_come_and_only_once(hub, repo, checkpoint, tmp_path):
    folder = fetch()
    commit = repo.refs["main"]
    assert folder == tmp_path / "home/hub/models--org--tiny/snapshots" / commit
    assert (folder.parents[1] / "refs/main").read_text() == commit
    assert files_of(folder) == files_of(checkpoint)
    assert hub.sent(WEIGHTS) == sum(
        path.stat().st_size for path in checkpoint.glob("*.safetensors")
    )
    assert not any(one.has_token for one in hub.requests)
    hub.requests.clear()
    assert fetch() == folder
    assert not hub.asked("HEAD", "/resolve/") and not hub.asked("GET", "/resolve/")


def test_a_folder_wins_over_a_name_and_what_looks_like_a_path_is_one(hub, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "org/tiny")
    assert fetch() == Path("org/tiny")
    (tmp_path / "org/file").touch()
    for name in ("nowhere", "./org/no", "/org/no", "~/no", "a/b/c", "org/no/", "org/tiny:Q4_K_M",
                 "org/file", "../no", "org//no"):  # fmt: skip
        with pytest.raises(UsageError, match="allowed a checkpoint folder") as error:
            fetch(name)
        assert repr(name) in one_line(error)
    for name in ("demo", "org/tiny"):
        with pytest.raises(UsageError, match="revision: got 'x', allowed with a name on the hub"):
            fetch(name, revision="x")
    with pytest.raises(UsageError, match="tokenizer-revision: allowed with a tokenizer"):
        fetch("demo", tokenizer_revision="x")
    assert hub.requests == []


def test_revisions_are_branches_and_commits(hub, repo, checkpoint):
    files = files_of(checkpoint)
    old = repo.refs["main"]
    repo.push({**files, "generation_config.json": b'{"temperature": 0.5}'})
    repo.refs["refs/pr/4"] = old
    new = fetch()
    assert json.loads((new / "generation_config.json").read_text()) == {"temperature": 0.5}
    sent = hub.sent(WEIGHTS)
    for found in (fetch(f"org/tiny@{old}"), fetch(revision=old), fetch("org/tiny@refs/pr/4"),
                  fetch("org/tiny@refs/pr/4", revision="refs/pr/4")):  # fmt: skip
        assert found == new.with_name(old)
    assert hub.sent(WEIGHTS) == sent  # the same contents are linked
    with pytest.raises(UsageError, match="allowed one of the two"):
        fetch(f"org/tiny@{old}", revision="main")
    assert identity_of(new) == f"org/tiny@{repo.refs['main']}" != identity_of(new.with_name(old))
    assert len(identity_of(checkpoint)) == 32


def test_one_file_of_weights_needs_no_index(hub, tmp_path):
    folder = tmp_path / "single"
    write_random_checkpoint(CONFIG, folder)
    files = files_of(folder)
    hub.repos["org/single"] = Repo.of({**files, "consolidated.safetensors": b"x" * 99})
    assert files_of(fetch("org/single")) == files


def test_a_tokenizer_has_its_own_name_and_revision(hub, repo, checkpoint):
    files = {name: data for name, data in files_of(checkpoint).items() if "token" in name}
    other = hub.repos["org/tok"] = Repo.of({**files, "model.safetensors": b"x" * 99})
    first = other.refs["main"]
    other.push({})
    options = EngineOptions(model="demo", tokenizer="org/tok", tokenizer_revision=first)
    found = locate(options).with_weights()
    assert found.model == "demo" and found.tokenizer_revision is None
    assert found.tokenizer is not None and files_of(Path(found.tokenizer)) == files
    assert hub.sent(WEIGHTS) == 0


def test_random_weights_need_none(hub):
    folder = fetch(load_format="dummy")
    assert (folder / "config.json").exists() and not list(folder.glob("*.safetensors"))
    assert hub.sent(WEIGHTS) == 0


# --- what does not come ---


def test_a_gated_repository_wants_a_token_which_goes_to_the_hub_alone(hub, repo, monkeypatch):
    repo.is_gated = True
    with pytest.raises(UsageError, match=r"org/tiny: is gated: .*/org/tiny.*HF_TOKEN") as error:
        fetch()
    one_line(error)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.requests.clear()
    fetch()
    assert all(one.has_token for one in hub.asked("GET", "/resolve/"))
    contents = hub.asked("GET", "/content/")  # of another origin
    assert contents and not any(one.has_token for one in contents)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("org/none", "org/none: neither a folder here nor a repository on http://127"),
        ("org/tiny@v9", "org/tiny: got revision 'v9', which http://127"),
        ("a--b/c", "a--b/c: no folder here, and cannot be had"),
    ],
)
def test_what_is_absent_is_one_line(hub, capsys, name, text):
    with pytest.raises((UsageError, CheckpointError)) as error:
        fetch(name)
    assert one_line(error).startswith(text)
    code = 1 if "cannot be had" in text else 2
    for words in (["generate", "-m", name, "x"], ["plan", "-hf", name], ["doctor", "-m", name],
                  ["quantize", "-m", name, "--out", "q", "--format", "int8"],
                  ["run-batch", "-m", name, "-i", "a", "-o", "b"]):  # fmt: skip
        assert main(words) == code
        assert capsys.readouterr().err.startswith(f"windlass: {text}")


@pytest.mark.parametrize("is_meant", [True, False])
def test_offline_what_the_cache_has_goes_on(hub, repo, monkeypatch, caplog, tmp_path, is_meant):
    def leave():
        if is_meant:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        else:
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    with monkeypatch.context() as left:
        monkeypatch, before = left, monkeypatch
        leave()
        with pytest.raises(CheckpointError, match="org/tiny: ") as error:
            fetch()
        assert ("HF_HUB_OFFLINE is set" if is_meant else "http://127.0.0.1:9") in one_line(error)
    monkeypatch = before
    folder = fetch()
    repo.push({**repo.commits[folder.name], "generation_config.json": b"{}"})
    leave()
    assert fetch() == fetch(f"org/tiny@{folder.name}") == folder
    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING
                and one.name.startswith("windlass")]  # fmt: skip
    assert len(warnings) == (0 if is_meant else 2)
    for text in warnings:
        assert text.startswith(f"org/tiny: going on with commit {folder.name} of the cache: ")
    lost = weights_of(repo.commits[folder.name])[1]
    (folder / lost).unlink()
    with pytest.raises(CheckpointError, match=f"1 of .* weight files are not .*{lost}") as error:
        fetch()
    one_line(error)


def test_without_huggingface_hub_one_line_says_what_to_install(monkeypatch):
    for name in [one for one in sys.modules if one.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="pip install huggingface_hub") as error:
        fetch()
    one_line(error)
    assert fetch("demo") == Path("demo")


def test_what_windlass_does_not_run_is_refused_before_weights_come(hub, checkpoint):
    files = files_of(checkpoint)
    config = {**CONFIG, "model_type": "llama"}
    hub.repos["org/dense"] = Repo.of({**files, "config.json": json.dumps(config).encode()})
    with pytest.raises(ModelError, match="dense"):
        fetch("org/dense")
    left = {name: data for name, data in files.items() if not is_large(name) and name != INDEX_FILE}
    hub.repos["org/gguf"] = Repo.of({**left, "tiny-Q4_K_M.gguf": b"x" * 99})
    with pytest.raises(UsageError, match=r"org/gguf: found \.gguf, expected model") as error:
        fetch("org/gguf")
    one_line(error)
    assert hub.sent(WEIGHTS) == hub.sent(".gguf") == 0


def test_the_disk_is_looked_at_first(hub, tmp_path, monkeypatch):
    write_random_checkpoint(CONFIG, tmp_path / "single")
    files = files_of(tmp_path / "single")
    hub.repos["org/single"] = Repo.of(files)
    name = "model.safetensors"
    locate(EngineOptions(model="org/single"))  # the small files are here
    usage = shutil.disk_usage(tmp_path)

    def free(num_bytes):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=num_bytes))

    free(64 * MIB + len(files[name]) - 1)
    with pytest.raises(UsageError, match=r"org/single: needs 64\..* MiB more .*home/hub") as error:
        fetch("org/single")
    assert "HF_HOME" in one_line(error) and hub.sent(WEIGHTS) == 0
    free(64 * MIB + len(files[name]))
    hub.break_after[name] = [1] + [0] * 9  # one byte comes before it is given up
    with pytest.raises(CheckpointError):
        fetch("org/single")
    hub.break_after.clear()
    free(64 * MIB + len(files[name]) - 2)
    with pytest.raises(UsageError, match="needs 64"):
        fetch("org/single")
    free(64 * MIB + len(files[name]) - 1)  # only what is still missing needs room
    fetch("org/single")


# --- what breaks off goes on ---


def test_a_connection_that_breaks_goes_on_where_it_was(hub, repo, checkpoint):
    files = repo.commits[repo.refs["main"]]
    first, second, *_ = weights_of(files)
    hub.break_after = {first: [1000, 0, 500, 0, 1], second: [0, 0]}
    folder = fetch()
    assert files_of(folder) == files_of(checkpoint)
    assert hub.sent(WEIGHTS) == sum(len(files[name]) for name in weights_of(files))
    begins = [one.range.split("-")[0] for one in hub.asked("GET", "/content/") if one.range
              and one.path.endswith(first)]  # fmt: skip
    assert begins == [f"bytes={n}" for n in (0, 1000, 1000, 1500, 1500, 1501)]


@pytest.mark.parametrize("is_ranged", [True, False])
def test_an_interrupted_download_goes_on_in_the_next_run(hub, repo, checkpoint, is_ranged):
    files = repo.commits[repo.refs["main"]]
    first, *others = weights_of(files)
    hub.break_after[first] = [1000] + [0] * 9
    with pytest.raises(CheckpointError, match="org/tiny: .*cannot be had.* goes on") as error:
        fetch()
    one_line(error)
    assert hub.sent(first) == 1000
    hub.break_after.clear()
    hub.requests.clear()
    hub.ignores_ranges = not is_ranged
    steps = []
    folder = locate(EngineOptions(model="org/tiny")).with_weights(
        on_step=lambda done, total: steps.append((done, total))
    )
    assert files_of(Path(folder.model)) == files_of(checkpoint)
    assert hub.sent(first) == len(files[first]) - (1000 if is_ranged else 0)
    done, total = steps[-1]
    assert done == total >= len(files[first]) - 1000
    assert not list(Path(folder.model).parents[1].rglob("*.incomplete"))


def test_who_leaves_leaves_what_came(hub, checkpoint):
    def leave(done, total):
        raise KeyboardInterrupt

    located = locate(EngineOptions(model="org/tiny"))
    with pytest.raises(KeyboardInterrupt):
        located.with_weights(on_step=leave)
    assert files_of(fetch()) == files_of(checkpoint)


def test_answers_without_a_byte_end_in_one_line(hub, repo):
    name = weights_of(repo.commits[repo.refs["main"]])[0]
    hub.replaced[name] = repo.commits[repo.refs["main"]][name][:1000]
    with pytest.raises(CheckpointError, match=f"{name}: got nothing behind byte 1000") as error:
        fetch()
    one_line(error)


def test_who_waits_for_another_process_can_leave(hub, repo, caplog):
    def leave(done, total):
        if caplog.records:
            raise KeyboardInterrupt

    located = locate(EngineOptions(model="org/tiny"))
    name = weights_of(repo.commits[repo.refs["main"]])[0]
    assert located.snapshot is not None
    sha256 = located.snapshot.remote(name).sha256
    assert sha256 is not None
    blob = located.snapshot.blob(sha256)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with blob.with_name(f"{blob.name}.windlass.incomplete").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(KeyboardInterrupt):
            located.with_weights(on_step=leave)
    assert caplog.messages == [f"{name}: waiting for another process that downloads it"]


def test_other_bytes_than_the_hub_says_are_not_taken(hub, repo, checkpoint):
    files = repo.commits[repo.refs["main"]]
    name = weights_of(files)[-1]
    hub.replaced[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    with pytest.raises(CheckpointError, match=f"{name}: expected SHA-256 .*thrown away") as error:
        fetch()
    one_line(error)
    hub.replaced.clear()
    assert files_of(fetch()) == files_of(checkpoint)


# --- plans without weights ---


def test_a_plan_reads_headers_alone_and_is_that_of_the_weights(
    hub, repo, checkpoint, capsys, monkeypatch
):
    monkeypatch.setattr("windlass.build.checkpoint_sizes.resident_bytes", lambda: 200 * MIB)
    machine = ["--machine", "laptop", "--host-memory", "1GiB", "--json"]
    lengths = ["--num-requests", "4", "--prompt-len", "16", "--output-len", "4"]

    def plan(*more):
        assert main(["plan", *machine, *more, *([] if "-i" in more else lengths)]) == 0
        out, err = capsys.readouterr()
        return json.loads(out), err

    expected, _ = plan("-m", str(checkpoint))
    files = repo.commits[repo.refs["main"]]
    names = weights_of(files)
    hub.break_after[names[0]] = [3]
    found, said = plan("-m", "org/tiny")
    assert found == expected
    assert "only the headers were read from the hub" in said
    ends = [8 + int.from_bytes(files[name][:8], "little") for name in names]
    assert hub.sent(WEIGHTS) == sum(ends) + 3 < sum(len(files[name]) for name in names) / 2
    assert not hub.asked("GET", "tokenizer.json")
    cache = Path(constants.HF_HUB_CACHE)
    assert not list(cache.rglob("*.safetensors")) and not list(cache.rglob("*.incomplete"))
    hub.ignores_ranges = True
    assert plan("-hf", "org/tiny")[0] == expected
    hub.ignores_ranges = False
    row = {"custom_id": "r", "method": "POST", "url": "/v1/completions",
           "body": {"prompt": "Hello", "max_tokens": 4}}  # fmt: skip
    Path("in.jsonl").write_text(json.dumps(row) + "\n")
    wanted, _ = plan("-m", str(checkpoint), "-i", "in.jsonl")
    assert plan("-m", "org/tiny", "-i", "in.jsonl", "--revision", "main")[0] == wanted
    assert hub.asked("GET", "tokenizer.json")
    fetch()
    hub.requests.clear()
    found, said = plan("-m", "org/tiny")
    assert found == expected and said == "" and hub.sent(WEIGHTS) == 0


def test_headers_on_the_hub_are_those_of_the_files(hub, repo, checkpoint, tmp_path):
    located = locate(EngineOptions(model="org/tiny"))
    said: list[str] = []
    options = located.with_headers(tmp_path / "headers", said.append)
    folder = Path(options.model)
    assert read_headers(folder) == read_headers(checkpoint)
    for path in folder.glob("*.safetensors"):
        assert path.stat().st_size == (checkpoint / path.name).stat().st_size
        assert path.stat().st_blocks * 512 < path.stat().st_size or path.stat().st_size < 16384
    names = weights_of(repo.commits[repo.refs["main"]])
    hub.replaced[names[0]] = b"\xff" * 64  # no header at all
    broken = Path(located.with_headers(tmp_path / "broken", said.append).model)
    with pytest.raises(CheckpointError, match="expected a header of at most"):
        read_headers(broken)
    assert len(said) == 2


def test_a_context_length_of_0_is_read_from_the_hub(hub):
    from windlass.cli.engine_flags import engine_options
    from windlass.cli.flags import read_values
    from windlass.cli.generate import COMMAND

    values = read_values(COMMAND, ["-m", "org/tiny", "-c", "0", "--revision", "main"], {})
    options = engine_options(values)
    assert options.max_model_len == CONFIG["max_position_embeddings"]
    assert (options.model, options.revision) == ("org/tiny", "main")
    assert hub.sent(WEIGHTS) == 0


# --- whole commands ---


def test_an_llm_takes_a_name_and_a_revision(hub, repo, checkpoint):
    commit = repo.refs["main"]
    repo.push({})
    params = SamplingParams(temperature=0, max_tokens=4)
    answers = []
    for name, more in (
        (str(checkpoint), {}),
        ("org/tiny", {"revision": commit}),
        (str(checkpoint), {"tokenizer": "org/tiny", "tokenizer_revision": commit}),
    ):
        with LLM(name, host_memory="2GiB", moe_backend="torch", **more) as llm:
            answers.append(llm.generate("Hello", params, use_tqdm=False)[0].outputs[0].token_ids)
    assert len(answers[0]) == 4 and answers == [answers[0]] * 3


def test_a_job_belongs_to_a_commit_and_has_the_repositorys_name(hub, repo, tmp_path):
    """By the variables that users set, in processes of their own."""
    row = {"custom_id": "r", "method": "POST", "url": "/v1/completions",
           "body": {"model": "org/tiny", "prompt": "Hello", "max_tokens": 4}}  # fmt: skip
    Path("in.jsonl").write_text(json.dumps(row) + "\n")
    home = tmp_path / "other-home"

    def job(model, **more):
        return subprocess.run(
            [sys.executable, str(FAKE), "run-batch", "-i", "in.jsonl", "-o", "out.jsonl",
             "-m", model],
            env={**os.environ, **environment(hub, home), "PYTHONPATH": str(SRC), **more},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    commit = repo.refs["main"]
    refused = job("org/tiny", HF_HUB_OFFLINE="1")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("windlass: org/tiny: neither a folder here nor")
    assert refused.stderr.count("\n") == 1
    done = job("org/tiny")
    assert done.returncode == 0, done.stderr
    assert f"of org/tiny, commit {commit}, into {home}/hub/models--org--tiny/" in done.stderr
    assert json.loads(Path("out.jsonl").read_text())["response"]["body"]["model"] == "org/tiny"
    manifest = json.loads(Path("out.jsonl.manifest.json").read_text())
    assert manifest["options"]["checkpoint"] == f"org/tiny@{commit}"
    assert manifest["recorded"]["model"] == "org/tiny"
    moved = repo.push({**repo.commits[commit], "README.md": b"other words"})
    refused = job("org/tiny")
    assert refused.returncode == 2
    said = f"checkpoint: the job has 'org/tiny@{commit}', now 'org/tiny@{moved}'"
    assert said in refused.stderr
    hub.requests.clear()
    assert job(f"org/tiny@{commit}").returncode == 0 and hub.sent(WEIGHTS) == 0


def test_doctor_and_quantize_take_names(hub, repo, capsys):
    from windlass.cli.doctor import COMMAND, subject_of
    from windlass.cli.flags import read_values

    commit = repo.refs["main"]
    repo.push({})
    subject = subject_of(read_values(COMMAND, ["-hf", "org/tiny", "--revision", commit], {}))
    assert subject.model is not None and identity_of(subject.model) == f"org/tiny@{commit}"
    with pytest.raises(UsageError, match="revision: allowed with --model"):
        subject_of(read_values(COMMAND, ["--revision", commit], {}))
    assert main(["quantize", "-m", f"org/tiny@{commit}", "-o", "q", "--format", "int8"]) == 0
    assert json.loads(Path("q/config.json").read_text())["quantization_config"]
    assert not Path("q/config.json").is_symlink()
    assert read_headers(Path("q"))

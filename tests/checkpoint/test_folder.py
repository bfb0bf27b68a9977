"""A folder as people have it: what its config.json and files leave unsaid, and where it lies."""

import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from published import SMALL_MIXTRAL
from windlass.checkpoint.folder import CheckpointFolder, read_model
from windlass.checkpoint.synthetic import write_random_checkpoint
from windlass.cli import main
from windlass.errors import CheckpointError, ModelError
from windlass.options import EngineOptions, model_name

CONFIG = {**SMALL_MIXTRAL, "vocab_size": 300}
TOLD = "config.json: not known, not read: gate_noise = 0.5"


def write(folder: Path, *, says: Mapping[str, Any], holds: Mapping[str, Any] = CONFIG) -> Path:
    """A checkpoint with the weights of `holds` whose config.json also says `says`."""
    write_random_checkpoint(holds, folder, shard_bytes=20_000)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(says)))
    return folder


def opened(folder: Path, **options: Any) -> CheckpointFolder:
    with ExitStack() as stack:
        return read_model(EngineOptions(model=str(folder), **options), stack)


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ({"gate_noise": 0.5}, TOLD),
        ({"num_hidden_layers": 1},
         "weights: 1 stored layers are left unread, config.json describes 1"),
    ],
)  # fmt: skip
def test_what_nobody_reads_is_one_line_or_under_strict_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, says: dict[str, Any], told: str
) -> None:
    folder = write(tmp_path / "model", says=says)
    with caplog.at_level(logging.WARNING, "windlass"):
        assert opened(folder).notes == (told,)
    assert caplog.messages == [told]
    with pytest.raises(ModelError) as caught:
        opened(folder, strict=True)
    assert str(caught.value).startswith(told)


def test_a_folder_without_surprises_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = opened(write(tmp_path / "model", says={"use_cache": True}), strict=True)
    assert found.notes == () and caplog.messages == []


def test_the_model_has_the_head_that_is_stored(tmp_path: Path) -> None:
    assert not opened(write(tmp_path / "a", says={"tie_word_embeddings": True})).spec.tied_head
    tied = {**CONFIG, "tie_word_embeddings": True}
    assert opened(write(tmp_path / "b", says={}, holds=tied)).spec.tied_head


@pytest.mark.parametrize("name", ["model.layers.1.block_sparse_moe.gate.weight", "mtp.norm.weight"])
def test_only_what_the_model_needs_must_be_in_the_files(tmp_path: Path, name: str) -> None:
    """The index names it still; nobody has to have it who does not need it."""
    folder = write(tmp_path / "model", says={})
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    file = document["weight_map"].setdefault(name, next(iter(document["weight_map"].values())))
    tensors = load_file(folder / file)
    is_needed = tensors.pop(name, None) is not None
    save_file(tensors, folder / file)
    index.write_text(json.dumps(document))
    if is_needed:
        with pytest.raises(CheckpointError, match=rf"tensor {name}.* is missing"):
            opened(folder)
    else:
        assert opened(folder).layout.unused == ()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hub/models--org--some-model/snapshots/0a1b2c", "org/some-model"),
        ("hub/models--gpt2/snapshots/0a1b2c", "gpt2"),
        ("hub/datasets--org--name/snapshots/0a1b2c", "0a1b2c"),
        ("snapshots/0a1b2c", "0a1b2c"),
        ("models--org--name", "models--org--name"),
        ("some-model", "some-model"),
    ],
)
def test_a_model_is_called_as_its_repository_or_its_folder(
    tmp_path: Path, path: str, name: str
) -> None:
    folder = tmp_path / path
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    assert model_name(folder) == model_name(tmp_path / "link") == name


def test_a_job_over_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files are links to blobs; the model is called as its repository; what is not known is in the
    manifest, and the job does not begin under --strict."""
    blobs = write(tmp_path / "hub/models--org--tiny/blobs", says={"gate_noise": 0.5})
    folder = blobs.parent / "snapshots/0a1b2c"
    folder.mkdir(parents=True)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(Path("../../blobs") / path.name)
    body = {"model": "org/tiny", "prompt": "a", "max_tokens": 2, "temperature": 0}
    row = {"custom_id": "r", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    job = ["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "-m", str(folder), "--threads", "1"]
    assert main([*job, "--strict"]) != 0
    assert TOLD in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()
    assert main(job) == 0
    assert TOLD in capsys.readouterr().err.splitlines()
    response = json.loads((tmp_path / "out.jsonl").read_text())["response"]
    assert response["status_code"] == 200 and response["body"]["model"] == "org/tiny"
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["engine"]["unread"] == [TOLD]

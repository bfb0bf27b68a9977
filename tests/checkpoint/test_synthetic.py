"""Random checkpoints: readable by everyone, equal to the source without files, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from layouts import expected_tensors
from windlass.checkpoint import synthetic as synth
from windlass.checkpoint.layout import build_layout
from windlass.checkpoint.reader import Checkpoint
from windlass.errors import UsageError
from windlass.models.registry import read_spec

TINY: dict[str, Any] = {
    **synth.PRESETS["qwen3-moe-1b"],
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
    "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
}  # fmt: skip
NEXT: dict[str, Any] = {
    "model_type": "qwen3_next", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts": 8,
    "num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "rope_theta": 10000.0,
}  # fmt: skip


def write(folder: Path, config: dict[str, Any], **options: Any) -> Path:
    synth.write_random_checkpoint(config, folder / "model", **options)
    return folder / "model"


@pytest.mark.parametrize("config", [TINY, NEXT], ids=["qwen3_moe", "qwen3_next"])
def test_transformers_runs_it_with_finite_varied_logits(tmp_path: Path, config: Any) -> None:
    folder = write(tmp_path, config, shard_bytes=100_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(40)[None] * 7 % 300
    with torch.inference_mode():
        logits = model(ids).logits[0]
    assert logits.isfinite().all()
    assert 0.2 < logits.std() < 20
    assert len(logits.argmax(-1).unique()) > 5


def test_files_equal_the_source_without_files(tmp_path: Path) -> None:
    folder = write(tmp_path, TINY, shard_bytes=100_000, dtype="float32", seed=3)
    files = Checkpoint(folder, mode="buffered")
    source = synth.random_source(TINY, dtype="float32", seed=3)
    spec, names = read_spec(TINY)
    shapes = {name: info.shape for name, info in files.tensors.items()}
    assert shapes == expected_tensors(spec, names)
    assert shapes == {name: info.shape for name, info in source.tensors.items()}
    build_layout(spec, names, source.tensors)
    for info in files.tensors.values():
        with safe_open(folder / info.file, "pt") as shard:
            stored = shard.get_tensor(info.name)
        assert torch.equal(stored, read(source, source.tensors[info.name], dtype=torch.float32))
    files.close()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert max(path.stat().st_size for path in folder.glob("*.safetensors")) < 120_000


def read(source: synth.RandomSource, info: Any, *, dtype: torch.dtype) -> torch.Tensor:
    """One tensor through aligned reads of odd widths, as the weight store makes them."""
    first, last = info.begin // 4096 * 4096, -(-info.end // 4096) * 4096
    buffer = bytearray(last - first)
    for at in range(first, last, 12288):
        stop = min(at + 12288, last)
        source.read(info.file, at, memoryview(buffer)[at - first : stop - first])
    data = bytes(buffer[info.begin - first : info.end - first])
    return torch.frombuffer(bytearray(data), dtype=dtype).view(info.shape)


def test_seeds_experts_and_layers_differ() -> None:
    def tensors(seed: int) -> list[torch.Tensor]:
        source = synth.random_source(TINY, seed=seed)
        return [
            read(source, info, dtype=torch.bfloat16).float()
            for name, info in sorted(source.tensors.items())
            if name.endswith("up_proj.weight") and "experts" in name
        ]

    first, again, other = tensors(0), tensors(0), tensors(1)
    assert len(first) == 16  # the second layer is dense
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    for i, one in enumerate(first):
        assert 0.8 < one.std() * 8 < 1.2  # 1 / sqrt(64)
        assert not any(torch.equal(one, two) for two in first[:i])


def test_norms_are_near_what_passes_through() -> None:
    for config, center in ((TINY, 1.0), (NEXT, 0.0)):
        source = synth.random_source(config)
        norm = source.tensors["model.layers.0.input_layernorm.weight"]
        assert abs(read(source, norm, dtype=torch.bfloat16).float().mean() - center) < 0.1
    inner = source.tensors["model.layers.0.linear_attn.norm.weight"]
    assert abs(read(source, inner, dtype=torch.bfloat16).float().mean() - 1.0) < 0.1


def test_tokenizer_and_chat_template(tmp_path: Path) -> None:
    folder = write(tmp_path, TINY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Héllo, 世界! <|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.removesuffix("<|im_end|>").encode()) + 1 and ids[-1] == 258
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 300 and tokenizer.decode([299]) == " 299"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == tokenizer.eos_token_id == 258
    assert transformers.AutoConfig.from_pretrained(folder).eos_token_id == 258


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="empty or new folder"):
        write(tmp_path, TINY)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match="dtype: got 'int8'"):
        write(tmp_path / "a", TINY, dtype="int8")
    with pytest.raises(UsageError, match="vocab_size: got 97"):
        write(tmp_path / "b", {**TINY, "vocab_size": 97})
    with monkeypatch.context() as patched, pytest.raises(UsageError, match="disk"):
        patched.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
        write(tmp_path / "c", TINY)
    assert not (tmp_path / "c").exists()
    with pytest.raises(UsageError, match="qwen3-30b-a3b"):
        synth.preset("qwen3-30b")
    with pytest.raises(UsageError, match="num-layers"):
        synth.preset("qwen3-30b-a3b", num_layers=0)


def test_presets_have_their_real_sizes() -> None:
    billions = {}
    for name in synth.PRESETS:
        shapes = expected_tensors(*read_spec(synth.preset(name, num_layers=2)))
        more = expected_tensors(*read_spec(synth.preset(name, num_layers=3)))
        two, three = (sum(torch.Size(s).numel() for s in x.values()) for x in (shapes, more))
        layers = synth.PRESETS[name]["num_hidden_layers"]
        billions[name] = round((two + (layers - 2) * (three - two)) / 1e9, 1)
    assert billions == {"qwen3-moe-1b": 1.3, "olmoe-1b-7b": 6.9, "qwen3-30b-a3b": 30.5}

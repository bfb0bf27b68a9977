"""Every family's logits against transformers, from config.json and safetensors files on disk."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from dense_model import TOLERANCE, Checkpoint, dense_logits, prompts
from families import ALIKE, CASES, make_checkpoint, rewrite_config
from layouts import expected_tensors
from windlass.checkpoint.layout import build_layout
from windlass.ids import Part
from windlass.models.names import TensorInfo
from windlass.models.registry import read_spec

LATER = {"gemma4_text"}  # than transformers 4


@torch.inference_mode()
def check_logits(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    for ids in prompts():
        expected = model(ids[None]).logits[0]
        assert 0.1 < expected.std() < 10, "logits are not of order 1"
        got = dense_logits(checkpoint, ids)
        assert got.shape == expected.shape
        worst = (got - expected).abs().max().item()
        assert worst <= TOLERANCE, f"{len(ids)} tokens: {worst}"


@pytest.mark.parametrize("family", [*CASES, *ALIKE])
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path)
    check_logits(Checkpoint(tmp_path), model)


@pytest.mark.parametrize("family", [*CASES, "qwen3_vl_moe"])
def test_stacked_experts_on_disk(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path, hub_format=False)
    assert not list(_per_expert_names(tmp_path)), "the checkpoint was to be stacked"
    check_logits(Checkpoint(tmp_path), model)


def _per_expert_names(path: Path) -> list[str]:
    with safe_open(path / "model.safetensors", "pt") as opened:
        return [name for name in opened.keys() if ".experts.0." in name]


@pytest.mark.parametrize("family", [family for family in CASES if family not in LATER])
def test_spelling_of_transformers_4(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path)
    spec = Checkpoint(tmp_path).spec
    rewrite_config(tmp_path, old_spelling=True)
    again = Checkpoint(tmp_path)
    assert again.spec == spec
    check_logits(again, model)


@pytest.mark.parametrize("nested", [False, True])
def test_the_stored_head_is_used_where_config_says_that_it_is_tied(
    nested: bool, tmp_path: Path
) -> None:
    make_checkpoint("mixtral", tmp_path)
    config = rewrite_config(tmp_path, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    if nested:
        outer = {"model_type": "some_vl", "text_config": config}
        (tmp_path / "config.json").write_text(json.dumps(outer))
    check_logits(Checkpoint(tmp_path), model)


def test_gemma4_as_it_is_published(tmp_path: Path) -> None:
    """transformers 5.23 says of each layer what published files say of full attention; and those
    hold a vision tower beside the text."""
    make_checkpoint("gemma4_text", tmp_path)
    text = Checkpoint(tmp_path)
    assert text.config["per_layer_config"]
    published: dict[str, Any] = {
        "global_head_dim": 20,
        "num_global_key_value_heads": 1,
        "per_layer_config": None,
    }
    settings = rewrite_config(tmp_path, **published)
    assert Checkpoint(tmp_path).spec == text.spec
    outer = {"model_type": "gemma4", "vision_config": {}, "tie_word_embeddings": True}
    spec, names = read_spec({**outer, "text_config": settings})
    assert spec == replace(text.spec, family="gemma4")
    renamed = (
        replace(info, name=info.name.replace("model.", "model.language_model.", 1))
        for info in text.infos.values()
    )
    tensors = {info.name: info for info in renamed}
    assert set(expected_tensors(spec, names)) == set(tensors)
    for name in ("model.vision_tower.std_bias", "model.embed_vision.embedding_projection.weight"):
        tensors[name] = TensorInfo(name, "model.safetensors", "BF16", (4,), 0, 8)
    layout = build_layout(spec, names, tensors)
    assert len(layout.unused) == 2 and set(layout.parts) >= set(text.layout.keys(Part.EXPERT))


@torch.inference_mode()
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_sparse_attention_is_dense_exactly_as_far_as_is_said(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path, index_topk=12)
    checkpoint, (longer, *_) = Checkpoint(tmp_path), prompts()
    limit = checkpoint.spec.max_positions
    assert limit == 12 < len(longer) and "index_topk 12" in checkpoint.spec.limits()[0]
    error = (dense_logits(checkpoint, longer) - model(longer[None]).logits[0]).abs().amax(-1)
    assert error[:limit].max() <= TOLERANCE < error[limit:].min()

"""Every family's logits against transformers, from config.json and safetensors files on disk."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from dense_model import TOLERANCE, Checkpoint, dense_logits, prompts
from families import CASES, make_checkpoint, rewrite_config


@torch.inference_mode()
def check_logits(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    for ids in prompts():
        expected = model(ids[None]).logits[0]
        assert 0.1 < expected.std() < 10, "logits are not of order 1"
        got = dense_logits(checkpoint, ids)
        assert got.shape == expected.shape
        worst = (got - expected).abs().max().item()
        assert worst <= TOLERANCE, f"{len(ids)} tokens: {worst}"


@pytest.mark.parametrize("family", CASES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path)
    check_logits(Checkpoint(tmp_path), model)


@pytest.mark.parametrize("family", CASES)
def test_stacked_experts_on_disk(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path, hub_format=False)
    assert not list(_per_expert_names(tmp_path)), "the checkpoint was to be stacked"
    check_logits(Checkpoint(tmp_path), model)


def _per_expert_names(path: Path) -> list[str]:
    with safe_open(path / "model.safetensors", "pt") as opened:
        return [name for name in opened.keys() if ".experts.0." in name]


@pytest.mark.parametrize("family", CASES)
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
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    if nested:
        outer = {"model_type": "some_vl", "text_config": config}
        (tmp_path / "config.json").write_text(json.dumps(outer))
    check_logits(Checkpoint(tmp_path), model)

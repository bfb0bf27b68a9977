"""Measured peaks of whole processes against what the plan adds up to, where it is tightest: shapes
whose scratch is large beside small weights. A few prompts are long, so that a pass is full of their
rows; the rest are short, so that all sequences soon decode at once, which is the other peak."""

import json

import pytest

from backends import CPU
from measured_job import planned_and_peak
from windlass.checkpoint.synthetic import preset
from windlass.speculative import SpeculativeConfig

CASES = {
    # multi-head attention: keys and values as wide as queries, many sequences decode at once
    "mha": (
        preset("olmoe-1b-7b", num_layers=1)
        | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "vocab_size": 512},
        dict(rows=320, prompts=[60] * 16 + [4] * 240, new=3),
    ),
    # the same, rows of keys and values rounded to int8 as they are written
    "mha-int8": (
        preset("olmoe-1b-7b", num_layers=1)
        | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "vocab_size": 512},
        dict(rows=320, prompts=[60] * 16 + [4] * 240, new=3, kv_cache_dtype="int8"),
    ),
    # one very wide expert: the row-count comparison and the hidden states of an expert
    "wide": (
        preset("olmoe-1b-7b", num_layers=1)
        | {"num_experts": 2, "num_experts_per_tok": 2, "intermediate_size": 14336,
           "vocab_size": 512},
        dict(rows=512, prompts=[100] * 4 + [28] * 4, new=2),
    ),
    # a large vocabulary and long prompts over several micro-batches
    "vocabulary": (
        preset("qwen3-moe-1b", num_layers=1)
        | {"num_experts": 4, "num_experts_per_tok": 4, "vocab_size": 150_000},
        dict(rows=2048, prompts=[708] * 2 + [10] * 60 + [16] * 2, new=2),
    ),
    "latent": (
        {
            "model_type": "deepseek_v2", "vocab_size": 512, "hidden_size": 1024,
            "intermediate_size": 512, "moe_intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 64, "num_key_value_heads": 64, "n_shared_experts": 1,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "routed_scaling_factor": 1.0,
            "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "v_head_dim": 64,
            "qk_nope_head_dim": 64, "topk_method": "greedy", "n_group": None, "topk_group": None,
            "first_k_dense_replace": 0, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False,
            "tie_word_embeddings": False, "norm_topk_prob": False, "torch_dtype": "bfloat16",
        },
        dict(rows=512, prompts=[120] * 6 + [16] * 26, new=3),
    ),
    # a layer that drafts: the states of a pass stay until it has run
    "drafts": (
        {
            "model_type": "glm4_moe", "vocab_size": 512, "hidden_size": 2048,
            "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
            "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
            "first_k_dense_replace": 0, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False,
            "tie_word_embeddings": False, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16",
        },
        dict(rows=2048, prompts=[708] * 2 + [10] * 60 + [16] * 2, new=2,
             speculative_config=SpeculativeConfig(method="mtp")),
    ),
    # all weights stay: layers are noted for every number of rows, since one answer ends at a time
    "noted": (
        preset("olmoe-1b-7b", num_layers=4)
        | {"num_experts": 8, "intermediate_size": 64, "vocab_size": 512},
        dict(rows=128, prompts=[8] * 16, new=2, longer=1, moe_expert_cache_size="auto"),
    ),
}  # fmt: skip


# A process each. What torch's kernels take beside does not depend on the other cases.
_OF_TORCH = ("mha", "wide")


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *(pytest.param(name, *CPU.values, marks=CPU.marks) for name in CASES),
        *((name, "torch") for name in _OF_TORCH),
        *(
            pytest.param(name, "torch", marks=pytest.mark.slow)
            for name in CASES
            if name not in _OF_TORCH
        ),
    ],
)
def test_the_peak_stays_below_the_sum_of_the_plan(name, backend, tmp_path):
    config, case = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    _write_tokenizer(tmp_path, config)
    planned, peak = planned_and_peak(str(tmp_path), case, backend)
    mib = [round(x / 2**20) for x in (peak, planned)]
    assert peak <= planned, f"{name}: peak {mib[0]} MiB, planned {mib[1]} MiB"
    assert peak > 0.6 * planned, f"{name}: planned {mib[1]} MiB for a peak of {mib[0]} MiB"


def _write_tokenizer(folder, config):
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(min(300, config["vocab_size"]))}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))

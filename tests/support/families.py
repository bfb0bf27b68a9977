"""Tiny random checkpoints of every family, made so that a wrong detail shows in the logits.

Widths differ from each other, biases are not zero, windows are shorter than the prompts, more
experts are chosen than there are kept groups, and the kinds of rotary scaling are spread over the
families. Some settings are as no published model has them.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

VOCAB = 101

_BASE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    num_experts_per_tok=2,
    intermediate_size=40,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GROUPS: dict[str, Any] = dict(
    n_routed_experts=16,
    num_experts_per_tok=5,
    n_group=4,
    topk_group=2,
    n_shared_experts=2,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
    norm_topk_prob=True,
)
_MLA: dict[str, Any] = dict(
    num_key_value_heads=4,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=14,
    v_head_dim=10,
    attention_bias=True,
)


def _yarn(**more: Any) -> dict[str, Any]:
    """A ramp over most pairs, whose ends are not whole numbers."""
    return dict(
        rope_type="yarn", rope_theta=50.0, factor=4.0, original_max_position_embeddings=64,
        **{"beta_fast": 4.0, "beta_slow": 0.25, **more},
    )  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=3, head_dim=12, sliding_window=7),
    "dbrx": dict(
        d_model=32,
        n_heads=4,
        n_layers=3,
        max_seq_len=256,
        attn_config=dict(kv_n_heads=2, clip_qkv=0.6, rope_theta=777.0),
        ffn_config=dict(
            ffn_hidden_size=24, moe_num_experts=6, moe_top_k=3, moe_normalize_expert_weights=2.0
        ),
        rope_parameters=dict(rope_type="default", rope_theta=777.0),
    ),
    "qwen2_moe": dict(
        num_experts=8,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=20,
        num_hidden_layers=4,
        decoder_sparse_step=2,
        norm_topk_prob=False,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=3,
        rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0),
    ),
    "qwen3_moe": dict(
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        head_dim=12,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        attention_bias=True,
        rope_parameters=_yarn(),
    ),
    "olmoe": dict(
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        clip_qkv=0.7,
        attention_bias=True,
    ),
    "deepseek_v2": {
        **_GROUPS,
        **_MLA,
        "norm_topk_prob": False,
        "topk_method": "group_limited_greedy",
        "q_lora_rank": None,
        "mlp_bias": True,
        "rope_parameters": _yarn(mscale=0.7, mscale_all_dim=0.9),
    },
    "deepseek_v3": {
        **_GROUPS,
        **_MLA,
        "q_lora_rank": 28,
        "rope_parameters": _yarn(mscale=1.0, mscale_all_dim=1.0, beta_fast=3.0),
    },
    "gpt_oss": dict(
        num_local_experts=8,
        num_experts_per_tok=3,
        head_dim=12,
        sliding_window=6,
        swiglu_limit=0.5,
        swiglu_alpha=1.3,
        rope_parameters=_yarn(truncate=False),
    ),
    "glm4_moe": dict(
        **_GROUPS,
        head_dim=12,
        use_qk_norm=True,
        attention_bias=True,
        rope_parameters=dict(rope_type="default", rope_theta=2e4, partial_rotary_factor=0.5),
    ),
    "granitemoe": dict(
        num_local_experts=8,
        num_experts_per_tok=3,
        attention_bias=True,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=2.5,
        tie_word_embeddings=True,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "phimoe": dict(
        num_local_experts=8,
        attention_bias=True,
        lm_head_bias=True,
        router_jitter_noise=0.2,
        sliding_window=9,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=1e4,
            short_factor=[1.0, 1.1, 1.2, 1.4],
            long_factor=[1.0, 2.0, 4.0, 9.0],
            short_mscale=1.1,
            long_mscale=1.3,
            original_max_position_embeddings=16,
        ),
    ),
    "minimax_m2": dict(
        num_local_experts=8, num_experts_per_tok=3, head_dim=12, rotary_dim=6, rope_theta=3e3
    ),
    "ernie4_5_moe": dict(
        num_hidden_layers=4,
        moe_num_experts=8,
        num_experts_per_tok=3,  # saved as moe_k
        moe_num_shared_experts=2,
        moe_intermediate_size=24,
        moe_layer_start_index=1,
        moe_layer_interval=2,
        moe_norm_min=0.6,
        use_bias=True,
        tie_word_embeddings=True,
    ),
    "dots1": dict(
        **{**_GROUPS, "norm_topk_prob": False},
        head_dim=12,
        sliding_window=5,
        max_window_layers=1,
        attention_bias=True,
    ),
    "gemma4_text": dict(
        enable_moe_block=True,
        num_experts=8,
        num_experts_per_tok=3,
        top_k_experts=3,
        moe_intermediate_size=24,
        head_dim=12,
        global_head_dim=20,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        attention_bias=True,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        sliding_window=5,
        final_logit_softcapping=2.0,
        rms_norm_eps=0.02,  # else factors of what is normalised afterwards would not show
        rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=50.0),
            full_attention=dict(
                rope_type="proportional", rope_theta=500.0, partial_rotary_factor=0.6, factor=2.0
            ),
        ),
    ),
    "lfm2_moe": dict(
        num_hidden_layers=4,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        num_dense_layers=1,
        conv_L_cache=4,
        conv_bias=True,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        routed_scaling_factor=1.7,
        norm_eps=1e-3,
        tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=2e3),
    ),
    "nemotron_h": dict(
        layers_block_type=["linear_attention", "moe", "full_attention", "linear_attention",
                           "mlp", "moe"],
        head_dim=12,
        mamba_num_heads=6,
        mamba_head_dim=10,
        n_groups=3,
        ssm_state_size=14,
        conv_kernel=3,
        time_step_min=1e-30,  # transformers 5 raises steps to it, but those of prompts alone
        moe_shared_expert_intermediate_size=20,
        layer_norm_epsilon=1e-3,
        **{key: value for key, value in _GROUPS.items()
           if key not in ("first_k_dense_replace", "n_shared_experts")},
    ),
}  # fmt: skip


_ROUTED = {key: value for key, value in _GROUPS.items() if key != "first_k_dense_replace"}
_NO_GROUPS = {**_ROUTED, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}
_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
_SPARSE = dict(mlp_layer_types=["sparse", "dense", "sparse"])
_EXPERTS: dict[str, Any] = dict(
    num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=12
)
_INDEXER = dict(index_topk=256, index_head_dim=16, index_n_heads=2)

# Families made of what those have: they take part in the tests of families, and in no others.
ALIKE: dict[str, dict[str, Any]] = {
    "glm4_moe_lite": {**_ROUTED, **_MLA, **_SPARSE, "q_lora_rank": 28, "rope_interleave": False},
    "kimi_k25": {
        **_NO_GROUPS,
        **_MLA,
        "first_k_dense_replace": 1,
        "q_lora_rank": 28,
        "rope_parameters": _yarn(mscale=1.0, mscale_all_dim=1.0, beta_fast=1.0, beta_slow=1.0),
    },
    "qwen3_vl_moe": dict(
        **_EXPERTS,
        attention_bias=True,
        mlp_only_layers=[1],
        rope_parameters=dict(
            rope_type="default", rope_theta=3e3, mrope_section=[2, 2, 2], mrope_interleaved=True
        ),
    ),
    "hy_v3": dict(
        **_EXPERTS,
        **_SPARSE,
        num_shared_experts=2,
        router_scaling_factor=1.7,
        attention_bias=True,
        mlp_bias=True,
    ),
    "solar_open": dict(
        **_ROUTED,
        head_dim=12,
        attention_bias=True,
        rope_parameters=_yarn(),
    ),
    "exaone_moe": dict(
        **{**_EXPERTS, **_GROUPS, "norm_topk_prob": False, "num_experts": 16},
        num_shared_experts=2,
        sliding_window=5,
        layer_types=_KINDS,
    ),
    "mellum": dict(
        **_EXPERTS,
        **_SPARSE,
        norm_topk_prob=False,
        attention_bias=True,
        sliding_window=6,
        layer_types=_KINDS,
        rope_parameters=dict(
            full_attention=_yarn(), sliding_attention=dict(rope_type="default", rope_theta=300.0)
        ),
    ),
    "granitemoeshared": dict(
        **{**CASES["granitemoe"], "tie_word_embeddings": False}, shared_intermediate_size=20
    ),
    "deepseek_v32": {
        **_GROUPS,
        **_MLA,
        **_INDEXER,
        "q_lora_rank": 28,
        "rope_parameters": _yarn(mscale=1.0, mscale_all_dim=1.0, beta_fast=3.0),
    },
    "glm_moe_dsa": {
        **_NO_GROUPS,
        **_MLA,
        **_INDEXER,
        "first_k_dense_replace": 1,
        "q_lora_rank": 28,
        "indexer_types": ["full", "shared", "full"],
    },
}

# The vision part of the files in which the text of a family lies.
_VISION: dict[str, dict[str, Any]] = {
    "kimi_k25": dict(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=1,
        pos_emb_height=4,
        pos_emb_width=4,
    ),
    "qwen3_vl_moe": dict(
        depth=1,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=32,
        patch_size=4,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    ),
}


def make_checkpoint(
    family: str,
    path: Path,
    *,
    seed: int = 0,
    hub_format: bool = True,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> "transformers.PreTrainedModel":
    """Saves a random checkpoint of `family` in `path` and returns the model, in eval mode with
    eager attention and experts.

    `hub_format=False` writes the tensors as transformers keeps them in memory (stacked experts);
    `changes` replace settings of the case. Logits are of order 1.
    """
    settings = {**_BASE, **(CASES.get(family) or ALIKE[family]), **changes}
    auto = transformers.AutoModelForCausalLM
    if family in _VISION:
        auto = transformers.AutoModelForImageTextToText
        settings = dict(
            text_config=settings, vision_config=_VISION[family], tie_word_embeddings=False
        )
    config = transformers.AutoConfig.for_model(family, **settings)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = auto.from_config(config, dtype=dtype).eval()
    _randomise(model, seed)
    if family == "phimoe":
        _use_long_factors(model)
    model.save_pretrained(path, save_original_format=hub_format)
    if family in _VISION and hub_format:
        _as_published(family, path)
    return model


def _as_published(family: str, path: Path) -> None:
    """Tensors and config.json as the hub has them, where transformers 5.23 saves others."""
    tensors = load_file(path / "model.safetensors")
    text = json.loads((path / "config.json").read_text())["text_config"]
    if family == "qwen3_vl_moe":
        del text["tie_word_embeddings"]
        for name, tensor in tensors.items():
            if ".mlp.experts." in name:
                tensors[name] = tensor.transpose(1, 2).contiguous()
    else:  # transformers' own names of layers and of a norm
        text["model_type"] = "kimi_k2"
        own, hubs = "language_model.model.blocks.", "language_model.model.layers."
        tensors = {
            name.replace(own, hubs).removeprefix("model."): tensor
            for name, tensor in tensors.items()
        }
    rewrite_config(path, text_config=text)
    save_file(tensors, path / "model.safetensors")


def _use_long_factors(model: "transformers.PreTrainedModel") -> None:
    """transformers 5.23 scales long contexts of Phi-MoE by `long_mscale` but keeps the short
    factors, because it does not say how long they are; the published code changes both."""
    rotary, length = model.model.rotary_emb, [0]
    compute = rotary.rope_init_fn

    def remember(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        length[0] = int(kwargs["position_ids"].max()) + 1

    rotary.register_forward_pre_hook(remember, with_kwargs=True)
    rotary.rope_init_fn = lambda config, *args, **more: compute(
        config, *args, **{"seq_len": length[0], **more}
    )


def _randomise(model: "transformers.PreTrainedModel", seed: int) -> None:
    """Noise in every parameter and saved buffer: norms around 1, logits of order 1."""
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict()
    with torch.no_grad():
        for name, tensor in saved.items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            if tensor.ndim > 1 and "e_score_correction_bias" not in name:
                noise *= tensor.shape[-1] ** -0.5 * (1.5 if "router" in name else 1.0)
            else:
                noise *= 0.3
            is_norm = "norm" in name and name.endswith("weight") and tensor.ndim == 1
            is_factor = name.endswith(("scale", "scalar"))
            tensor.copy_(noise + 1.0 if is_norm or is_factor else noise)


def rewrite_config(path: Path, *, old_spelling: bool = False, **changes: Any) -> dict[str, Any]:
    """Changes the saved config.json (None removes a key) and returns it. `old_spelling`: as
    transformers 4 wrote it."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    if old_spelling:
        _old_spelling(config)
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    file.write_text(json.dumps(config))
    return dict(config)


def _old_spelling(config: dict[str, Any]) -> None:
    config["torch_dtype"] = config.pop("dtype")
    if config["model_type"] == "nemotron_h":  # no release had it: as its own code writes it
        letters = {"linear_attention": "M", "full_attention": "*", "moe": "E", "mlp": "-"}
        kinds = config.pop("layers_block_type")
        config["hybrid_override_pattern"] = "".join(letters[kind] for kind in kinds)
        config |= {"num_hidden_layers": len(kinds), "time_step_limit": [0.0, float("inf")]}
        config |= {"norm_eps": config["layer_norm_epsilon"], "rope_theta": 10000}
        return
    if config["model_type"] in ("qwen2_moe", "qwen3_moe", "olmoe"):
        config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    if config["model_type"] != "lfm2_moe":  # which always had them
        config.pop("layer_types", None)
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    if config["model_type"] == "dbrx":
        return  # it has rope_theta in attn_config
    config["rope_theta"] = theta
    partial = rope.pop("partial_rotary_factor", None)
    if partial is not None and "rotary_dim" not in config:
        config["partial_rotary_factor"] = partial
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}

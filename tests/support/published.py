"""Settings in the manner of published models, and the parameter counts known of those. Written down
without the files at hand: they check sizes and refusals, not that a given file is read."""

from typing import Any

_YARN: dict[str, Any] = dict(
    type="yarn", factor=40, beta_fast=32, beta_slow=1, original_max_position_embeddings=4096
)

# model type -> (config.json, parameters)
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "mixtral": (  # Mixtral-8x7B-v0.1
        dict(
            hidden_act="silu", hidden_size=4096, intermediate_size=14336,
            max_position_embeddings=32768, num_attention_heads=32, num_experts_per_tok=2,
            num_hidden_layers=32, num_key_value_heads=8, num_local_experts=8, rms_norm_eps=1e-5,
            rope_theta=1e6, sliding_window=None, tie_word_embeddings=False, vocab_size=32000,
            torch_dtype="bfloat16", router_aux_loss_coef=0.02, attention_dropout=0.0,
        ),
        46_702_792_704,
    ),
    "dbrx": (  # dbrx-instruct
        dict(
            attn_config=dict(clip_qkv=8, kv_n_heads=8, model_type="", rope_theta=500000),
            d_model=6144, emb_pdrop=0.0, max_seq_len=32768, n_heads=48, n_layers=40,
            ffn_config=dict(ffn_hidden_size=10752, model_type="", moe_jitter_eps=0.01,
                            moe_loss_weight=0.05, moe_num_experts=16, moe_top_k=4),
            resid_pdrop=0.0, tie_word_embeddings=False, vocab_size=100352,
        ),
        131_596_523_520,
    ),
    "qwen2_moe": (  # Qwen1.5-MoE-A2.7B
        dict(
            decoder_sparse_step=1, hidden_act="silu", hidden_size=2048, intermediate_size=5632,
            max_position_embeddings=8192, max_window_layers=21, moe_intermediate_size=1408,
            norm_topk_prob=False, num_attention_heads=16, num_experts=60, num_experts_per_tok=4,
            num_hidden_layers=24, num_key_value_heads=16, rms_norm_eps=1e-6, rope_theta=1e6,
            shared_expert_intermediate_size=5632, sliding_window=32768, tie_word_embeddings=False,
            use_sliding_window=False, vocab_size=151936,
        ),
        14_315_784_192,
    ),
    "qwen3_moe": (  # Qwen3-30B-A3B
        dict(
            attention_bias=False, decoder_sparse_step=1, head_dim=128, hidden_act="silu",
            hidden_size=2048, intermediate_size=6144, max_position_embeddings=40960,
            max_window_layers=48, mlp_only_layers=[], moe_intermediate_size=768,
            norm_topk_prob=True, num_attention_heads=32, num_experts=128, num_experts_per_tok=8,
            num_hidden_layers=48, num_key_value_heads=4, rms_norm_eps=1e-6, rope_scaling=None,
            rope_theta=1e6, sliding_window=None, tie_word_embeddings=False,
            use_sliding_window=False, vocab_size=151936,
        ),
        30_532_122_624,
    ),
    "olmoe": (  # OLMoE-1B-7B-0924
        dict(
            attention_bias=False, clip_qkv=None, hidden_act="silu", hidden_size=2048,
            intermediate_size=1024, max_position_embeddings=4096, norm_topk_prob=False,
            num_attention_heads=16, num_experts=64, num_experts_per_tok=8, num_hidden_layers=16,
            num_key_value_heads=16, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0,
            tie_word_embeddings=False, vocab_size=50304,
        ),
        6_919_161_856,
    ),
    "deepseek_v2": (  # DeepSeek-V2-Lite
        dict(
            attention_bias=False, aux_loss_alpha=0.001, first_k_dense_replace=1, hidden_act="silu",
            hidden_size=2048, intermediate_size=10944, kv_lora_rank=512,
            max_position_embeddings=163840, moe_intermediate_size=1408, moe_layer_freq=1,
            n_group=1, n_routed_experts=64, n_shared_experts=2, norm_topk_prob=False,
            num_attention_heads=16, num_experts_per_tok=6, num_hidden_layers=27,
            num_key_value_heads=16, pretraining_tp=1, q_lora_rank=None, qk_nope_head_dim=128,
            qk_rope_head_dim=64, rms_norm_eps=1e-6, rope_theta=10000,
            rope_scaling=dict(_YARN, mscale=0.707, mscale_all_dim=0.707),
            routed_scaling_factor=1.0, scoring_func="softmax", seq_aux=True,
            tie_word_embeddings=False, topk_group=1, topk_method="greedy", v_head_dim=128,
            vocab_size=102400,
        ),
        15_706_484_224,
    ),
    "deepseek_v3": (  # DeepSeek-V3 in bf16, without its layer for multi-token prediction
        dict(
            attention_bias=False, first_k_dense_replace=3, hidden_act="silu", hidden_size=7168,
            intermediate_size=18432, kv_lora_rank=512, max_position_embeddings=163840,
            moe_intermediate_size=2048, moe_layer_freq=1, n_group=8, n_routed_experts=256,
            n_shared_experts=1, norm_topk_prob=True, num_attention_heads=128,
            num_experts_per_tok=8, num_hidden_layers=61, num_key_value_heads=128,
            num_nextn_predict_layers=1, q_lora_rank=1536, qk_nope_head_dim=128,
            qk_rope_head_dim=64, rms_norm_eps=1e-6, rope_theta=10000,
            rope_scaling=dict(_YARN, mscale=1.0, mscale_all_dim=1.0),
            routed_scaling_factor=2.5, scoring_func="sigmoid", tie_word_embeddings=False,
            topk_group=4, topk_method="noaux_tc", v_head_dim=128, vocab_size=129280, ep_size=1,
        ),
        671_026_419_200,
    ),
    "gpt_oss": (  # gpt-oss-20b in bf16
        dict(
            attention_bias=True, experts_per_token=4, head_dim=64, hidden_act="silu",
            hidden_size=2880, initial_context_length=4096, intermediate_size=2880,
            layer_types=["sliding_attention", "full_attention"] * 12,
            max_position_embeddings=131072, num_attention_heads=64, num_experts_per_tok=4,
            num_hidden_layers=24, num_key_value_heads=8, num_local_experts=32, rms_norm_eps=1e-5,
            rope_scaling=dict(beta_fast=32.0, beta_slow=1.0, factor=32.0, rope_type="yarn",
                              original_max_position_embeddings=4096, truncate=False),
            rope_theta=150000, sliding_window=128, swiglu_limit=7.0, tie_word_embeddings=False,
            vocab_size=201088,
        ),
        20_914_757_184,
    ),
    "gemma4_text": (  # the text of gemma-4-26B-A4B
        dict(
            attention_bias=False, attention_dropout=0.0, attention_k_eq_v=True,
            enable_moe_block=True, final_logit_softcapping=30.0, global_head_dim=512, head_dim=256,
            hidden_activation="gelu_pytorch_tanh", hidden_size=2816, hidden_size_per_layer_input=0,
            intermediate_size=2112,
            layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 5,
            max_position_embeddings=262144, moe_intermediate_size=704, num_attention_heads=16,
            num_experts=128, num_global_key_value_heads=2, num_hidden_layers=30,
            num_key_value_heads=8, num_kv_shared_layers=0, rms_norm_eps=1e-6,
            rope_parameters=dict(
                full_attention=dict(partial_rotary_factor=0.25, rope_theta=1e6,
                                    rope_type="proportional"),
                sliding_attention=dict(rope_theta=1e4, rope_type="default"),
            ),
            sliding_window=1024, tie_word_embeddings=True, top_k_experts=8,
            use_bidirectional_attention="vision", use_double_wide_mlp=False, vocab_size=262144,
            vocab_size_per_layer_input=262144,
        ),
        25_233_141_790,
    ),
    "granitemoe": (  # granite-3.0-1b-a400m
        dict(
            attention_bias=False, attention_multiplier=0.015625, embedding_multiplier=12.0,
            hidden_act="silu", hidden_size=1024, intermediate_size=512, logits_scaling=6.0,
            max_position_embeddings=4096, num_attention_heads=16, num_experts_per_tok=8,
            num_hidden_layers=24, num_key_value_heads=8, num_local_experts=32,
            residual_multiplier=0.22, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=10000,
            tie_word_embeddings=True, vocab_size=49155,
        ),
        1_334_628_352,
    ),
    "phimoe": (  # Phi-3.5-MoE-instruct; its long-context factors are left out here
        dict(
            attention_bias=True, hidden_act="silu", hidden_size=4096, input_jitter_noise=0.01,
            intermediate_size=6400, lm_head_bias=True, max_position_embeddings=131072,
            num_attention_heads=32, num_experts_per_tok=2, num_hidden_layers=32,
            num_key_value_heads=8, num_local_experts=16, rms_norm_eps=1e-5, rope_theta=10000.0,
            router_jitter_noise=0.01, sliding_window=131072, tie_word_embeddings=False,
            vocab_size=32064,
        ),
        41_873_153_344,
    ),
    "lfm2_moe": (  # LFM2-8B-A1B
        dict(
            conv_L_cache=3, conv_bias=False, dtype="bfloat16", hidden_size=2048,
            intermediate_size=7168,
            layer_types=["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv"
                         for i in range(24)],
            max_position_embeddings=128000, moe_intermediate_size=1792, norm_eps=1e-5,
            norm_topk_prob=True, num_attention_heads=32, num_dense_layers=2, num_experts=32,
            num_experts_per_tok=4, num_hidden_layers=24, num_key_value_heads=8,
            rope_theta=1000000.0, routed_scaling_factor=1.0, tie_embedding=True, use_cache=True,
            use_expert_bias=True, vocab_size=65536,
        ),
        8_339_930_560,
    ),
    "nemotron_h": (  # NVIDIA-Nemotron-3-Nano-30B-A3B
        dict(
            attention_bias=False, chunk_size=128, conv_kernel=4, expand=2, head_dim=128,
            hidden_size=2688,
            hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            intermediate_size=1856, layer_norm_epsilon=1e-5, mamba_head_dim=64,
            mamba_hidden_act="silu", mamba_num_heads=64, mamba_proj_bias=False,
            max_position_embeddings=262144, mlp_bias=False, mlp_hidden_act="relu2",
            moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712, n_group=1,
            n_groups=8, n_routed_experts=128, n_shared_experts=1, norm_eps=1e-5,
            norm_topk_prob=True, num_attention_heads=32, num_experts_per_tok=6,
            num_hidden_layers=52, num_key_value_heads=2, partial_rotary_factor=1.0,
            rope_theta=10000, routed_scaling_factor=2.5, sliding_window=None, ssm_state_size=128,
            tie_word_embeddings=False, time_step_floor=1e-4,
            time_step_limit=[0.0, float("inf")], time_step_max=0.1, time_step_min=0.001,
            topk_group=1, torch_dtype="bfloat16", use_bias=False, use_conv_bias=True,
            vocab_size=131072,
        ),
        31_577_940_288,
    ),
}  # fmt: skip

# The text model of a Qwen3.5-MoE of a few KiB.
SMALL_QWEN3_5: dict[str, Any] = dict(
    model_type="qwen3_5_moe_text",
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=4,
    linear_value_head_dim=4,
    linear_conv_kernel_dim=4,
    rms_norm_eps=1e-6,
)

# Mixtral's settings for a checkpoint of a few KiB.
SMALL_MIXTRAL: dict[str, Any] = dict(
    model_type="mixtral",
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_local_experts=4,
    num_experts_per_tok=2,
    intermediate_size=24,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
)

"""What `engine.py` runs: shapes of real models, how much of a GPU they may take, and the job."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from windlass.checkpoint.synthetic import preset, write_settings
from windlass.units import GIB, MIB

_COMMON = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False}
_MIXTRAL = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-5, "sliding_window": None, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
_DEEPSEEK_V2_LITE = {
    **_COMMON, "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "head_dim": 64, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
    "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
        "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
_GPT_OSS_20B = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "vocab_size": 201088,
    "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
    "num_experts_per_tok": 4, "sliding_window": 128, "swiglu_limit": 7.0, "attention_bias": True,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "hidden_act": "silu",
    "initial_context_length": 4096, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 150000, "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 4096, "truncate": False,
    },
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
            "lm_head",
        ],
    },
}  # fmt: skip
_DRY = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 256,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One run of the script. `device_memory`: bytes of the GPU that may be taken. The job:
    `sequences` prompts of `prompt_tokens`, `output_tokens` each. `micro_batch`: rows of a pass of
    the model-based schedule. `spare`: bytes that plans leave free, for what grows meanwhile.
    `few_layers`: of models that lie on the GPU whole, to see what launches cost."""

    name: str
    config: dict[str, Any]
    device_memory: int
    sequences: int = 1024
    prompt_tokens: int = 32
    output_tokens: int = 9
    one_tokens: int = 24  # of one sequence alone
    micro_batch: int = 64  # the least that a plan may have
    spare: int = 256 * MIB
    few_layers: tuple[int, int] = (2, 4)
    layer_slots: int | None = None  # of experts; None: as many as fit

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    def with_layers(self, layers: int) -> "Size":
        """Fewer layers, in as much less of the GPU."""
        share = self.device_memory * layers // self.layers
        return replace(self, config=cut(self.config, layers), device_memory=share)

    def folder(self, into: Path, layers: int | None = None) -> Path:
        """All of a checkpoint but weights, which `load_format="dummy"` makes up."""
        config = self.config if layers is None else cut(self.config, layers)
        path = into / f"{self.name}-{config['num_hidden_layers']}"
        if not path.exists():
            write_settings(config, path)
        return path


def cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same with so many layers."""
    made = {**config, "num_hidden_layers": layers}
    if "layer_types" in config:
        made["layer_types"] = config["layer_types"][:layers]
    return made


SIZES = {
    size.name: size
    for size in (
        Size(name="deepseek-v2-lite-8", config=_DEEPSEEK_V2_LITE, device_memory=8 * GIB),
        Size(name="qwen3-30b-16", config=preset("qwen3-30b-a3b"), device_memory=16 * GIB),
        Size(name="mixtral-16", config=_MIXTRAL, device_memory=16 * GIB),
        Size(name="mixtral-24", config=_MIXTRAL, device_memory=24 * GIB),
        Size(name="gpt-oss-8", config=_GPT_OSS_20B, device_memory=8 * GIB),
        # says only that the script works
        Size(name="dry", config=preset("qwen3-30b-a3b") | _DRY, device_memory=1700 * MIB,
             sequences=9, prompt_tokens=8, output_tokens=3, one_tokens=4, spare=0,
             few_layers=(1, 2), layer_slots=2),
    )
}  # fmt: skip

"""Qwen3-MoE."""

from windlass.models.config import Config
from windlass.models.families.common import gqa, model, moe, sparse_layers, window
from windlass.models.families.tensor_names import qwen_names
from windlass.models.names import NameMap
from windlass.models.spec import Block, Ffn, ModelSpec, Moe, SoftmaxTopK


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    config.one_of("use_qk_norm", (True,), default=True)
    config.ignore("max_window_layers")  # all layers slide or none
    bias = config.get("attention_bias", bool, False)
    size, slides = window(config), config.get("use_sliding_window", bool, False)
    attention = gqa(
        config, qkv_bias=bias, out_bias=bias, qk_norm="head", window=size if slides else None
    )
    experts = qwen3_experts(config, renorm=config.get("norm_topk_prob", bool, False))
    dense = Ffn(intermediate=config.size("intermediate_size"))
    blocks = [
        Block(attention=attention, ffn=experts if sparse else dense)
        for sparse in sparse_layers(config)
    ]
    spec = model(config, blocks)
    return spec, qwen_names(spec)


def qwen3_experts(config: Config, *, renorm: bool) -> Moe:
    """Routed experts, all of one width, and none shared."""
    return moe(
        config,
        SoftmaxTopK(renorm_floor=0.0 if renorm else None),
        num=config.size("num_experts", "num_local_experts"),
        top_k=config.size("num_experts_per_tok"),
        expert=Ffn(intermediate=config.size("moe_intermediate_size")),
    )

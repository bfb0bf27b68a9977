"""Qwen1.5-MoE and Qwen2-MoE."""

from windlass.models.config import Config
from windlass.models.families.common import gqa, model, moe, sparse_layers, window, windows
from windlass.models.families.tensor_names import qwen_names
from windlass.models.names import NameMap
from windlass.models.spec import Block, Ffn, ModelSpec, Shared, SoftmaxTopK


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    size, last = window(config), config.get("max_window_layers", int, 28)
    if not config.get("use_sliding_window", bool, False):
        size, last = None, 0
    # the reference lets every other layer below max_window_layers slide
    sliding = windows(config, size, default=lambda i: i % 2 == 0 and i < last)
    bias = config.get("qkv_bias", bool, True)
    shared = Ffn(intermediate=config.size("shared_expert_intermediate_size"))
    experts = moe(
        config,
        SoftmaxTopK(renorm_floor=0.0 if config.get("norm_topk_prob", bool, False) else None),
        num=config.size("num_experts", "num_local_experts"),
        top_k=config.size("num_experts_per_tok"),
        expert=Ffn(intermediate=config.size("moe_intermediate_size")),
        shared=Shared(ffn=shared, gated=True),
    )
    dense = Ffn(intermediate=config.size("intermediate_size"))
    blocks = [
        Block(attention=gqa(config, qkv_bias=bias, window=one), ffn=experts if sparse else dense)
        for one, sparse in zip(sliding, sparse_layers(config), strict=True)
    ]
    spec = model(config, blocks)
    return spec, qwen_names(spec, shared="shared_expert")

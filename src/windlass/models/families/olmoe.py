"""OLMoE."""

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families.common import gqa, layers, model, moe
from windlass.models.families.tensor_names import qwen_names
from windlass.models.names import NameMap
from windlass.models.spec import Block, Ffn, ModelSpec, SoftmaxTopK


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    experts = moe(
        config,
        SoftmaxTopK(renorm_floor=0.0 if config.get("norm_topk_prob", bool, False) else None),
        num=config.size("num_experts", "num_local_experts"),
        top_k=config.size("num_experts_per_tok"),
        expert=Ffn(intermediate=config.size("intermediate_size")),
    )
    bias = config.get("attention_bias", bool, False)
    clip = config.optional("clip_qkv", float)
    if clip is not None and clip <= 0:
        raise ModelError(f"{config.where}: clip_qkv is {clip}, allowed a positive number or null")
    attention = gqa(config, qkv_bias=bias, out_bias=bias, qk_norm="full", clip_qkv=clip)
    spec = model(config, [Block(attention=attention, ffn=experts) for _ in layers(config)])
    return spec, qwen_names(spec)

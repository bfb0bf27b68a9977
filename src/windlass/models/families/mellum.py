"""Mellum 2: Qwen3-MoE's blocks, with windows and positions by layer type. Layers for multi-token
prediction are not used."""

from windlass.models.config import Config
from windlass.models.families.common import (
    first_dense,
    full_rope,
    gqa,
    head_dim,
    model,
    window,
    windows,
)
from windlass.models.families.qwen3_moe import qwen3_experts
from windlass.models.families.tensor_names import qwen_names
from windlass.models.names import NameMap
from windlass.models.spec import Ffn, Gqa, ModelSpec

_THETA = {"full_attention": 500_000.0, "sliding_attention": 10_000.0}


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    sliding = windows(config, window(config), default=lambda i: False)
    experts = qwen3_experts(config, renorm=config.get("norm_topk_prob", bool, True))
    dense = Ffn(intermediate=config.size("intermediate_size"))
    spec = model(config, first_dense(config, [_attention(config, one) for one in sliding],
                                     experts, dense))  # fmt: skip
    return spec, qwen_names(spec)


def _attention(config: Config, size: int | None) -> Gqa:
    bias = config.get("attention_bias", bool, False)
    kind = "full_attention" if size is None else "sliding_attention"
    rope = full_rope(config, head_dim(config), theta=_THETA[kind], layer_type=kind)
    return gqa(config, rope, qkv_bias=bias, out_bias=bias, qk_norm="head", window=size)

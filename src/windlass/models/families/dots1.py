"""dots.llm1."""

from windlass.models.config import Config
from windlass.models.families.common import (
    deepseek_moe,
    first_dense,
    gqa,
    model,
    sigmoid_topk,
    window,
    windows,
)
from windlass.models.families.tensor_names import qwen_names
from windlass.models.names import NameMap
from windlass.models.spec import Ffn, ModelSpec


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    # transformers does not read this key and always takes sigmoid scores
    config.one_of("scoring_func", ("sigmoid", "noaux_tc"), default="sigmoid")
    bias = config.get("attention_bias", bool, False)
    first = config.get("max_window_layers", int, 62)
    size = window(config)
    sliding = windows(config, size, default=lambda i: size is not None and i >= first)
    attention = [
        gqa(config, qkv_bias=bias, out_bias=bias, qk_norm="head", window=one) for one in sliding
    ]
    experts = deepseek_moe(config, sigmoid_topk(config, renorm=False))
    dense = Ffn(intermediate=config.size("intermediate_size"))
    spec = model(config, first_dense(config, attention, experts, dense))
    return spec, qwen_names(spec)

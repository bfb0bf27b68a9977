"""GLM-4.5 and GLM-4.6."""

from dataclasses import replace

from windlass.models.config import Config
from windlass.models.families.common import (
    deepseek_moe,
    first_dense,
    gqa,
    head_dim,
    layers,
    model,
    sigmoid_topk,
)
from windlass.models.families.tensor_names import JOIN, qwen_names
from windlass.models.names import NameMap
from windlass.models.rope_config import read_rope, rotary_dim
from windlass.models.spec import Ffn, ModelSpec


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    config.one_of("scoring_func", ("sigmoid",), default="sigmoid")
    attention = gqa(
        config,
        read_rope(config, dim=rotary_dim(config, head_dim(config), default=0.5)),
        qkv_bias=config.get("attention_bias", bool, False),
        qk_norm="head" if config.get("use_qk_norm", bool, False) else "none",
    )
    spec = model(
        config,
        first_dense(
            config,
            [attention for _ in layers(config)],
            deepseek_moe(config, sigmoid_topk(config, renorm=True)),
            Ffn(intermediate=config.size("intermediate_size")),
        ),
    )
    return spec, replace(qwen_names(spec), join=JOIN)

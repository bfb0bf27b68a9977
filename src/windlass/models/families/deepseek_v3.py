"""DeepSeek-V3 and R1. Layers for multi-token prediction are not used."""

from windlass.models.config import Config
from windlass.models.families.common import (
    deepseek_moe,
    first_dense,
    layers,
    mla,
    model,
    sigmoid_topk,
)
from windlass.models.families.tensor_names import mla_names, qwen_names
from windlass.models.names import NameMap
from windlass.models.spec import Ffn, ModelSpec


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    config.one_of("scoring_func", ("sigmoid",), default="sigmoid")
    attention = mla(config, interleaved=config.get("rope_interleave", bool, True))
    spec = model(
        config,
        first_dense(
            config,
            [attention for _ in layers(config)],
            deepseek_moe(config, sigmoid_topk(config, renorm=True)),
            Ffn(intermediate=config.size("intermediate_size")),
        ),
    )
    return spec, qwen_names(spec, attention=mla_names(attention))

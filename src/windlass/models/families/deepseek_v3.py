"""DeepSeek-V3 and R1, Kimi-K2, and GLM-4.7-Flash, whose blocks are the same."""

from dataclasses import replace

from windlass.models.config import Config
from windlass.models.families.common import (
    deepseek_moe,
    first_dense,
    inner_model,
    layers,
    mla,
    model,
    sigmoid_topk,
)
from windlass.models.families.tensor_names import JOIN, mla_names, qwen_names
from windlass.models.names import NameMap
from windlass.models.spec import Ffn, ModelSpec


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    return latent_model(config)


def read_glm4_moe_lite(config: Config) -> tuple[ModelSpec, NameMap]:
    return latent_model(config, num_dense=1, scale=1.8)


def read_kimi_k25(config: Config) -> tuple[ModelSpec, NameMap]:
    """The text part of Kimi-K2.5."""
    config.ignore("projection_hidden_size", "projection_layer_norm_eps")  # of images
    spec, names = inner_model(config, read, "language_model.model.")
    return spec, replace(names, head={"weight": tuple(reversed(names.head["weight"]))})


def latent_model(
    config: Config, *, num_dense: int = 0, scale: float = 1.0
) -> tuple[ModelSpec, NameMap]:
    """A model of DeepSeek-V3's blocks; `num_dense` layers without experts and the `scale` of
    routing weights where the file does not say."""
    config.one_of("scoring_func", ("sigmoid",), default="sigmoid")
    attention = mla(config, interleaved=config.get("rope_interleave", bool, True))
    spec = model(
        config,
        first_dense(
            config,
            [attention for _ in layers(config)],
            deepseek_moe(config, sigmoid_topk(config, renorm=True, scale=scale)),
            Ffn(intermediate=config.size("intermediate_size")),
            num_dense=num_dense,
        ),
    )
    return spec, replace(qwen_names(spec, attention=mla_names(attention)), join=JOIN)

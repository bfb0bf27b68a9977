"""The text part of Qwen3.5-MoE: Qwen3-Next with other tensor names, inside a multimodal file."""

from windlass.models.config import Config
from windlass.models.families.common import inner_model, model
from windlass.models.families.qwen3_next import (
    delta_attentions,
    delta_moe,
    delta_names,
    delta_norm,
)
from windlass.models.names import NameMap
from windlass.models.spec import Block, ModelSpec


def read_text(config: Config) -> tuple[ModelSpec, NameMap]:
    experts = delta_moe(config, renorm=True)
    blocks = [Block(attention=attention, ffn=experts) for attention in delta_attentions(config)]
    spec = model(config, blocks, norm=delta_norm(config))
    return spec, delta_names(spec, fused_first=False)


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    return inner_model(config, read_text, "model.language_model.")

"""The text part of Qwen3-VL-MoE: Qwen3-MoE with turned stacks of experts, in a multimodal file."""

from dataclasses import replace

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families.common import gqa, inner_model, model, sparse_layers
from windlass.models.families.qwen3_moe import qwen3_experts
from windlass.models.families.tensor_names import qwen_names, turned_experts
from windlass.models.names import NameMap
from windlass.models.spec import Block, Ffn, ModelSpec


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    return inner_model(config, read_text, "model.language_model.")


def read_text(config: Config) -> tuple[ModelSpec, NameMap]:
    config.one_of("norm_topk_prob", (True,), default=True)  # transformers does not read it
    bias = config.get("attention_bias", bool, False)
    attention = gqa(config, theta=500_000.0, qkv_bias=bias, out_bias=bias, qk_norm="head")
    experts = qwen3_experts(config, renorm=True)
    dense = Ffn(intermediate=config.size("intermediate_size"))
    spec = model(
        config,
        [Block(attention=attention, ffn=experts if sparse else dense)
         for sparse in sparse_layers(config)],
    )  # fmt: skip
    names, inner = qwen_names(spec), experts.expert.intermediate
    if spec.hidden_size in (inner, 2 * inner):  # transformers 5 saves stacks that are not turned
        raise ModelError(
            f"{config.where}: moe_intermediate_size is {inner}, hidden_size {spec.hidden_size},"
            " allowed widths by which turned stacks of experts can be told from others"
        )
    stacks = turned_experts("mlp.experts", inner, spec.hidden_size)
    expert = {part: stacks[part] + names.expert[part] for part in stacks}
    return spec, replace(names, expert=expert)

"""Granite 3 MoE, with and without a shared expert."""

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families.common import gqa, layers, model, moe
from windlass.models.families.tensor_names import LAYER, at, name_map, stacked_experts
from windlass.models.names import NameMap, Take, TensorSource, TensorSources
from windlass.models.spec import Block, Ffn, ModelSpec, Shared, TopKSoftmax


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    return _read(config, 0)


def read_shared(config: Config) -> tuple[ModelSpec, NameMap]:
    """granitemoeshared; a `shared_intermediate_size` of 0 means no shared expert."""
    return _read(config, config.get("shared_intermediate_size", int, 0))


def _read(config: Config, width: int) -> tuple[ModelSpec, NameMap]:
    """`width`: of the shared expert."""
    inner = config.size("intermediate_size")
    experts = moe(
        config,
        TopKSoftmax(),
        num=config.size("num_local_experts", "num_experts"),
        top_k=config.size("num_experts_per_tok"),
        expert=Ffn(intermediate=inner),
        shared=Shared(ffn=Ffn(intermediate=width)) if width > 0 else None,
    )
    bias = config.get("attention_bias", bool, False)
    scale = config.get("attention_multiplier", float, 1.0)
    attention = gqa(config, scale=scale, qkv_bias=bias, out_bias=bias)
    divisor = config.get("logits_scaling", float, 1.0)
    if divisor <= 0:
        raise ModelError(f"{config.where}: logits_scaling is {divisor}, allowed a positive number")
    spec = model(
        config,
        [Block(attention=attention, ffn=experts) for _ in layers(config)],
        embed_multiplier=config.get("embedding_multiplier", float, 1.0),
        residual_multiplier=config.get("residual_multiplier", float, 1.0),
        logit_divisor=divisor,
    )
    module, hidden = "block_sparse_moe", spec.hidden_size
    hub = stacked_experts(module, inner, hidden, ("input_linear.weight", "output_linear.weight"))
    later = stacked_experts(f"{module}.experts", inner, hidden)
    names = name_map(
        spec,
        moe={
            "router.weight": at(f"{module}.router.layer.weight", f"{module}.router.weight"),
            **_shared_names(width, hidden),
        },
        expert={part: hub[part] + later[part] for part in hub},
    )
    return spec, names


def _shared_names(width: int, hidden: int) -> TensorSources:
    """Gate above up in one tensor (2 I, D)."""
    both, shape = LAYER + "shared_mlp.input_linear.weight", (2 * width, hidden)
    return {
        "shared.gate.weight": (TensorSource(both, shape, (Take(0, 0, width),)),),
        "shared.up.weight": (TensorSource(both, shape, (Take(0, width, 2 * width),)),),
        "shared.down.weight": at("shared_mlp.output_linear.weight"),
    }

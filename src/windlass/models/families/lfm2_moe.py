"""LFM2-MoE: a gated short convolution in most layers, attention in the others."""

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families.common import gqa, layers, model, moe
from windlass.models.families.tensor_names import (
    EMBED,
    HEAD,
    LAYER,
    W123,
    at,
    expert_names,
    linears,
)
from windlass.models.names import NameMap, Reshape, TensorSource
from windlass.models.spec import Block, Ffn, ModelSpec, RmsNorm, ShortConv, SigmoidTopK

_KINDS = ("conv", "full_attention")


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    experts = moe(
        config,
        SigmoidTopK(
            renorm_eps=1e-6 if config.get("norm_topk_prob", bool, True) else None,
            select_bias=config.get("use_expert_bias", bool, True),
            scale=config.get("routed_scaling_factor", float, 1.0),
        ),
        num=config.size("num_experts", "num_local_experts"),
        top_k=config.size("num_experts_per_tok"),
        expert=Ffn(intermediate=config.size("moe_intermediate_size")),
    )
    dense = Ffn(intermediate=config.size("intermediate_size"))
    num_dense = config.get("num_dense_layers", int, 2)
    conv = ShortConv(
        conv_kernel=config.size("conv_L_cache", default=3),
        bias=config.get("conv_bias", bool, False),
    )
    attention = gqa(config, theta=1e6, qk_norm="head")
    blocks = [
        Block(
            attention=conv if kind == "conv" else attention,
            ffn=dense if i < num_dense else experts,
        )
        for i, kind in enumerate(_layer_types(config))
    ]
    spec = model(
        config,
        blocks,
        norm=RmsNorm(eps=config.require("norm_eps", float)),
        tied=config.first(("tie_embedding", "tie_word_embeddings"), bool, True),
    )
    return spec, _names(spec, conv)


def _layer_types(config: Config) -> tuple[str, ...]:
    kinds, num = config.items("layer_types", str), len(layers(config))
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if unknown or len(kinds) != num:
        got = f"{unknown[0]!r}" if unknown else f"{len(kinds)} entries"
        raise ModelError(
            f"{config.where}: layer_types has {got}, allowed {num} of {', '.join(_KINDS)}"
        )
    return kinds


def _names(spec: ModelSpec, conv: ShortConv) -> NameMap:
    taps = (spec.hidden_size, conv.conv_kernel)
    stored = TensorSource(LAYER + "conv.conv.weight", (taps[0], 1, taps[1]), (Reshape(taps),))
    network = dict(zip(("gate", "up", "down"), W123, strict=True))
    return NameMap(
        embed=EMBED,
        block={
            "input_norm.weight": at("operator_norm.weight"),
            "post_norm.weight": at("ffn_norm.weight"),
        },
        attention={
            **linears("self_attn", ("q_proj", "k_proj", "v_proj")),
            "o_proj.weight": at("self_attn.out_proj.weight"),
            "q_norm.weight": at("self_attn.q_layernorm.weight"),
            "k_norm.weight": at("self_attn.k_layernorm.weight"),
        },
        recurrent={
            **linears("conv", ("in_proj",)),
            "conv.weight": (stored,),
            "conv.bias": at("conv.conv.bias"),
            "o_proj.weight": at("conv.out_proj.weight"),
            "o_proj.bias": at("conv.out_proj.bias"),
        },
        moe={
            "router.weight": at("feed_forward.gate.weight"),
            "router.select_bias": at("feed_forward.expert_bias"),
        },
        expert=expert_names(spec, "feed_forward", W123),
        ffn={part: at(f"feed_forward.{name}.weight") for part, name in network.items()},
        final={"norm.weight": (TensorSource("{model}embedding_norm.weight"),)},
        head=HEAD,
    )

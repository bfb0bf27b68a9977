"""Phi-3.5-MoE."""

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families.common import gqa, layers, model, moe, window
from windlass.models.families.tensor_names import W123, at, expert_names, name_map
from windlass.models.names import NameMap
from windlass.models.spec import Block, Ffn, LayerNorm, ModelSpec, SparseMixer


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    top_k = config.size("num_experts_per_tok")
    if top_k != 2:
        raise ModelError(f"{config.where}: num_experts_per_tok is {top_k}, allowed 2 for phimoe")
    experts = moe(
        config,
        SparseMixer(jitter_eps=config.get("router_jitter_noise", float, 0.01)),
        num=config.size("num_local_experts", "num_experts"),
        top_k=top_k,
        expert=Ffn(intermediate=config.size("intermediate_size")),
    )
    bias = config.get("attention_bias", bool, False)
    attention = gqa(config, theta=1e6, qkv_bias=bias, out_bias=bias, window=window(config))
    spec = model(
        config,
        [Block(attention=attention, ffn=experts) for _ in layers(config)],
        norm=LayerNorm(eps=config.require("rms_norm_eps", float), bias=True),
        head_bias=config.get("lm_head_bias", bool, False),
    )
    names = name_map(
        spec,
        moe={"router.weight": at("block_sparse_moe.gate.weight", "mlp.router.weight")},
        expert=expert_names(spec, "block_sparse_moe", W123, stacked="mlp"),
    )
    return spec, names

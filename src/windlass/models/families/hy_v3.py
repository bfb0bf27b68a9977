"""Hy3 (Hunyuan V3). Layers for multi-token prediction are not used."""

from windlass.models.config import Config
from windlass.models.families.common import first_dense, gqa, layers, model, moe
from windlass.models.families.tensor_names import at, name_map, shared_names
from windlass.models.names import NameMap
from windlass.models.spec import Ffn, ModelSpec, Shared, SigmoidTopK


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    for key in ("route_norm", "qk_norm", "moe_router_use_sigmoid", "moe_router_enable_expert_bias"):
        config.one_of(key, (True,), default=True)
    config.ignore("enable_lm_head_fp32", "enable_moe_fp32_combine")  # here it is always
    bias, mlp_bias = config.get("attention_bias", bool, False), config.get("mlp_bias", bool, False)
    inner = config.size("moe_intermediate_size", "expert_hidden_dim")
    num_shared = config.size("num_shared_experts", default=1)
    experts = moe(
        config,
        SigmoidTopK(renorm_eps=1e-20, scale=config.get("router_scaling_factor", float, 2.826)),
        num=config.size("num_experts", "num_local_experts"),
        top_k=config.size("num_experts_per_tok"),
        expert=Ffn(intermediate=inner),
        shared=Shared(ffn=Ffn(intermediate=inner * num_shared, bias=mlp_bias)),
    )
    attention = gqa(config, theta=11_158_840.0, qkv_bias=bias, out_bias=bias, qk_norm="head")
    dense = Ffn(intermediate=config.size("intermediate_size"), bias=mlp_bias)
    blocks = first_dense(config, [attention for _ in layers(config)], experts, dense, num_dense=1)
    spec = model(config, blocks)
    names = {
        "router.weight": at("mlp.router.gate.weight", "mlp.gate.weight"),
        "router.select_bias": at("mlp.expert_bias", "mlp.e_score_correction_bias"),
        **shared_names("mlp.shared_mlp", "mlp.shared_experts"),
    }
    return spec, name_map(spec, moe=names)

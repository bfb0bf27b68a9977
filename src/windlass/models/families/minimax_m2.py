"""MiniMax-M2."""

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families.common import gqa, head_dim, layers, model, moe
from windlass.models.families.tensor_names import W123, at, expert_names, name_map
from windlass.models.names import NameMap
from windlass.models.rope_config import read_rope, rotary_dim
from windlass.models.spec import Block, Ffn, ModelSpec, Rope, SigmoidTopK


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    config.one_of("scoring_func", ("sigmoid",), default="sigmoid")
    config.one_of("use_routing_bias", (True,), default=True)
    config.one_of("use_qk_norm", (True,), default=True)
    config.one_of("qk_norm_type", ("per_layer",), default="per_layer")
    config.one_of("shared_intermediate_size", (0,), default=0)
    if any(kind != 1 for kind in config.items("attn_type_list", int)):
        raise ModelError(f"{config.where}: attn_type_list has linear attention, allowed only 1")
    experts = moe(
        config,
        SigmoidTopK(renorm_eps=0.0),
        num=config.size("num_local_experts", "num_experts"),
        top_k=config.size("num_experts_per_tok"),
        expert=Ffn(intermediate=config.size("intermediate_size")),
    )
    attention = gqa(config, _rope(config), qk_norm="full")
    spec = model(config, [Block(attention=attention, ffn=experts) for _ in layers(config)])
    select_bias = "e_score_correction_bias"
    names = name_map(
        spec,
        moe={
            "router.weight": at("block_sparse_moe.gate.weight", "mlp.gate.weight"),
            "router.select_bias": at(f"block_sparse_moe.{select_bias}", f"mlp.{select_bias}"),
        },
        expert=expert_names(spec, "block_sparse_moe", W123, stacked="mlp"),
    )
    return spec, names


def _rope(config: Config) -> Rope:
    """The hub writes `rotary_dim`, transformers 5 `partial_rotary_factor`; both may be there."""
    width = head_dim(config)
    rotary = config.get("rotary_dim", int, 0)
    dim = rotary_dim(config, width, default=rotary / width if rotary else 1.0)
    if rotary not in (0, dim):
        raise ModelError(
            f"{config.where}: rotary_dim is {rotary}, partial_rotary_factor says {dim}, "
            "allowed one value for both"
        )
    return read_rope(config, dim=dim, default_theta=5e6)

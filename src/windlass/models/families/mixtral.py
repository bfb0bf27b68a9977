"""Mixtral."""

from windlass.models.config import Config
from windlass.models.families.common import gqa, layers, model, moe, window
from windlass.models.families.tensor_names import W123, at, expert_names, name_map
from windlass.models.names import NameMap
from windlass.models.spec import Block, Ffn, ModelSpec, SoftmaxTopK


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    experts = moe(
        config,
        SoftmaxTopK(renorm_floor=0.0),
        num=config.size("num_local_experts", "num_experts"),
        top_k=config.size("num_experts_per_tok"),
        expert=Ffn(intermediate=config.size("intermediate_size")),
    )
    attention = gqa(config, theta=1e6, window=window(config))
    spec = model(config, [Block(attention=attention, ffn=experts) for _ in layers(config)])
    names = name_map(
        spec,
        moe={"router.weight": at("block_sparse_moe.gate.weight", "mlp.gate.weight")},
        expert=expert_names(spec, "block_sparse_moe", W123, stacked="mlp"),
    )
    return spec, names

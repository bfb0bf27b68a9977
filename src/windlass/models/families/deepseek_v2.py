"""DeepSeek-V2, with and without a low-rank query."""

from windlass.models.config import Config
from windlass.models.families.common import deepseek_moe, first_dense, groups, layers, mla, model
from windlass.models.families.tensor_names import mla_names, qwen_names
from windlass.models.names import NameMap
from windlass.models.spec import Ffn, ModelSpec, NoGroups, SoftmaxTopK


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    # transformers ignores it, the published code normalises instead of scaling: not to be guessed
    config.one_of("norm_topk_prob", (False,), default=False)
    config.one_of("scoring_func", ("softmax",), default="softmax")
    methods = ("greedy", "group_limited_greedy")
    limited = config.one_of("topk_method", methods, default="greedy") != "greedy"
    eligible = groups(config, "max")  # read even where greedy ignores it
    routing = SoftmaxTopK(
        renorm_floor=None,
        groups=eligible if limited else NoGroups(),
        scale=config.get("routed_scaling_factor", float, 1.0),
    )
    bias = config.get("mlp_bias", bool, False)
    attention = mla(config, interleaved=True)
    spec = model(
        config,
        first_dense(
            config,
            [attention for _ in layers(config)],
            deepseek_moe(config, routing, bias=bias),
            Ffn(intermediate=config.size("intermediate_size"), bias=bias),
        ),
    )
    return spec, qwen_names(spec, attention=mla_names(attention))

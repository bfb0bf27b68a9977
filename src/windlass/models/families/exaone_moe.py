"""K-EXAONE: full attention has no positions. Layers for multi-token prediction are not used."""

from dataclasses import replace

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families.common import (
    deepseek_moe,
    first_dense,
    gqa,
    model,
    sigmoid_topk,
    window,
    windows,
)
from windlass.models.families.tensor_names import at, name_map, qwen_moe_names
from windlass.models.names import NameMap
from windlass.models.spec import Ffn, Gqa, ModelSpec


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    config.one_of("scoring_func", ("sigmoid",), default="sigmoid")
    experts = deepseek_moe(config, sigmoid_topk(config, renorm=True, scale=2.5))
    dense = Ffn(intermediate=config.size("intermediate_size"))
    blocks = first_dense(config, _attention(config), experts, dense, num_dense=1)
    sparse = [block.ffn is experts for block in blocks]
    if list(config.items("is_moe_layer", bool, sparse)) != sparse:
        raise ModelError(
            f"{config.where}: is_moe_layer is {config.raw['is_moe_layer']}, allowed {sparse}"
        )
    spec = model(config, blocks)
    bias = "e_score_correction_bias"
    names = {
        **qwen_moe_names(),
        "router.select_bias": at(f"mlp.{bias}", f"mlp.gate.{bias}"),
    }
    return spec, name_map(spec, moe=names)


def _attention(config: Config) -> list[Gqa]:
    """Of each layer. Where some layers slide, the others have no positions."""
    size, every = window(config), 1
    config.ignore("sliding_window_pattern")  # layer_types decides
    if size and not config.has("layer_types"):
        every = config.size("sliding_window_pattern", default=4)
    sliding = windows(config, size, default=lambda i: (i + 1) % every != 0)
    whole = gqa(config, qk_norm="head")
    return [replace(whole, window=one, rope=whole.rope if one or not size else None)
            for one in sliding]  # fmt: skip

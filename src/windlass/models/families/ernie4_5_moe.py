"""ERNIE 4.5 MoE (text). Layers for multi-token prediction are not used."""

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families.common import full_rope, gqa, head_dim, layers, model, moe
from windlass.models.families.tensor_names import LAYER, name_map, qwen_moe_names
from windlass.models.names import NameMap, Reshape, TensorSource
from windlass.models.spec import Block, Ffn, ModelSpec, Shared, SoftmaxTopK


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    config.one_of("moe_gate", ("topk", "top2_fused"), default="topk")
    config.one_of("moe_use_aux_free", (True,), default=True)
    num = config.size("moe_num_experts", "num_experts")
    inner = config.size("moe_intermediate_size")
    bias = config.get("use_bias", bool, False)
    num_shared = config.get("moe_num_shared_experts", int, 2)
    shared = Shared(ffn=Ffn(intermediate=inner * num_shared, bias=bias)) if num_shared else None
    floor = config.get("moe_norm_min", float, 1e-12)
    experts = moe(
        config,
        SoftmaxTopK(renorm_floor=floor, select_bias=True),
        num=num,
        top_k=config.size("moe_k", "num_experts_per_tok"),
        expert=Ffn(intermediate=inner),
        shared=shared,
    )
    dense = Ffn(intermediate=config.size("intermediate_size"), bias=bias)
    rope = full_rope(config, head_dim(config), theta=500_000.0, interleaved=True)
    attention = gqa(config, rope, qkv_bias=bias, out_bias=bias)
    sparse = _sparse(config)
    blocks = [Block(attention=attention, ffn=experts if i in sparse else dense)
              for i in layers(config)]  # fmt: skip
    spec = model(config, blocks, tied=True, head_bias=bias)
    biases = ("mlp.moe_statics", "mlp.gate.moe_statics")
    one_row = tuple(
        TensorSource(f"{LAYER}{module}.e_score_correction_bias", (1, num), (Reshape((num,)),))
        for module in biases
    )
    return spec, name_map(spec, moe={**qwen_moe_names(), "router.select_bias": one_row})


def _sparse(config: Config) -> set[int]:
    """Layers with experts."""
    num = len(layers(config))
    first = config.get("moe_layer_start_index", int, 1)
    last = config.get("moe_layer_end_index", int, -1)
    last = num - 1 if last == -1 else last
    interval = config.size("moe_layer_interval", default=1)
    if first < 0 or last < 0:
        raise ModelError(
            f"{config.where}: moe_layer_start_index is {first}, moe_layer_end_index {last}, "
            "allowed 0 or more (-1: the last layer)"
        )
    return {i for i in range(num) if first <= i <= last and (i + 1) % interval == 0}

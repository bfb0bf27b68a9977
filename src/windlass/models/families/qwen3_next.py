"""Qwen3-Next: gated delta rule in most layers, gated softmax attention in every fourth."""

from collections.abc import Sequence
from dataclasses import replace

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families.common import gqa, head_dim, layers, model, moe, sparse_layers
from windlass.models.families.tensor_names import GQA, LAYER, at, name_map, qwen_moe_names
from windlass.models.names import NameMap, Reshape, Take, TensorSource, TensorSources
from windlass.models.rope_config import read_rope, rotary_dim
from windlass.models.spec import (
    Attention,
    Block,
    Ffn,
    GatedDelta,
    Gqa,
    ModelSpec,
    Moe,
    RmsNorm,
    Shared,
    SoftmaxTopK,
)

_KINDS = ("linear_attention", "full_attention")


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    experts = delta_moe(config, renorm=config.get("norm_topk_prob", bool, True))
    sparse = sparse_layers(config)
    config.ignore("intermediate_size")  # of dense layers, which there may be none of
    dense = experts if all(sparse) else Ffn(intermediate=config.size("intermediate_size"))
    blocks = [
        Block(attention=attention, ffn=experts if with_experts else dense)
        for attention, with_experts in zip(delta_attentions(config), sparse, strict=True)
    ]
    spec = model(config, blocks, norm=delta_norm(config))
    return spec, delta_names(spec, fused_first=True)


def delta_norm(config: Config) -> RmsNorm:
    """The norm of the whole model; that inside the delta rule has plain weights."""
    return RmsNorm(eps=config.require("rms_norm_eps", float), plus_one=True)


def delta_moe(config: Config, *, renorm: bool) -> Moe:
    """Routed experts and one shared expert behind a gate."""
    shared = Shared(
        ffn=Ffn(intermediate=config.size("shared_expert_intermediate_size")), gated=True
    )
    return moe(
        config,
        SoftmaxTopK(renorm_floor=0.0 if renorm else None),
        num=config.size("num_experts", "num_local_experts"),
        top_k=config.size("num_experts_per_tok"),
        expert=Ffn(intermediate=config.size("moe_intermediate_size")),
        shared=shared,
    )


def delta_attentions(config: Config) -> list[Attention]:
    """The attention of each layer, from `layer_types` or `full_attention_interval`."""
    num, interval = len(layers(config)), config.size("full_attention_interval", default=4)
    kinds: Sequence[str] = config.items("layer_types", str) or [
        _KINDS[(i + 1) % interval == 0] for i in range(num)
    ]
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if unknown or len(kinds) != num:
        got = f"{unknown[0]!r}" if unknown else f"{len(kinds)} entries"
        raise ModelError(
            f"{config.where}: layer_types has {got}, allowed {num} of {', '.join(_KINDS)}"
        )
    linear, full = _gated_delta(config), _gated_attention(config)
    return [linear if kind == "linear_attention" else full for kind in kinds]


def _gated_attention(config: Config) -> Gqa:
    config.one_of("attention_bias", (False,), default=False)
    config.one_of("attn_output_gate", (True,), default=True)
    dim = rotary_dim(config, head_dim(config), default=0.25)
    return gqa(config, read_rope(config, dim=dim), qk_norm="head", output_gate=True)


def _gated_delta(config: Config) -> GatedDelta:
    keys, values = config.size("linear_num_key_heads"), config.size("linear_num_value_heads")
    if values % keys:
        raise ModelError(
            f"{config.where}: linear_num_key_heads is {keys}, "
            f"allowed a divisor of linear_num_value_heads {values}"
        )
    return GatedDelta(
        num_k_heads=keys,
        num_v_heads=values,
        k_head_dim=config.size("linear_key_head_dim"),
        v_head_dim=config.size("linear_value_head_dim"),
        conv_kernel=config.size("linear_conv_kernel_dim"),
        norm_eps=config.require("rms_norm_eps", float),
    )


# --- names ----------------------------------------------------------------------------------------


def delta_names(spec: ModelSpec, *, fused_first: bool) -> NameMap:
    """Names of both families. `fused_first`: whether the hub's checkpoints have the projections of
    the delta rule in two tensors and experts one by one, or the projections apart and experts
    stacked. Either is read."""
    names = name_map(spec, moe=qwen_moe_names("shared_expert"))
    attention, delta, expert = dict(GQA), {}, dict(names.expert)
    for block in spec.blocks:
        if isinstance(block.attention, Gqa):
            attention |= _query_names(block.attention, spec.hidden_size)
        elif isinstance(block.attention, GatedDelta):
            delta = _delta_names(block.attention, spec.hidden_size)
    if not fused_first:
        delta = {name: tuple(reversed(sources)) for name, sources in delta.items()}
        expert = {name: tuple(reversed(sources)) for name, sources in expert.items()}
    return replace(names, attention=attention, recurrent=delta, expert=expert)


def _query_names(attention: Gqa, hidden: int) -> TensorSources:
    """Query and gate of a head lie one after the other."""
    heads, dim = attention.num_heads, attention.head_dim
    split = Reshape((heads, 2 * dim, hidden))

    def part(start: int) -> tuple[TensorSource, ...]:
        ops = (split, Take(1, start, start + dim))
        return (TensorSource(LAYER + "self_attn.q_proj.weight", (2 * heads * dim, hidden), ops),)

    return {"q_proj.weight": part(0), "gate_proj.weight": part(dim)}


def _delta_names(delta: GatedDelta, hidden: int) -> dict[str, tuple[TensorSource, ...]]:
    module = LAYER + "linear_attn."
    per_key = delta.num_v_heads // delta.num_k_heads  # value heads of a key head
    key, value = delta.k_head_dim, per_key * delta.v_head_dim

    def grouped(tensor: str, start: int, stop: int, rows: int) -> TensorSource:
        """A range of rows of each key head's `rows` rows."""
        ops = (Reshape((delta.num_k_heads, rows, hidden)), Take(1, start, stop))
        return TensorSource(module + tensor, (delta.num_k_heads * rows, hidden), ops)

    def qkvz(start: int, stop: int) -> TensorSource:
        return grouped("in_proj_qkvz.weight", start, stop, 2 * key + 2 * value)

    def qkv(start: int, stop: int) -> TensorSource:
        ops = (Take(0, start, stop),)
        return TensorSource(module + "in_proj_qkv.weight", (delta.conv_dim, hidden), ops)

    keys = delta.num_k_heads * key
    channels = (delta.conv_dim, delta.conv_kernel)
    conv = TensorSource(
        module + "conv1d.weight", (channels[0], 1, channels[1]), (Reshape(channels),)
    )
    return {
        "q_proj.weight": (qkvz(0, key), qkv(0, keys)),
        "k_proj.weight": (qkvz(key, 2 * key), qkv(keys, 2 * keys)),
        "v_proj.weight": (qkvz(2 * key, 2 * key + value), qkv(2 * keys, delta.conv_dim)),
        "z_proj.weight": (
            qkvz(2 * key + value, 2 * key + 2 * value),
            TensorSource(module + "in_proj_z.weight"),
        ),
        "b_proj.weight": (
            grouped("in_proj_ba.weight", 0, per_key, 2 * per_key),
            TensorSource(module + "in_proj_b.weight"),
        ),
        "a_proj.weight": (
            grouped("in_proj_ba.weight", per_key, 2 * per_key, 2 * per_key),
            TensorSource(module + "in_proj_a.weight"),
        ),
        "conv.weight": (conv,),
        "dt_bias": at("linear_attn.dt_bias"),
        "a_log": at("linear_attn.A_log"),
        "out_norm.weight": at("linear_attn.norm.weight"),
        "o_proj.weight": at("linear_attn.out_proj.weight"),
    }

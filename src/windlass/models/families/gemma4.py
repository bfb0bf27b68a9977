"""The text of Gemma 4 with experts (26B-A4B): a dense network and experts side by side in every
layer, each between norms of its own; full attention with wider heads and fewer keys, which are the
values too. Settings of its smaller and dense siblings are refused by name."""

from collections.abc import Sequence
from dataclasses import replace

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families.common import (
    check_heads,
    full_rope,
    inner_model,
    model,
    moe,
    window,
    windows,
)
from windlass.models.families.tensor_names import (
    NORMS,
    PROJECTIONS,
    at,
    name_map,
    shared_names,
    stacked_experts,
)
from windlass.models.names import NameMap
from windlass.models.rope_config import proportional_rope
from windlass.models.spec import Block, Ffn, GeGlu, Gqa, ModelSpec, Moe, Shared, SoftmaxTopK

_NORMS = {
    "input_norm.weight": NORMS["input_norm.weight"],
    "attention_out_norm.weight": at("post_attention_layernorm.weight"),
    "post_norm.weight": at("pre_feedforward_layernorm.weight"),
    "shared_out_norm.weight": at("post_feedforward_layernorm_1.weight"),
    "expert_norm.weight": at("pre_feedforward_layernorm_2.weight"),
    "expert_out_norm.weight": at("post_feedforward_layernorm_2.weight"),
    "ffn_out_norm.weight": at("post_feedforward_layernorm.weight"),
    "output_scale": at("layer_scalar"),
}
_ROUTER = {
    "router.norm.weight": at("router.scale"),
    "router.weight": at("router.proj.weight"),
    "router.expert_scale": at("router.per_expert_scale"),
}


def read_text(config: Config) -> tuple[ModelSpec, NameMap]:
    _refuse_siblings(config)
    blocks = [
        Block(attention=attention, ffn=_moe(config), output_norms=True, output_scale=True)
        for attention in _attentions(config)
    ]
    spec = model(
        config,
        blocks,
        tied=True,
        embed_multiplier=config.size("hidden_size") ** 0.5,
        embed_multiplier_as_stored=True,
        logit_cap=_logit_cap(config),
    )
    return spec, _names(config, spec)


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    return inner_model(config, read_text, "model.language_model.")


def _refuse_siblings(config: Config) -> None:
    """Raises ModelError for what other models of this type have."""
    if not config.get("enable_moe_block", bool, False):
        raise ModelError(
            f"{config.where}: enable_moe_block is false: a dense model without experts; allowed are"
            " Mixture-of-Experts models"
        )
    config.one_of("hidden_activation", ("gelu_pytorch_tanh",), default="gelu_pytorch_tanh")
    config.one_of("use_bidirectional_attention", ("vision",), default="vision")
    for key, what, default in (
        ("hidden_size_per_layer_input", "embeddings of each layer", 256),
        ("num_kv_shared_layers", "layers that share keys and values", 0),
    ):
        if size := config.get(key, int, default):
            raise ModelError(
                f"{config.where}: {key} is {size}, allowed 0: {what} are not supported"
            )
    config.ignore("vocab_size_per_layer_input", "use_double_wide_mlp")  # speak of those two


def _attentions(config: Config) -> list[Gqa]:
    """Sliding and full attention differ in keys, rotary positions and perhaps heads."""
    last = config.size("num_hidden_layers") - 1
    slides = windows(config, window(config), default=lambda i: i != last and (i + 1) % 6 != 0)
    if slides[last] is not None:
        raise ModelError(
            f"{config.where}: layer_types ends with 'sliding_attention', allowed 'full_attention'"
        )
    return [
        _attention(config, kv_heads, dim, size)
        for size, (kv_heads, dim) in zip(slides, _key_heads(config, slides), strict=True)
    ]


def _key_heads(config: Config, slides: Sequence[int | None]) -> list[tuple[int, int]]:
    """Key/value heads of each layer, and their width. Published files say what full attention has,
    transformers 5.23 writes which layers differ."""
    usual = config.size("num_key_value_heads"), config.size("head_dim", default=256)
    if config.has("per_layer_config"):
        section = config.section("per_layer_config")
        layers = {layer.lstrip("0") or "0": section.section(layer) for layer in section.raw}
        found = [_own_heads(layers.pop(str(i), None), usual) for i in range(len(slides))]
        if layers:
            raise ModelError(f"{section.where}: got {next(iter(layers))!r}, allowed layer numbers")
        return found
    full_kv_heads, full_dim = usual[0], config.size("global_head_dim", default=512)
    if _takes_values_from_keys(config):
        full_kv_heads = config.size("num_global_key_value_heads", default=full_kv_heads)
    return [usual if size is not None else (full_kv_heads, full_dim) for size in slides]


def _own_heads(layer: Config | None, usual: tuple[int, int]) -> tuple[int, int]:
    if layer is None:
        return usual
    own = tuple(
        layer.size(key, default=size)
        for key, size in zip(("num_key_value_heads", "head_dim"), usual, strict=True)
    )
    if unknown := layer.unread():
        raise ModelError(f"{layer.where}: got {unknown[0]}, allowed num_key_value_heads, head_dim")
    return own[0], own[1]


def _takes_values_from_keys(config: Config) -> bool:
    """Of full attention."""
    return config.get("attention_k_eq_v", bool, False)


def _attention(config: Config, kv_heads: int, dim: int, size: int | None) -> Gqa:
    heads = config.size("num_attention_heads")
    check_heads(config, heads, kv_heads)
    bias = config.get("attention_bias", bool, False)
    return Gqa(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        rope=proportional_rope(config, dim=dim, layer_type="full_attention")
        if size is None
        else full_rope(config, dim, layer_type="sliding_attention"),
        scale=1.0,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        window=size,
        value_from_key=size is None and _takes_values_from_keys(config),
        value_norm=True,
    )


def _moe(config: Config) -> Moe:
    dense, inner = config.size("intermediate_size"), config.size("moe_intermediate_size")
    return moe(
        config,
        SoftmaxTopK(renorm_floor=0.0, expert_scale=True),
        num=config.size("num_experts"),
        top_k=config.size("top_k_experts", "num_experts_per_tok"),
        expert=Ffn(intermediate=inner, activation=GeGlu()),
        shared=Shared(ffn=Ffn(intermediate=dense, activation=GeGlu()), own_norms=True),
        router_norm=config.size("hidden_size") ** -0.5,
    )


def _logit_cap(config: Config) -> float | None:
    cap = config.optional("final_logit_softcapping", float)
    if cap is not None and cap <= 0:
        raise ModelError(
            f"{config.where}: final_logit_softcapping is {cap}, allowed a positive number"
        )
    return cap


def _names(config: Config, spec: ModelSpec) -> NameMap:
    stacks = stacked_experts("experts", config.size("moe_intermediate_size"), spec.hidden_size)
    expert = {
        part: stacks[part] + at(f"experts.{{expert}}.{name}.weight")
        for part, name in zip(("gate", "up", "down"), PROJECTIONS, strict=True)
    }
    names = name_map(spec, moe={**_ROUTER, **shared_names("mlp")}, expert=expert)
    return replace(names, block=_NORMS)

"""Settings that families share. A family function states what is its own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.names import NameMap
from windlass.models.rope_config import mla_scale, read_rope, rotary_dim
from windlass.models.spec import (
    Attention,
    Block,
    Ffn,
    Gqa,
    LayerNorm,
    Mla,
    ModelSpec,
    Moe,
    NoGroups,
    RmsNorm,
    Rope,
    Routing,
    RoutingGroups,
    Shared,
    SigmoidTopK,
)

Family = Callable[[Config], tuple[ModelSpec, NameMap]]


def head_dim(config: Config) -> int:
    """`head_dim`, or what the heads share of the hidden size."""
    if config.has("head_dim"):
        return config.size("head_dim")
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    if hidden % heads:
        raise ModelError(
            f"{config.where}: hidden_size is {hidden}, allowed a multiple of {heads} "
            "num_attention_heads where head_dim is missing"
        )
    return hidden // heads


def full_rope(
    config: Config, dim: int, *, theta: float = 10_000.0, layer_type: str | None = None,
    interleaved: bool = False,
) -> Rope:  # fmt: skip
    """Rotary positions of families that rotate whole heads; `theta` where the file has none."""
    if rotary_dim(config, dim, layer_type=layer_type) != dim:
        raise ModelError(
            f"{config.where}: partial_rotary_factor is set, allowed 1 for this model type"
        )
    return read_rope(
        config, dim=dim, layer_type=layer_type, interleaved=interleaved, default_theta=theta
    )


def gqa(
    config: Config, rope: Rope | None = None, *, theta: float = 10_000.0, **options: Any
) -> Gqa:
    """Grouped-query attention with the usual key names; `theta` where the file has none, `options`
    are fields of Gqa."""
    dim = head_dim(config)
    heads = config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", default=heads)
    check_heads(config, heads, kv_heads)
    return Gqa(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        rope=rope or full_rope(config, dim, theta=theta),
        scale=options.pop("scale", dim**-0.5),
        **options,
    )


def check_heads(config: Config, heads: int, kv_heads: int) -> None:
    """Raises ModelError unless query heads share key/value heads evenly."""
    if heads % kv_heads:
        raise ModelError(
            f"{config.where}: {kv_heads} key/value heads, allowed a divisor of {heads} heads"
        )


def mla(config: Config, *, interleaved: bool) -> Mla:
    """Latent attention with DeepSeek's key names."""
    nope, rot = config.size("qk_nope_head_dim"), config.size("qk_rope_head_dim")
    rank = config.optional("q_lora_rank", int)
    config.one_of("qk_head_dim", (nope + rot,), default=nope + rot)
    config.ignore("head_dim", "num_key_value_heads")  # of the attention that this one replaces
    return Mla(
        num_heads=config.size("num_attention_heads"),
        q_lora_rank=rank,
        kv_lora_rank=config.size("kv_lora_rank"),
        nope_dim=nope,
        v_head_dim=config.size("v_head_dim"),
        rope=full_rope(config, rot, interleaved=interleaved),
        scale=mla_scale(config, nope + rot),
        latent_norm_eps=1e-6,  # fixed in the reference code, not a setting
        bias=config.get("attention_bias", bool, False),
    )


def window(config: Config) -> int | None:
    """`sliding_window`; null and 0 mean none."""
    size = config.get("sliding_window", int, 0)
    if size < 0:
        raise ModelError(f"{config.where}: sliding_window is {size}, allowed 1 or more")
    return size or None


def windows(
    config: Config, size: int | None, *, default: Callable[[int], bool]
) -> list[int | None]:
    """Window of each layer, from `layer_types`; `default` says which slide where it is missing."""
    num = config.size("num_hidden_layers")
    kinds = config.items("layer_types", str) or tuple(
        "sliding_attention" if default(i) else "full_attention" for i in range(num)
    )
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ModelError(
                f"{config.where}: layer_types has {kind!r}, "
                "allowed 'full_attention', 'sliding_attention'"
            )
    if len(kinds) != num:
        raise ModelError(
            f"{config.where}: layer_types has {len(kinds)} entries, allowed num_hidden_layers {num}"
        )
    if size is None and "sliding_attention" in kinds:
        raise ModelError(
            f"{config.where}: layer_types has 'sliding_attention' without a sliding_window, "
            "allowed 'full_attention'"
        )
    return [size if kind == "sliding_attention" else None for kind in kinds]


def moe(config: Config, routing: Routing, *, num: int, top_k: int, **options: Any) -> Moe:
    """A Moe whose routing can choose `top_k` experts; `options` are its other fields. Raises
    ModelError if it cannot."""
    groups = getattr(routing, "groups", NoGroups())
    eligible, what = num, "experts"
    if isinstance(groups, RoutingGroups):
        per_group = num // groups.num
        if num % groups.num or groups.kept > groups.num:
            raise ModelError(
                f"{config.where}: {groups.kept} of {groups.num} groups of {num} experts, "
                "allowed equal groups and at most all of them"
            )
        if groups.score == "top2_sum" and per_group < 2:
            raise ModelError(
                f"{config.where}: n_group is {groups.num}, allowed groups of 2 or more"
            )
        eligible, what = per_group * groups.kept, "experts of the kept groups"
    if top_k > eligible:
        raise ModelError(
            f"{config.where}: {top_k} experts per token, allowed at most the {eligible} {what}"
        )
    return Moe(num_experts=num, top_k=top_k, routing=routing, **options)


def groups(config: Config, score: Any) -> NoGroups | RoutingGroups:
    """`n_group` and `topk_group`; one group or none means that all experts are eligible."""
    num = config.get("n_group", int, 1)
    kept = config.get("topk_group", int, 1)
    if num <= 1:
        return NoGroups()
    if kept < 1:
        raise ModelError(f"{config.where}: topk_group is {kept}, allowed 1 or more")
    return RoutingGroups(num=num, kept=kept, score=score)


def sigmoid_topk(config: Config, *, renorm: bool, scale: float = 1.0) -> SigmoidTopK:
    """DeepSeek-V3's routing; `renorm` is the family's default of `norm_topk_prob`, `scale` that of
    `routed_scaling_factor`."""
    config.one_of("topk_method", ("noaux_tc",), default="noaux_tc")
    return SigmoidTopK(
        renorm_eps=1e-20 if config.get("norm_topk_prob", bool, renorm) else None,
        groups=groups(config, "top2_sum"),
        scale=config.get("routed_scaling_factor", float, scale),
    )


def deepseek_moe(config: Config, routing: Routing, *, bias: bool = False) -> Moe:
    """Routed and shared experts with DeepSeek's key names."""
    config.one_of("moe_layer_freq", (1,), default=1)
    inner = config.size("moe_intermediate_size")
    num_shared = config.first(("n_shared_experts", "num_shared_experts"), int, 0)
    shared = Shared(ffn=Ffn(intermediate=inner * num_shared, bias=bias)) if num_shared > 0 else None
    return moe(
        config,
        routing,
        num=config.size("n_routed_experts", "num_experts", "num_local_experts"),
        top_k=config.size("num_experts_per_tok"),
        expert=Ffn(intermediate=inner),
        shared=shared,
    )


def sparse_layers(config: Config) -> list[bool]:
    """Qwen's choice of the layers that have experts."""
    step = config.size("decoder_sparse_step", default=1)
    without = config.items("mlp_only_layers", int)
    return [i not in without and (i + 1) % step == 0 for i in layers(config)]


def first_dense(
    config: Config, attention: Sequence[Attention], experts: Moe, dense: Ffn, *, num_dense: int = 0
) -> list[Block]:
    """Blocks without experts where `mlp_layer_types` says so, or `first_k_dense_replace`, which
    must agree; the first `num_dense` where the file has neither."""
    num = config.get("first_k_dense_replace", int, num_dense)
    kinds = tuple("dense" if i < num else "sparse" for i in range(len(attention)))
    listed = config.items("mlp_layer_types", str, kinds)
    is_other = len(listed) != len(kinds) or not set(listed) <= {"dense", "sparse"}
    if is_other or (config.has("first_k_dense_replace") and listed != kinds):
        allowed = f"allowed {len(kinds)} of 'dense', 'sparse'"
        if config.has("first_k_dense_replace"):
            allowed += f", as first_k_dense_replace {num} says"
        raise ModelError(f"{config.where}: mlp_layer_types is {list(listed)}, {allowed}")
    return [
        Block(attention=one, ffn=dense if kind == "dense" else experts)
        for one, kind in zip(attention, listed, strict=True)
    ]


def model(
    config: Config,
    blocks: Sequence[Block],
    *,
    norm: RmsNorm | LayerNorm | None = None,
    tied: bool = False,
    **options: Any,
) -> ModelSpec:
    """A ModelSpec with the usual key names; `tied` where the file does not say, `options` are
    fields of ModelSpec."""
    config.one_of("hidden_act", ("silu", "swish"), default="silu")
    if not any(isinstance(block.ffn, Moe) for block in blocks):
        raise ModelError(f"{config.where}: no layer has experts, allowed at least one that has")
    return ModelSpec(
        family=config.require("model_type", str),
        vocab_size=config.size("vocab_size"),
        hidden_size=config.size("hidden_size"),
        max_positions=config.size("max_position_embeddings"),
        blocks=tuple(blocks),
        norm=norm or RmsNorm(eps=config.require("rms_norm_eps", float)),
        tied_head=config.get("tie_word_embeddings", bool, tied),
        **options,
    )


def inner_model(config: Config, read_text: Family, prefix: str) -> tuple[ModelSpec, NameMap]:
    """The language model of an image-and-text checkpoint, under `prefix` on disk; its other tensors
    are left unread."""
    spec, names = read_text(config.section("text_config"))
    spec = replace(spec, family=config.require("model_type", str))
    others = tuple(one for one in names.prefixes if one != prefix)
    return spec, replace(names, prefixes=(prefix, *others))


def layers(config: Config) -> range:
    """Indices of the layers."""
    return range(config.size("num_hidden_layers"))

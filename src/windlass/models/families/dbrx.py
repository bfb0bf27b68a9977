"""DBRX. Its config.json nests attention and experts, and its blocks have names of their own."""

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families.common import check_heads, full_rope, moe
from windlass.models.names import NameMap, Take, TensorSource, TensorSources, Transpose
from windlass.models.spec import Block, Ffn, Gqa, LayerNorm, ModelSpec, Moe, SoftmaxTopK

_LAYER = "{model}blocks.{layer}."


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    config.one_of("tie_word_embeddings", (False,), default=False)
    hidden = config.size("d_model", "hidden_size")
    attention, experts = _attention(config, hidden), _experts(config.section("ffn_config"))
    num_layers = config.size("n_layers", "num_hidden_layers")
    spec = ModelSpec(
        family="dbrx",
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        max_positions=config.size("max_seq_len", "max_position_embeddings"),
        blocks=tuple(Block(attention=attention, ffn=experts) for _ in range(num_layers)),
        norm=LayerNorm(eps=1e-5, bias=False),  # fixed in the reference code
    )
    return spec, _names(attention, experts, hidden)


def _attention(config: Config, hidden: int) -> Gqa:
    nested = config.section("attn_config")
    heads, kv_heads = config.size("n_heads", "num_attention_heads"), nested.size("kv_n_heads")
    config.ignore("num_key_value_heads")  # transformers' copy
    check_heads(config, heads, kv_heads)
    if hidden % heads:
        raise ModelError(
            f"{config.where}: d_model is {hidden}, allowed a multiple of {heads} heads"
        )
    dim = hidden // heads
    outer = config.get("rope_parameters", dict, {}).get("rope_theta", config.raw.get("rope_theta"))
    theta = nested.optional("rope_theta", float)
    if theta is not None and outer is not None and theta != outer:
        raise ModelError(
            f"{config.where}: rope_theta is {outer} outside and {theta} in attn_config, "
            "allowed one value for both"
        )
    clip = nested.optional("clip_qkv", float)
    if clip is not None and clip <= 0:
        raise ModelError(f"{nested.where}: clip_qkv is {clip}, allowed a positive number or null")
    return Gqa(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        rope=full_rope(config, dim, theta=10_000.0 if theta is None else theta),
        scale=dim**-0.5,
        clip_qkv=clip,
    )


def _experts(nested: Config) -> Moe:
    nested.ignore("hidden_size")  # transformers' copy
    activation = nested.get("ffn_act_fn", dict, {"name": "silu"})
    if activation != {"name": "silu"}:
        raise ModelError(f"{nested.where}: ffn_act_fn is {activation}, allowed {{'name': 'silu'}}")
    nested.ignore("moe_normalize_expert_weights")  # read here, where null is not absence
    order = nested.raw.get("moe_normalize_expert_weights", 1)
    if order not in (None, 1, 2):
        raise ModelError(
            f"{nested.where}: moe_normalize_expert_weights is {order!r}, allowed null, 1, 2"
        )
    return moe(
        nested,
        SoftmaxTopK(
            renorm_floor=None if order is None else 0.0, renorm_order=2 if order == 2 else 1
        ),
        num=nested.size("moe_num_experts"),
        top_k=nested.size("moe_top_k"),
        expert=Ffn(intermediate=nested.size("ffn_hidden_size")),
    )


def _names(attention: Gqa, experts: Moe, hidden: int) -> NameMap:
    q = attention.num_heads * attention.head_dim
    kv = attention.num_kv_heads * attention.head_dim
    fused = _LAYER + "norm_attn_norm.attn.Wqkv.weight"

    def rows(start: int, stop: int) -> tuple[TensorSource, ...]:
        return (TensorSource(fused, (q + 2 * kv, hidden), (Take(0, start, stop),)),)

    inner = (experts.expert.intermediate, hidden)
    stack = _LAYER + "ffn.experts.mlp."
    expert: TensorSources = {
        "gate": (TensorSource(stack + "w1", inner, (), "rows"),),
        "up": (TensorSource(stack + "v1", inner, (), "rows"),),
        "down": (TensorSource(stack + "w2", inner, (Transpose(),), "rows"),),
    }
    return NameMap(
        prefixes=("transformer.", ""),
        embed={"weight": (TensorSource("{model}wte.weight"),)},
        block={
            "input_norm.weight": (TensorSource(_LAYER + "norm_attn_norm.norm_1.weight"),),
            "post_norm.weight": (TensorSource(_LAYER + "norm_attn_norm.norm_2.weight"),),
        },
        attention={
            "q_proj.weight": rows(0, q),
            "k_proj.weight": rows(q, q + kv),
            "v_proj.weight": rows(q + kv, q + 2 * kv),
            "o_proj.weight": (TensorSource(_LAYER + "norm_attn_norm.attn.out_proj.weight"),),
        },
        moe={"router.weight": (TensorSource(_LAYER + "ffn.router.layer.weight"),)},
        expert=expert,
        final={"norm.weight": (TensorSource("{model}norm_f.weight"),)},
        head={"weight": (TensorSource("lm_head.weight"),)},
    )

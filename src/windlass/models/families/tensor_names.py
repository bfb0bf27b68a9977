"""Names of tensors as most checkpoints have them, for families to put together."""

from collections.abc import Sequence

from windlass.models.names import NameMap, Reshape, Take, TensorSource, TensorSources, Transpose
from windlass.models.spec import Mla, ModelSpec, Moe

LAYER = "{model}layers.{layer}."
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
W123 = ("w1", "w3", "w2")


def at(*names: str) -> tuple[TensorSource, ...]:
    """TensorSources with the canonical shape: paths inside a layer, the hub's first."""
    return tuple(TensorSource(LAYER + name) for name in names)


def linears(module: str, names: Sequence[str]) -> TensorSources:
    """Weight and bias of linear maps that are called on disk as here."""
    return {
        f"{name}.{kind}": at(f"{module}.{name}.{kind}")
        for name in names
        for kind in ("weight", "bias")
    }


NORMS: TensorSources = {
    "input_norm.weight": at("input_layernorm.weight"),
    "input_norm.bias": at("input_layernorm.bias"),
    "post_norm.weight": at("post_attention_layernorm.weight"),
    "post_norm.bias": at("post_attention_layernorm.bias"),
}

# Of a layer that predicts further tokens, in the checkpoints of DeepSeek-V3 and those like it
JOIN: TensorSources = {
    "embed_norm.weight": at("enorm.weight"),
    "state_norm.weight": at("hnorm.weight"),
    "join.weight": at("eh_proj.weight"),
    "draft_norm.weight": at("shared_head.norm.weight"),
}

GQA: TensorSources = {
    **linears("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "q_norm.weight": at("self_attn.q_norm.weight"),
    "k_norm.weight": at("self_attn.k_norm.weight"),
    "sinks": at("self_attn.sinks"),
}

EMBED: TensorSources = {"weight": (TensorSource("{model}embed_tokens.weight"),)}
FINAL: TensorSources = {
    "norm.weight": (TensorSource("{model}norm.weight"),),
    "norm.bias": (TensorSource("{model}norm.bias"),),
    "head_bias": (TensorSource("lm_head.bias"), TensorSource("language_model.lm_head.bias")),
}
HEAD: TensorSources = {
    "weight": (TensorSource("lm_head.weight"), TensorSource("language_model.lm_head.weight"))
}


def mla_names(attention: Mla) -> TensorSources:
    """DeepSeek's names. Up-projections of keys and values lie in one tensor, head by head."""
    nope, value, latent = attention.nope_dim, attention.v_head_dim, attention.kv_lora_rank
    shape = (attention.num_heads * (nope + value), latent)
    heads = Reshape((attention.num_heads, nope + value, latent))
    fused = LAYER + "self_attn.kv_b_proj.weight"
    own = linears("self_attn", ("q_proj", "q_a_proj", "q_b_proj", "o_proj"))
    renamed = {
        f"kv_a_proj.{kind}": at(f"self_attn.kv_a_proj_with_mqa.{kind}")
        for kind in ("weight", "bias")
    }
    return {
        **own,
        **renamed,
        "q_a_norm.weight": at("self_attn.q_a_layernorm.weight"),
        "kv_a_norm.weight": at("self_attn.kv_a_layernorm.weight"),
        "k_up.weight": (TensorSource(fused, shape, (heads, Take(1, 0, nope))),),
        "v_up.weight": (TensorSource(fused, shape, (heads, Take(1, nope, nope + value))),),
    }


def ffn_names(module: str) -> TensorSources:
    """A dense network: `gate_proj`, `up_proj`, `down_proj`."""
    weights = {name: at(f"{module}.{name}_proj.weight") for name in ("gate", "up", "down")}
    biases = {f"{name}_bias": at(f"{module}.{name}_proj.bias") for name in ("gate", "up", "down")}
    return weights | biases


def shared_names(*modules: str) -> TensorSources:
    """A shared expert in one of `modules`: `gate_proj`, `up_proj`, `down_proj`."""
    return {
        f"shared.{name}.{kind}": at(*(f"{module}.{name}_proj.{kind}" for module in modules))
        for name in ("gate", "up", "down")
        for kind in ("weight", "bias")
    }


def expert_names(
    spec: ModelSpec, module: str, names: Sequence[str], *, stacked: str | None = None
) -> TensorSources:
    """Experts one by one in `module`, their gate, up and down called `names`; or stacked as in
    transformers 5, in the module `stacked` where it has another name there."""
    experts = next(block.ffn for block in spec.blocks if isinstance(block.ffn, Moe))
    stacks = stacked_experts(
        f"{stacked or module}.experts", experts.expert.intermediate, spec.hidden_size
    )
    return {
        part: at(f"{module}.experts.{{expert}}.{name}.weight") + stacks[part]
        for part, name in zip(("gate", "up", "down"), names, strict=True)
    }


def stacked_experts(
    module: str, inner: int, hidden: int, names: tuple[str, str] = ("gate_up_proj", "down_proj")
) -> TensorSources:
    """All experts in two tensors: gates above ups (E, 2 I, D), and downs (E, D, I)."""
    both, down = (f"{LAYER}{module}.{name}" for name in names)
    shape = (2 * inner, hidden)
    return {
        "gate": (TensorSource(both, shape, (Take(0, 0, inner),), "experts"),),
        "up": (TensorSource(both, shape, (Take(0, inner, 2 * inner),), "experts"),),
        "down": (TensorSource(down, (hidden, inner), (), "experts"),),
    }


def turned_experts(module: str, inner: int, hidden: int) -> TensorSources:
    """All experts in two tensors of matrices (inputs, outputs): gates beside ups (E, D, 2 I), and
    downs (E, I, D)."""
    both, down = f"{LAYER}{module}.gate_up_proj", f"{LAYER}{module}.down_proj"

    def columns(start: int) -> tuple[TensorSource, ...]:
        ops = (Take(1, start, start + inner), Transpose())
        return (TensorSource(both, (hidden, 2 * inner), ops, "experts"),)

    return {
        "gate": columns(0),
        "up": columns(inner),
        "down": (TensorSource(down, (inner, hidden), (Transpose(),), "experts"),),
    }


def name_map(
    spec: ModelSpec,
    *,
    module: str = "mlp",
    moe: TensorSources,
    expert: TensorSources | None = None,
    attention: TensorSources = GQA,
) -> NameMap:
    """The usual names, except as given."""
    return NameMap(
        embed=EMBED,
        block=NORMS,
        attention=attention,
        moe=moe,
        expert=expert or expert_names(spec, module, PROJECTIONS),
        ffn=ffn_names(module),
        final=FINAL,
        head=HEAD,
    )


def qwen_moe_names(shared: str = "shared_experts") -> TensorSources:
    """Router and shared expert of the many families that follow Qwen2-MoE and DeepSeek."""
    return {
        "router.weight": at("mlp.gate.weight"),
        "router.select_bias": at("mlp.gate.e_score_correction_bias"),
        **shared_names(f"mlp.{shared}"),
        "shared.mix.weight": at("mlp.shared_expert_gate.weight"),
    }


def qwen_names(
    spec: ModelSpec, *, shared: str = "shared_experts", attention: TensorSources = GQA
) -> NameMap:
    """All names of those families."""
    return name_map(spec, moe=qwen_moe_names(shared), attention=attention)

"""Canonical tensors of each part and their shapes, from the spec alone. Knows no checkpoint.

D hidden, V vocabulary, E experts, I intermediate, H query heads, K key/value heads, d head dim.
"""

from collections.abc import Mapping

from windlass.models.spec import (
    Attention,
    Ffn,
    GatedDelta,
    Gqa,
    LayerNorm,
    Mamba2,
    Mla,
    ModelSpec,
    Moe,
    ShortConv,
    SigmoidTopK,
    SoftmaxTopK,
    TopKSoftmax,
)

Shapes = Mapping[str, tuple[int, ...]]


def table_shape(spec: ModelSpec) -> tuple[int, ...]:
    """Of the embedding table, and of the output projection."""
    return spec.vocab_size, spec.hidden_size


def final_shapes(spec: ModelSpec) -> Shapes:
    """Part `final`."""
    bias = {"head_bias": (spec.vocab_size,)} if spec.head_bias else {}
    return _norm(spec, "norm") | bias


def block_shapes(spec: ModelSpec, layer: int) -> Shapes:
    """Part `block`: norms, attention, router and shared expert."""
    block, hidden = spec.blocks[layer], spec.hidden_size
    norms: list[str] = []
    if block.attention is not None:
        norms += ["input_norm", "attention_out_norm"][: 1 + block.output_norms]
    if block.ffn is not None:
        norms += ["post_norm", "ffn_out_norm"][: 1 + block.output_norms]
    if isinstance(block.ffn, Moe) and block.ffn.shared and block.ffn.shared.own_norms:
        norms += ["shared_out_norm", "expert_norm", "expert_out_norm"]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in norms:
        shapes |= _norm(spec, name)
    if block.attention is not None:
        shapes |= attention_shapes(block.attention, hidden)
    if isinstance(block.ffn, Moe):
        shapes |= moe_shapes(block.ffn, hidden)
    return shapes | ({"output_scale": (1,)} if block.output_scale else {})


def join_shapes(spec: ModelSpec) -> Shapes:
    """Part `join`, of a block that drafts: norms of embedding and state, the matrix that joins
    them, and the norm before the head."""
    norms = [_norm(spec, name) for name in ("embed_norm", "state_norm", "draft_norm")]
    join = {"join.weight": (spec.hidden_size, 2 * spec.hidden_size)}
    return norms[0] | norms[1] | norms[2] | join


def attention_shapes(attention: Attention, hidden: int) -> Shapes:
    """The attention's share of part `block`."""
    match attention:
        case Gqa():
            return _gqa(attention, hidden)
        case Mla():
            return _mla(attention, hidden)
        case GatedDelta():
            return _delta(attention, hidden)
        case ShortConv():
            return _short_conv(attention, hidden)
        case Mamba2():
            return _mamba(attention, hidden)


def moe_shapes(moe: Moe, hidden: int) -> Shapes:
    """Router's and shared expert's share of part `block`."""
    shapes: dict[str, tuple[int, ...]] = {"router.weight": (moe.num_experts, hidden)}
    if isinstance(moe.routing, TopKSoftmax) and moe.routing.router_bias:
        shapes["router.bias"] = (moe.num_experts,)
    if isinstance(moe.routing, (SoftmaxTopK, SigmoidTopK)) and moe.routing.select_bias:
        shapes["router.select_bias"] = (moe.num_experts,)
    if isinstance(moe.routing, SoftmaxTopK) and moe.routing.expert_scale:
        shapes["router.expert_scale"] = (moe.num_experts,)
    if moe.router_norm is not None:
        shapes["router.norm.weight"] = (hidden,)
    if moe.shared is None:
        return shapes
    for name, shape in ffn_shapes(moe.shared.ffn, hidden).items():
        part, is_bias = name.removesuffix("_bias"), name.endswith("_bias")
        shapes[f"shared.{part}.{'bias' if is_bias else 'weight'}"] = shape
    if moe.shared.gated:
        shapes["shared.mix.weight"] = (1, hidden)
    return shapes


def ffn_shapes(ffn: Ffn, hidden: int) -> Shapes:
    """Parts `ffn` and `expert`."""
    inner = ffn.intermediate
    all_shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {name: all_shapes[name] for name in ffn.matrices}
    if ffn.bias:
        shapes |= {f"{name}_bias": shape[:1] for name, shape in shapes.items()}
    return shapes


def _norm(spec: ModelSpec, name: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (spec.hidden_size,)}
    if isinstance(spec.norm, LayerNorm) and spec.norm.bias:
        shapes[f"{name}.bias"] = (spec.hidden_size,)
    return shapes


def _linear(
    name: str, outputs: int, inputs: int, *, bias: bool = False
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (outputs, inputs)}
    return shapes | ({f"{name}.bias": (outputs,)} if bias else {})


def _gqa(attention: Gqa, hidden: int) -> Shapes:
    q = attention.num_heads * attention.head_dim
    kv = attention.num_kv_heads * attention.head_dim
    shapes = _linear("q_proj", q, hidden, bias=attention.qkv_bias)
    shapes |= _linear("k_proj", kv, hidden, bias=attention.qkv_bias)
    if not attention.value_from_key:
        shapes |= _linear("v_proj", kv, hidden, bias=attention.qkv_bias)
    shapes |= _linear("o_proj", hidden, q, bias=attention.out_bias)
    if attention.qk_norm != "none":
        per_head = attention.qk_norm == "head"
        shapes["q_norm.weight"] = (attention.head_dim if per_head else q,)
        shapes["k_norm.weight"] = (attention.head_dim if per_head else kv,)
    if attention.sinks:
        shapes["sinks"] = (attention.num_heads,)
    if attention.output_gate:
        shapes |= _linear("gate_proj", q, hidden)
    return shapes


def _mla(attention: Mla, hidden: int) -> Shapes:
    heads, latent, rot = attention.num_heads, attention.kv_lora_rank, attention.rope.dim
    q, rank = heads * (attention.nope_dim + rot), attention.q_lora_rank
    if rank is None:
        shapes = _linear("q_proj", q, hidden)
    else:
        shapes = _linear("q_a_proj", rank, hidden, bias=attention.bias)
        shapes |= {"q_a_norm.weight": (rank,)} | _linear("q_b_proj", q, rank)
    shapes |= _linear("kv_a_proj", latent + rot, hidden, bias=attention.bias)
    shapes["kv_a_norm.weight"] = (latent,)
    shapes["k_up.weight"] = (heads, attention.nope_dim, latent)
    shapes["v_up.weight"] = (heads, attention.v_head_dim, latent)
    return shapes | _linear("o_proj", hidden, heads * attention.v_head_dim, bias=attention.bias)


def _delta(attention: GatedDelta, hidden: int) -> Shapes:
    keys = attention.num_k_heads * attention.k_head_dim
    values = attention.num_v_heads * attention.v_head_dim
    shapes = _linear("q_proj", keys, hidden) | _linear("k_proj", keys, hidden)
    shapes |= _linear("v_proj", values, hidden) | _linear("z_proj", values, hidden)
    shapes |= _linear("b_proj", attention.num_v_heads, hidden)
    shapes |= _linear("a_proj", attention.num_v_heads, hidden)
    shapes["conv.weight"] = (attention.conv_dim, attention.conv_kernel)
    shapes["dt_bias"] = shapes["a_log"] = (attention.num_v_heads,)
    shapes["out_norm.weight"] = (attention.v_head_dim,)
    return shapes | _linear("o_proj", hidden, values)


def _short_conv(attention: ShortConv, hidden: int) -> Shapes:
    shapes = _linear("in_proj", 3 * hidden, hidden, bias=attention.bias)
    shapes |= {"conv.weight": (hidden, attention.conv_kernel)}
    shapes |= {"conv.bias": (hidden,)} if attention.bias else {}
    return shapes | _linear("o_proj", hidden, hidden, bias=attention.bias)


def _mamba(attention: Mamba2, hidden: int) -> Shapes:
    inner, channels = attention.inner, attention.conv_dim
    shapes = _linear("state_proj", inner + channels + attention.num_heads, hidden)
    shapes["conv.weight"] = (channels, attention.conv_kernel)
    shapes |= {"conv.bias": (channels,)} if attention.conv_bias else {}
    shapes["dt_bias"] = shapes["a_log"] = shapes["d"] = (attention.num_heads,)
    shapes["out_norm.weight"] = (inner,)
    return shapes | _linear("o_proj", hidden, inner)

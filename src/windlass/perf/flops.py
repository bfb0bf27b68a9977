"""What a model needs by its description: parameters and operations. Pure arithmetic.

FLOPs count a multiplication and an addition as two; norms, activations and softmax are left out
(under 1 % of a block).
"""

from math import prod

from windlass.models.shapes import (
    Shapes,
    attention_shapes,
    block_shapes,
    ffn_shapes,
    final_shapes,
    join_shapes,
    moe_shapes,
    table_shape,
)
from windlass.models.spec import (
    Attention,
    Block,
    Ffn,
    GatedDelta,
    Gqa,
    Mamba2,
    Mla,
    ModelSpec,
    Moe,
    Recurrent,
    ShortConv,
)


def num_parameters(spec: ModelSpec) -> int:
    """All parameters; a tied head counts once."""
    blocks = sum(
        _block_elements(spec, layer, num_experts=_num_experts(block))
        for layer, block in enumerate(spec.blocks)
    )
    return blocks + _ends(spec)


def block_flops_per_token(spec: ModelSpec, layer: int, *, context: int = 0) -> int:
    """Of one token in one block; `context` positions are attended to."""
    block = spec.blocks[layer]
    weights = attention_matrices(spec, layer) + shared_matrices(spec, layer)
    weights += _num_active(block) * expert_matrices(spec, layer)
    return 2 * weights + attention_flops(block.attention, context)


def attention_matrices(spec: ModelSpec, layer: int) -> int:
    """Elements of the matrices around attention, and before it of what joins the rows of a block
    that drafts; 0 where there is none."""
    attention = spec.blocks[layer].attention
    joins = _matrices(join_shapes(spec)) if spec.blocks[layer].drafts else 0
    own = 0 if attention is None else _matrices(attention_shapes(attention, spec.hidden_size))
    return own + joins


def shared_matrices(spec: ModelSpec, layer: int) -> int:
    """Elements of router and shared expert; 0 in a layer without experts."""
    ffn = spec.blocks[layer].ffn
    return _matrices(moe_shapes(ffn, spec.hidden_size)) if isinstance(ffn, Moe) else 0


def expert_matrices(spec: ModelSpec, layer: int) -> int:
    """Elements of one expert's matrices, or of a dense layer's network; 0 where there is none."""
    return _matrices(_network_shapes(spec, layer))


def attention_row_numbers(spec: ModelSpec, layer: int) -> int:
    """Numbers that one row reads and writes beside products and scores: norms, rotation, keys and
    values stored, residual. Counted of the decoder's operations, each as a trip of its own."""
    attention, hidden = spec.blocks[layer].attention, spec.hidden_size
    around = 5 * hidden  # norm: read, written; residual: two read, one written
    around += 2 * hidden * spec.blocks[layer].output_norms
    match attention:
        case None:
            return 0
        case Gqa():
            kept = attention.num_kv_heads * attention.head_dim
            heads = attention.num_heads * attention.head_dim + kept
            norms = 0 if attention.qk_norm == "none" else 2 * heads
            norms += 2 * kept * attention.value_norm
            return around + norms + (4 * heads if attention.rope else 0) + 3 * kept
        case Mla():
            row = attention.kv_lora_rank + attention.rope.dim
            low = 2 * ((attention.q_lora_rank or 0) + attention.kv_lora_rank)
            return around + low + attention.num_heads * (2 * row + 4 * attention.rope.dim) + 2 * row
        case GatedDelta():
            values = attention.num_v_heads * attention.v_head_dim
            return around + (2 + attention.conv_kernel) * attention.conv_dim + 4 * values
        case Mamba2():
            return around + (4 + attention.conv_kernel) * attention.conv_dim + 8 * attention.inner
        case ShortConv():
            # the gates before and after: three numbers each; the window, and each tap's share
            return around + (6 + 2 + attention.conv_kernel) * hidden


def ffn_row_numbers(spec: ModelSpec, layer: int) -> tuple[int, int]:
    """The same of a layer's network: before its experts (norm, routing), and after (their sum)."""
    block, hidden = spec.blocks[layer], spec.hidden_size
    ffn, after = block.ffn, 2 * hidden * (block.output_norms + block.output_scale)
    if ffn is None:
        return 0, 0
    if isinstance(ffn, Ffn):
        return 2 * hidden, 3 * hidden + after
    own = ffn.shared is not None and ffn.shared.own_norms  # before and after shared and routed
    before = 2 * hidden * (1 + 2 * own + (ffn.router_norm is not None))
    after += (ffn.top_k + 2 + 5 * own) * hidden
    return before + 4 * ffn.num_experts + 8 * ffn.top_k, after


def kept_numbers(attention: Attention | None) -> int:
    """Numbers that a position adds to the KV cache of one layer."""
    match attention:
        case Gqa():
            return 2 * attention.num_kv_heads * attention.head_dim
        case Mla():
            return attention.kv_lora_rank + attention.rope.dim
        case None | GatedDelta() | ShortConv() | Mamba2():
            return 0


def active_experts(num_experts: int, top_k: int, rows: float) -> float:
    """Experts of a layer that at least one of `rows` rows uses, rows and choices being even."""
    return float(num_experts * (1 - (1 - min(1.0, top_k / num_experts)) ** rows))


def head_flops_per_token(spec: ModelSpec) -> int:
    """Of the output projection, for each token whose logits are computed."""
    return 2 * prod(table_shape(spec))


def _num_experts(block: Block) -> int:
    return block.ffn.num_experts if isinstance(block.ffn, Moe) else 1


def _num_active(block: Block) -> int:
    return block.ffn.top_k if isinstance(block.ffn, Moe) else 1


def _block_elements(spec: ModelSpec, layer: int, *, num_experts: int) -> int:
    own = _elements(block_shapes(spec, layer))
    own += _elements(join_shapes(spec)) if spec.blocks[layer].drafts else 0
    return own + num_experts * _elements(_network_shapes(spec, layer))


def _network_shapes(spec: ModelSpec, layer: int) -> Shapes:
    """Of one expert, or of a dense network."""
    ffn = spec.blocks[layer].ffn
    if ffn is None:
        return {}
    return ffn_shapes(ffn.expert if isinstance(ffn, Moe) else ffn, spec.hidden_size)


def _ends(spec: ModelSpec) -> int:
    tables = 1 if spec.tied_head else 2
    return tables * prod(table_shape(spec)) + _elements(final_shapes(spec))


def _elements(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes.values())


def _matrices(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes.values() if len(shape) > 1)


def attention_flops(attention: Attention | None, context: int) -> int:
    """Scores and weighted sums of one row that sees `context` positions."""
    match attention:
        case None:
            return 0
        case Gqa():
            seen = context if attention.window is None else min(context, attention.window)
            return 4 * seen * attention.num_heads * attention.head_dim
        case Mla():
            width = 2 * attention.kv_lora_rank + attention.rope.dim
            return 2 * context * attention.num_heads * width
        case GatedDelta():
            # decay, what the key finds, the update along the key, what the query finds
            return 7 * state_numbers(attention)
        case Mamba2():
            return 5 * state_numbers(attention)  # decay, the update, what the query finds
        case ShortConv():
            return 0  # counted with what is done row by row


def state_numbers(attention: Recurrent) -> int:
    """Numbers of a sequence's state that every generated token reads and writes, without those of
    the short convolution."""
    match attention:
        case GatedDelta():
            return attention.num_v_heads * attention.k_head_dim * attention.v_head_dim
        case Mamba2():
            return attention.num_heads * attention.state_dim * attention.head_dim
        case ShortConv():
            return 0

"""Upper bounds of what a pass allocates beside weights and key/value pages. Pure arithmetic.

Mirrors schedule/on_device.py and the kernels; a test compares with measured peaks.
"""

from windlass.kernels.limits import (
    PROBE_BYTES,
    TILE_BYTES,
    UNPACK_BYTES,
    attention_scratch_bytes,
)
from windlass.spec.model import Attention, Ffn, GatedDelta, Gqa, Mla, ModelSpec, Moe
from windlass.units import MIB

_F32 = 4
# malloc rounds, torch keeps small blocks, padded copies of one row block live for a moment
_SLACK = 1.15
# One widened tile and what unpacking into it makes; the rows, moved rows, results and weights of a
# row-count comparison; the rest is what Python and the allocator take while a job runs.
_SCRATCH_BYTES = TILE_BYTES + 8 * UNPACK_BYTES + 4 * PROBE_BYTES + 12 * MIB


def activation_bytes(
    spec: ModelSpec, *, rows: int, micro_rows: int, seqs: int, page_tokens: int
) -> int:
    """Bytes that a pass over `rows` rows allocates at most, with attention over `micro_rows` at a
    time and logits of `seqs` rows."""
    width = spec.hidden_size
    micro = min(rows, micro_rows)
    attention = max(_attention(b.attention, width, micro, page_tokens) for b in spec.blocks)
    network = max(_network(block.ffn, width) for block in spec.blocks)
    hidden = 2 * rows * width
    phases = (attention, rows * network, seqs * (3 * spec.vocab_size + 2 * width))
    return round(_SLACK * _F32 * (hidden + max(phases))) + _SCRATCH_BYTES


def _attention(attention: Attention, width: int, rows: int, page_tokens: int) -> int:
    """fp32 elements that live at the same time in attention over `rows` rows."""
    match attention:
        case Gqa():
            heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
            per_row = 3 * width + (5 + attention.output_gate) * heads * dim + 6 * kv_heads * dim
            scratch = attention_scratch_bytes(heads, kv_heads, (dim, dim), page_tokens)
        case Mla():
            heads = attention.num_heads
            latent = attention.kv_lora_rank + attention.rope.dim
            q = heads * (attention.nope_dim + attention.rope.dim)
            per_row = 3 * width + 2 * q + 4 * heads * latent + 4 * latent
            widths = (latent, attention.kv_lora_rank)
            scratch = attention_scratch_bytes(heads, 1, widths, page_tokens)
        case GatedDelta():
            value = attention.num_v_heads * attention.v_head_dim
            per_row = 3 * width + 5 * attention.conv_dim + 5 * value
            scratch = 0
    return rows * per_row + scratch // _F32


def _network(ffn: Ffn | Moe, width: int) -> int:
    if isinstance(ffn, Ffn):
        return 3 * width + 4 * ffn.intermediate
    # in the worst case one expert gets all rows: its inputs, three hidden tensors, its outputs
    expert = 3 * width + 4 * ffn.expert.intermediate
    shared = 2 * width + 4 * ffn.shared.ffn.intermediate if ffn.shared else 0
    routing = 4 * ffn.num_experts + 8 * ffn.top_k
    return width + routing + max(ffn.top_k * width + expert, shared) + (width if shared else 0)

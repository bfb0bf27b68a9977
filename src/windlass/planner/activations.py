"""Upper bounds of what a pass allocates beside weights and key/value pages. Pure arithmetic.

Mirrors schedule/on_device.py and the kernels; a test compares with measured peaks.
"""

from windlass.spec.model import Attention, Ffn, GatedDelta, Gqa, Mla, ModelSpec, Moe
from windlass.units import MIB

_F32 = 4
# malloc rounds, torch keeps small blocks, padded copies of one row block live for a moment
_SLACK = 1.15
_SCRATCH_BYTES = 40 * MIB  # widened tile, padded row blocks, the row ladder's probes, the allocator
_SCORE_BYTES = 5 * 4 * MIB  # kernels/attention.py: scores, weights, mask, keys, values of a step


def activation_bytes(spec: ModelSpec, *, rows: int, micro_rows: int, seqs: int) -> int:
    """Bytes that a pass over `rows` rows allocates at most, with attention over `micro_rows` at a
    time and logits of `seqs` rows."""
    width = spec.hidden_size
    attention = max(_attention(block.attention, width) for block in spec.blocks)
    network = max(_network(block.ffn, width) for block in spec.blocks)
    hidden = 2 * rows * width
    phases = (
        min(rows, micro_rows) * attention + _SCORE_BYTES // _F32,
        rows * network,
        seqs * (3 * spec.vocab_size + 2 * width),
    )
    return round(_SLACK * _F32 * (hidden + max(phases))) + _SCRATCH_BYTES


def _attention(attention: Attention, width: int) -> int:
    """fp32 elements per row that live at the same time."""
    match attention:
        case Gqa():
            q = attention.num_heads * attention.head_dim
            kv = attention.num_kv_heads * attention.head_dim
            return 3 * width + (5 + attention.output_gate) * q + 6 * kv
        case Mla():
            latent = attention.kv_lora_rank + attention.rope.dim
            q = attention.num_heads * (attention.nope_dim + attention.rope.dim)
            return 3 * width + 2 * q + 4 * attention.num_heads * latent + 4 * latent
        case GatedDelta():
            value = attention.num_v_heads * attention.v_head_dim
            return 3 * width + 5 * attention.conv_dim + 5 * value


def _network(ffn: Ffn | Moe, width: int) -> int:
    if isinstance(ffn, Ffn):
        return 3 * width + 4 * ffn.intermediate
    # in the worst case one expert gets all rows: its inputs, three hidden tensors, its outputs
    expert = 3 * width + 4 * ffn.expert.intermediate
    shared = 2 * width + 4 * ffn.shared.ffn.intermediate if ffn.shared else 0
    routing = 4 * ffn.num_experts + 8 * ffn.top_k
    return width + routing + max(ffn.top_k * width + expert, shared) + (width if shared else 0)

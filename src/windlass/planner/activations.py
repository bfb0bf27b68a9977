"""Upper bounds of what a pass allocates beside weights and the KV cache. Pure arithmetic.

Mirrors runtime/host.py and the kernels; a test compares with measured peaks.
"""

from windlass.kernels.limits import (
    GRAPH_BYTES,
    MOST_GRAPHED,
    NATIVE_INNER,
    NATIVE_ROUND_FLOATS,
    NATIVE_ROWS,
    PROBE_BYTES,
    TILE_BYTES,
    UNPACK_BYTES,
    attention_scratch_bytes,
    native_thread_bytes,
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
from windlass.perf.sizes import Backend
from windlass.schedule.batch import CHUNK_TOKENS, MOST_CAPTURED
from windlass.units import MIB

_F32 = 4
# malloc rounds, torch keeps small blocks, padded copies of one row block live for a moment
_SLACK = 1.15
_PROCESS_BYTES = 12 * MIB  # what Python and the allocator take while a job runs
# One widened tile and what unpacking into it makes; the rows, moved rows, results and weights of a
# row-count comparison.
_TORCH_BYTES = TILE_BYTES + 8 * UNPACK_BYTES + 4 * PROBE_BYTES
# Of a device: torch's allocator rounds up and keeps blocks of each size; the BLAS its workspace
_DEVICE_SLACK = 1.25
_WORKSPACE_BYTES = 96 * MIB
STAGING_BYTES = 256 * MIB  # that rows on their way may take, if two micro-batches do not take more
_SPLIT, _LATENT_SPLIT = 256, 1024  # positions of a split (kernels/triton/decode.py)
_NATIVE_GROUPS = 1024  # of k with scales of their own, in a matrix with activation order


def activation_bytes(
    spec: ModelSpec, backend: Backend, *, rows: int, micro_rows: int, seqs: int, page_tokens: int
) -> int:
    """Bytes that a pass over `rows` rows allocates at most, with attention over `micro_rows` at a
    time and logits of `seqs` rows, of sequences or guesses."""
    width = spec.hidden_size
    micro = min(rows, micro_rows)
    is_native = backend.name == "cpu"
    of_attention = _native_attention if is_native else _attention
    of_network = _native_network if is_native else _network
    attention = max(
        of_attention(block.attention, width, micro, page_tokens)
        + micro * width * _more_norms(block)[0]
        for block in spec.blocks
        if block.attention is not None
    )
    network = max(
        of_network(block.ffn, width) + width * _more_norms(block)[1] for block in spec.blocks
    )
    # the outputs of experts wait by place, in memory that all layers share
    kept = (2 + max(_top_k(block.ffn) for block in spec.blocks)) * rows * width
    phases = [attention, rows * network, seqs * (3 * spec.vocab_size + 2 * width)]
    if spec.drafts:
        kept += rows * width  # states of a pass, which stay until the block that drafts has run
        phases.append(4 * rows * width)  # embedded rows, both norms, what joins them
    scratch = _TORCH_BYTES
    if is_native:
        scratch = _native_scratch_bytes(spec, backend.threads, rows)
        scratch += _captured_bytes(spec, min(seqs, MOST_CAPTURED), page_tokens)
    return round(_SLACK * _F32 * (kept + max(phases))) + scratch + _PROCESS_BYTES


def device_activation_bytes(
    spec: ModelSpec, *, rows: int, micro_rows: int, seqs: int, context: int
) -> int:
    """The same of a pass on a device (kernels/triton/): hidden states and expert outputs by place
    in fp32; rows that are multiplied, in 16 bits; partial sums of attention over splits of
    `context` positions; and what libraries keep for themselves."""
    width, micro = spec.hidden_size, min(rows, micro_rows)
    attention = max(
        micro * _native_attention(one, width, 1, 0)
        + min(micro, seqs) * _split_numbers(one, context)
        for one in _attentions(spec)
    )
    network = max(_device_network(block.ffn, width) for block in spec.blocks)
    kept = (2 + max(_top_k(block.ffn) for block in spec.blocks)) * rows * width
    phases = max(attention, rows * network, seqs * (2 * spec.vocab_size + 2 * width))
    numbers = kept + phases + _graph_numbers(spec, min(seqs, MOST_CAPTURED), context)
    graphs = 3 * len(spec.blocks) * min(seqs, MOST_CAPTURED, MOST_GRAPHED) * GRAPH_BYTES
    return round(_DEVICE_SLACK * _F32 * numbers) + graphs + _WORKSPACE_BYTES


def _graph_numbers(spec: ModelSpec, most: int, context: int) -> int:
    """What graphs of passes of up to `most` rows keep for good (kernels/cuda_graphs.py): what each
    layer tells its experts, for each number of rows, with their outputs; and what all share within
    a layer. Attention has room for twice the positions that there are."""
    width = spec.hidden_size
    rows = sum(range(most, max(0, most - MOST_GRAPHED), -1))
    told = sum(
        (3 + (block.ffn.shared is not None)) * width + 2 * _routing(block.ffn)
        for block in spec.blocks
        if isinstance(block.ffn, Moe)
    )
    outputs = max(_top_k(block.ffn) for block in spec.blocks) * width
    attention = max(
        _native_attention(one, width, 1, 0) + _split_numbers(one, 2 * context)
        for one in _attentions(spec)
    )
    network = max(_device_network(block.ffn, width) for block in spec.blocks)
    return rows * (told + outputs + width) + most * (attention + network)


def _device_network(ffn: Ffn | Moe | None, width: int) -> int:
    """For each row: its norm, routing, and hidden rows of all its experts, which one call has."""
    if ffn is None:
        return 0
    if isinstance(ffn, Ffn):
        return 2 * width + 2 * ffn.intermediate
    inner = ffn.top_k * ffn.expert.intermediate
    shared = width + 2 * ffn.shared.ffn.intermediate if ffn.shared else 0
    return 2 * width + _routing(ffn) + inner + shared


def _split_numbers(attention: Attention, context: int) -> int:
    """Of one row of decode attention: sums of each split of the positions that it sees."""
    match attention:
        case Gqa():
            heads, dim, split = attention.num_heads, attention.head_dim, _SPLIT
            context = min(context, attention.window or context)
        case Mla():
            heads, dim, split = attention.num_heads, attention.kv_lora_rank, _LATENT_SPLIT
        case _:
            return 0
    return -(-context // split) * heads * (dim + 2)


def host_side_bytes(
    spec: ModelSpec, *, threads: int, micro_rows: int, seqs: int, attends: bool,
    has_experts: bool = False,
) -> int:  # fmt: skip
    """What the host holds of a pass on a device: logits of rows that it draws from, and, where it
    `attends` or `has_experts`, rows on their way (runtime/host_attention.py, host_experts.py),
    results and the kernels' scratch."""
    numbers = seqs * (spec.vocab_size + 2 * spec.hidden_size)
    scratch = 0
    if attends:
        each = max(_exchanged(one) for one in _attentions(spec))
        numbers += micro_rows * each
        scratch = _native_scratch_bytes(spec, threads, micro_rows)
        scratch += max(STAGING_BYTES, 2 * _F32 * micro_rows * each)
    if has_experts:
        scratch += _native_scratch_bytes(spec, threads, _staged_rows(seqs))
        scratch += host_expert_bytes(spec, seqs)
    return round(_SLACK * _F32 * numbers) + scratch + _PROCESS_BYTES


def host_expert_bytes(spec: ModelSpec, seqs: int) -> int:
    """What rows on their way to the host's experts take (runtime/host_experts.py), on either side:
    they, and what comes back for each of their places."""
    most = max(_top_k(block.ffn) for block in spec.blocks)
    return _F32 * _staged_rows(seqs) * (1 + most) * spec.hidden_size


def _staged_rows(seqs: int) -> int:
    return max(MOST_CAPTURED, 2 * seqs)


def _exchanged(attention: Attention) -> int:
    """Numbers of a row that cross the link for host attention, both ways."""
    match attention:
        case Gqa():
            return 2 * (attention.num_heads + attention.num_kv_heads) * attention.head_dim
        case Mla():
            latent = attention.kv_lora_rank + attention.rope.dim
            return attention.num_heads * (latent + attention.kv_lora_rank) + latent
        case _:
            return 0


def gathered_bytes(spec: ModelSpec, rows: int) -> int:
    """What a pass over `rows` rows in several groups keeps besides: what they have routed, put
    together for whoever learns from it (runtime/routed_groups.py)."""
    routing = max((_routing(b.ffn) for b in spec.blocks if isinstance(b.ffn, Moe)), default=0)
    return round(_SLACK * _F32 * rows * (2 * spec.hidden_size + routing))


def _more_norms(block: Block) -> tuple[int, int]:
    """Rows of hidden size that live at the same time, in attention and in the network, because of
    norms that most models do not have."""
    moe = block.ffn if isinstance(block.ffn, Moe) else None
    own = moe is not None and moe.shared is not None and moe.shared.own_norms
    router = moe is not None and moe.router_norm is not None
    return 2 * block.output_norms, router + 3 * own + 2 * block.output_norms


def _attentions(spec: ModelSpec) -> set[Attention]:
    return {block.attention for block in spec.blocks if block.attention is not None}


def _top_k(ffn: Ffn | Moe | None) -> int:
    return ffn.top_k if isinstance(ffn, Moe) else 0


# --- torch: fp32 elements that live at the same time ----------------------------------------------


def _attention(attention: Attention, width: int, rows: int, page_tokens: int) -> int:
    """In attention over `rows` rows."""
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
        case GatedDelta() | ShortConv() | Mamba2():
            return _recurrent(attention, width, rows)
    return rows * per_row + scratch // _F32


def _recurrent(attention: Recurrent, width: int, rows: int) -> int:
    if isinstance(attention, ShortConv):
        return 10 * rows * width  # read, projected (3), gated, window, sums (3), output
    if isinstance(attention, Mamba2):
        heads, key, value = attention.num_heads, attention.state_dim, attention.head_dim
    else:
        heads, key, value = attention.num_v_heads, attention.k_head_dim, attention.v_head_dim
    chunk = heads * CHUNK_TOKENS * (4 * CHUNK_TOKENS + 4 * key + 5 * value)
    return rows * (3 * width + 5 * attention.conv_dim + 5 * heads * value) + chunk


def _network(ffn: Ffn | Moe | None, width: int) -> int:
    """For each row of a feed-forward network, without the outputs of experts."""
    if ffn is None:
        return 0
    if isinstance(ffn, Ffn):
        return 3 * width + 4 * ffn.intermediate
    # in the worst case one expert gets all rows: its inputs, three hidden tensors, its outputs
    expert = 3 * width + 4 * ffn.expert.intermediate
    shared = 2 * width + 4 * ffn.shared.ffn.intermediate if ffn.shared else 0
    return width + _routing(ffn) + max(expert, shared) + (width if shared else 0)


def _routing(moe: Moe) -> int:
    return 4 * moe.num_experts + 8 * moe.top_k


# --- native: nothing is gathered or widened outside the library's own memory ----------------------


def _native_attention(attention: Attention, width: int, rows: int, page_tokens: int) -> int:
    match attention:
        case Gqa():
            query = attention.num_heads * attention.head_dim
            key = attention.num_kv_heads * attention.head_dim
            per_row = 2 * width + (3 + 3 * attention.output_gate) * query + 4 * key
        case Mla():
            heads, latent = attention.num_heads, attention.kv_lora_rank + attention.rope.dim
            query = heads * (attention.nope_dim + attention.rope.dim)
            per_row = 3 * width + 2 * query + 2 * heads * latent + 4 * latent
        case GatedDelta() | ShortConv() | Mamba2():
            return _recurrent(attention, width, rows)
    return rows * per_row


def _native_network(ffn: Ffn | Moe | None, width: int) -> int:
    if ffn is None:
        return 0
    if isinstance(ffn, Ffn):
        return 3 * width
    shared = 2 * width if ffn.shared else 0
    return width + _routing(ffn) + shared


def _captured_bytes(spec: ModelSpec, rows: int, page_tokens: int) -> int:
    """What captured layers keep for good (runtime/capture.py): the results of a layer, and hidden
    states of passes of 1 to `rows` rows."""
    width = spec.hidden_size
    results = max(
        (_native_attention(block.attention, width, rows, page_tokens) if block.attention else 0)
        + rows * _native_network(block.ffn, width)
        + rows * width * (_top_k(block.ffn) + sum(_more_norms(block)))
        for block in spec.blocks
    )
    return _F32 * (results + width * rows * (rows + 1) // 2)


def _native_scratch_bytes(spec: ModelSpec, threads: int, rows: int) -> int:
    """What the library keeps between calls: packed rows of products, packed and hidden rows of
    experts, and each thread's own."""
    packed = min(rows, NATIVE_ROWS)
    # the last block of a packed row may have gaps
    widest = max(spec.hidden_size, *(_widest_input(one) for one in _attentions(spec)))
    widest += NATIVE_INNER
    network = spec.hidden_size + max(_intermediate(block.ffn) for block in spec.blocks)
    network += 2 * NATIVE_INNER
    products = max(NATIVE_ROUND_FLOATS, packed * widest)
    experts = NATIVE_ROUND_FLOATS + packed * network
    own = max(_native_thread_bytes(one) for one in _attentions(spec))
    return _F32 * (products + experts) + threads * own


def _widest_input(attention: Attention) -> int:
    match attention:
        case Gqa():
            return attention.num_heads * attention.head_dim
        case Mla():
            return max(attention.num_heads * attention.v_head_dim, attention.q_lora_rank or 0)
        case GatedDelta():
            return attention.num_v_heads * attention.v_head_dim
        case Mamba2():
            return attention.inner
        case ShortConv():
            return 0  # as wide as the model


def _intermediate(ffn: Ffn | Moe | None) -> int:
    if ffn is None:
        return 0
    if isinstance(ffn, Ffn):
        return ffn.intermediate
    return max(ffn.expert.intermediate, ffn.shared.ffn.intermediate if ffn.shared else 0)


def _native_thread_bytes(attention: Attention) -> int:
    widths = (0, 0)
    if isinstance(attention, Gqa):
        widths = (attention.head_dim, attention.head_dim)
    if isinstance(attention, Mla):
        widths = (attention.kv_lora_rank + attention.rope.dim, attention.kv_lora_rank)
    return native_thread_bytes(*widths, groups=_NATIVE_GROUPS)

"""Time of a layer on a machine whose device computes beside its host: weights and KV cache cross a
link, some attention stays on the host. Closed forms that join MoE-Gen (arXiv 2503.09716) and
MoE-Lightning (arXiv 2411.11217). Pure arithmetic; bytes, FLOP, seconds, per layer. Frozen: nothing
is added here, and it goes the day the device has costs on the clock.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from windlass.perf.flops import active_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Bytes of one layer's parts, and what a token costs in it."""

    attention: float  # bytes of attention's weights
    shared: float  # of the shared expert or the dense network
    expert: float  # of one expert
    num_experts: int
    top_k: int
    kv: float  # bytes of one position of one sequence
    query: float  # bytes of one token's queries, and of attention's result
    hidden: float  # bytes of one token's hidden state
    attention_flops: float  # of a token in attention's matrices
    shared_flops: float
    expert_flops: float  # of a token in one expert
    score_flops: float  # of one token and one position that it sees

    @property
    def all_weights(self) -> float:
        return self.attention + self.shared + self.num_experts * self.expert


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRates:
    """Of a machine; a curve is over rows of one expert, or of a pass."""

    down: float  # bytes/s from host to device
    up: float
    disk: float
    device_memory: float
    host_memory: float
    host_attention: float  # bytes/s of keys and values
    expert: Callable[[float], float]  # FLOP/s
    dense: Callable[[float], float]
    attention: float  # FLOP/s of scores on the device
    call_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What is where, and how rows go together.

    `sequences` decode a row each, `prefill` prompt rows go with them. `host_attention`: share of
    the sequences whose attention the host computes (MoE-Gen's omega); `resident`: share of the
    weights that stay on the device, `on_disk`: that come from disk in every pass; `kv_on_device`.
    `groups`: 1 is MoE-Gen's order, where experts wait for attention; with more, attention of one
    group runs beside the experts of another (CGOPipe). `micro`: sequences per call of attention.
    """

    sequences: float
    prefill: float = 0.0
    context: float  # mean positions that a decode row sees
    prompt_context: float = 0.0  # the same of a prompt row
    host_attention: float = 0.0
    resident: float = 0.0
    on_disk: float = 0.0
    kv_on_device: float = 0.0
    groups: int = 1
    micro: float = 256.0
    parks_hidden: bool = False  # hidden states of idle micro-batches live on the host
    expert_slots: float = inf  # of experts that do not stay on the device

    @property
    def rows(self) -> float:
        return self.sequences + self.prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuWork:
    """Seconds of each resource in one layer."""

    down: float
    up: float
    disk: float
    host_attention: float
    host_memory: float
    attention: float  # on the device, projections included
    experts: float
    reread: float  # of the experts from device memory, for each further group

    def total(self, groups: int) -> float:
        """Seconds of the layer, every lane working beside the others as far as data allow."""
        links = max(self.down, self.up, self.disk, self.host_memory)
        if groups == 1:
            return max(links, max(self.host_attention, self.attention) + self.experts)
        device = self.attention + self.experts + (groups - 1) * self.reread
        return max(links, self.host_attention, device)


def work(shape: LayerShape, rates: GpuRates, share: Share) -> GpuWork:
    """What a pass asks of each resource in one layer."""
    active = active_experts(shape.num_experts, shape.top_k, share.rows)
    needed = shape.attention + shape.shared + active * shape.expert
    cached = share.sequences * share.context * shape.kv
    exchanged = share.host_attention * share.sequences * shape.query
    parked = share.rows * shape.hidden if share.parks_hidden else 0.0
    moved = (1 - share.host_attention) * (1 - share.kv_on_device) * cached
    down = (1 - share.resident) * needed + moved + exchanged + parked
    up = share.rows * shape.kv + exchanged + parked
    from_disk = share.on_disk * needed
    host = share.host_attention * cached
    scores = (1 - share.host_attention) * share.sequences * share.context
    prompt = share.prefill * share.prompt_context * shape.score_flops
    each = share.rows * shape.top_k / active
    return GpuWork(
        down=down / rates.down,
        up=up / rates.up,
        disk=from_disk / rates.disk,
        host_attention=host / rates.host_attention,
        host_memory=(host + down + up + from_disk) / rates.host_memory,
        attention=-(-share.sequences // share.micro) * rates.call_s
        + max(
            share.rows * shape.attention_flops / rates.dense(share.rows),
            shape.attention / rates.device_memory,
        )
        + max(scores * shape.score_flops / rates.attention, scores * shape.kv / rates.device_memory)
        + prompt / rates.attention,
        experts=rates.call_s
        + max(
            share.rows * shape.top_k * shape.expert_flops / rates.expert(each),
            active * shape.expert / rates.device_memory,
        )
        + share.rows * shape.shared_flops / rates.dense(share.rows),
        reread=active * shape.expert / rates.device_memory,
    )


def layer_seconds(shape: LayerShape, rates: GpuRates, share: Share) -> float:
    """Seconds of one layer. The link idles during attention when all slots are full."""
    found = work(shape, rates, share)
    ahead = share.expert_slots * shape.expert / rates.down if rates.down < inf else inf
    stage = max(found.host_attention, found.attention)
    return max(found.total(share.groups), stage + max(0.0, found.down - ahead))


def balanced_host_share(shape: LayerShape, rates: GpuRates, share: Share) -> float:
    """The share of attention for the host at which link and host are level: a starting
    point, to be compared with others by `layer_seconds`."""
    cached = share.sequences * share.context * shape.kv
    if not cached:
        return 0.0
    weights = (1 - share.resident) * shape.all_weights
    ratio = 1 + rates.down / rates.host_attention
    behind = 0.0
    if share.groups == 1:
        behind = rates.down * work(shape, rates, replace(share, host_attention=0.0)).experts
    return min(1.0, max(0.0, (weights + cached - behind) / (cached * ratio)))

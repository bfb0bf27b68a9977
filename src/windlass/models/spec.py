"""Declarative description of a MoE decoder: frozen records, no torch, no checkpoint, no device.

Variants that exclude each other are different types (tagged unions), so that a field always means
something for the type that has it.
"""

from dataclasses import dataclass, replace
from typing import Literal

# --- positions ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NoScaling:
    """Plain rotary frequencies."""


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): interpolation by frequency, cos and sin times `attention_factor`."""

    factor: float
    original_max: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's smooth interpolation of low frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): one divisor per frequency, `long` beyond `original_max`."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max: int
    short_attention_factor: float
    long_attention_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProportionalScaling:
    """Gemma 4: only the first `pairs` of all pairs turn, each as if all did, by angles divided by
    `factor`."""

    pairs: int
    factor: float = 1.0


Scaling = (
    NoScaling | LinearScaling | YarnScaling | Llama3Scaling | LongRopeScaling | ProportionalScaling
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions on the first `dim` of the head's dimensions. `interleaved`: pairs (2i, 2i+1)
    instead of (i, i + dim/2)."""

    dim: int
    theta: float
    scaling: Scaling = NoScaling()
    interleaved: bool = False


# --- normalisation --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNorm:
    """x / rms(x) * w, or * (1 + w) where `plus_one`."""

    eps: float
    plus_one: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorm:
    """Mean and variance; with or without a bias."""

    eps: float
    bias: bool


Norm = RmsNorm | LayerNorm

# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Gqa:
    """Grouped-query softmax attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"  # per head, or over all heads at once
    clip_qkv: float | None = None
    sinks: bool = False  # one learned logit per head joins the softmax's denominator
    window: int | None = None  # a query sees itself and window - 1 positions before it
    output_gate: bool = False  # output times sigmoid of a second half of the query projection
    value_from_key: bool = False  # values are what keys are before their norm and rotation
    value_norm: bool = False  # each head's, without a weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2): the cache holds the latent and one rotary key."""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    v_head_dim: int
    rope: Rope
    scale: float
    latent_norm_eps: float
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDelta:
    """Gated delta rule (Qwen3-Next): a recurrent state per value head, no growing cache."""

    num_k_heads: int
    num_v_heads: int
    k_head_dim: int
    v_head_dim: int
    conv_kernel: int
    norm_eps: float

    @property
    def conv_dim(self) -> int:
        """Channels of the short convolution: queries, keys, values."""
        return 2 * self.num_k_heads * self.k_head_dim + self.num_v_heads * self.v_head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortConv:
    """Gated short convolution (LFM2): the state is the convolution's last inputs, one number for
    each hidden dimension and tap but one."""

    conv_kernel: int
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2:
    """Mamba-2: a recurrent state per head, keys and queries shared by groups of heads."""

    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int
    conv_kernel: int
    norm_eps: float  # of the gated norm, over the channels of a group
    conv_bias: bool = False

    @property
    def inner(self) -> int:
        """Width of values, and of the gate."""
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the short convolution: values, keys, queries."""
        return self.inner + 2 * self.num_groups * self.state_dim


Recurrent = GatedDelta | ShortConv | Mamba2  # a state instead of keys and values
Attention = Gqa | Mla | Recurrent

# --- feed-forward ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SwiGlu:
    """silu(gate) * up."""


@dataclass(frozen=True, slots=True)
class ClampedSwiGlu:
    """GPT-OSS: gate at most `limit`, up within +-`limit`, (up + 1) * gate * sigmoid(alpha gate)."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True)
class GeGlu:
    """gelu(gate) * up, with gelu in its tanh form."""


@dataclass(frozen=True, slots=True)
class ReluSquared:
    """relu(up) squared, without a gate (Nemotron-H)."""


Activation = SwiGlu | ClampedSwiGlu | GeGlu | ReluSquared


@dataclass(frozen=True, slots=True, kw_only=True)
class Ffn:
    """Feed-forward network: gate, up, down; without a gate where the activation has none."""

    intermediate: int
    activation: Activation = SwiGlu()
    bias: bool = False

    @property
    def matrices(self) -> tuple[str, ...]:
        """Their canonical names."""
        is_gated = not isinstance(self.activation, ReluSquared)
        return ("gate", "up", "down") if is_gated else ("up", "down")


@dataclass(frozen=True, slots=True)
class NoGroups:
    """Experts are chosen among all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingGroups:
    """Only experts of the `kept` best of `num` groups are eligible (DeepSeek)."""

    num: int
    kept: int
    score: Literal["max", "top2_sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxTopK:
    """Softmax over all experts, then the best k. `renorm_floor` is None where the kept scores are
    used as they are; else they are divided by max(their norm, renorm_floor), the norm of order 1
    being their sum."""

    renorm_floor: float | None
    renorm_order: Literal[1, 2] = 1
    groups: NoGroups | RoutingGroups = NoGroups()
    select_bias: bool = False  # added to the scores for the choice only
    scale: float = 1.0
    expert_scale: bool = False  # in the end the weight of each expert is times its own number


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKSoftmax:
    """The best k logits, then softmax over them."""

    router_bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmoidTopK:
    """Sigmoid per expert, best k of score + bias (DeepSeek-V3). `renorm_eps` is None where the kept
    scores are used as they are; else they are divided by their sum + renorm_eps."""

    renorm_eps: float | None
    groups: NoGroups | RoutingGroups = NoGroups()
    select_bias: bool = True
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseMixer:
    """Phi-MoE: two choices, each a softmax over the logits within 2 * jitter_eps of the best."""

    jitter_eps: float


Routing = SoftmaxTopK | TopKSoftmax | SigmoidTopK | SparseMixer


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """An expert that every token uses. `gated`: times sigmoid of a learned linear of the token.
    `own_norms`: it has a norm before and one after it, and so have the routed experts."""

    ffn: Ffn
    gated: bool = False
    own_norms: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """Routed experts, with or without a shared one. `router_norm` is None where the router reads
    what the experts read; else it has a norm of its own, whose result is times that number."""

    num_experts: int
    top_k: int
    routing: Routing
    expert: Ffn
    shared: Shared | None = None
    router_norm: float | None = None


# --- the model ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """norm, attention, residual, norm, feed-forward, residual; or only one half of it.
    `output_norms`: what attention and feed-forward give is normalised before it is added.
    `output_scale`: in the end the hidden states are times a learned number. `drafts`: it is no part
    of the model, but guesses the token after the next: what enters it is made of the model's last
    state of a token and the embedding of the token behind it."""

    attention: Attention | None
    ffn: Ffn | Moe | None
    output_norms: bool = False
    output_scale: bool = False
    drafts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder. Multipliers are 1 where a family has none. `embed_multiplier_as_stored`: it is
    rounded to the type of the embedding table. `logit_cap`: logits become cap * tanh(logit / cap).
    `limited_by`: what `max_positions` is, in words, where it is less than the file says."""

    family: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    blocks: tuple[Block, ...]
    norm: Norm
    tied_head: bool = False
    head_bias: bool = False
    embed_multiplier: float = 1.0
    embed_multiplier_as_stored: bool = False
    residual_multiplier: float = 1.0
    logit_divisor: float = 1.0
    logit_cap: float | None = None
    limited_by: str = ""

    @property
    def drafts(self) -> bool:
        """Whether the last block is one that drafts."""
        return self.blocks[-1].drafts

    @property
    def trunk(self) -> "ModelSpec":
        """Without that one."""
        return replace(self, blocks=self.blocks[:-1]) if self.drafts else self

    def limits(self) -> tuple[str, ...]:
        """What a user must know beforehand, in lines."""
        if not self.limited_by:
            return ()
        return (f"{self.family}: at most {self.max_positions} tokens, {self.limited_by}",)

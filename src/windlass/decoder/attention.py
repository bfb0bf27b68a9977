"""Softmax attention of one block around the kernel: projections before it, output after it.

Pure functions over (description, weights). Weights come by canonical name, in their stored type and
possibly as strided views; activations are fp32. A row's bits never depend on other rows: matrix
products and transcendental functions go through the kernels, everything else is elementwise or a
sum over a row.

Shapes: T rows, D hidden, H query heads, K key/value heads, d head dim, v value dim, r rotary pairs,
c latent.
"""

from dataclasses import dataclass

import torch

from windlass.kernels.interface import Kernels
from windlass.models.spec import Attention, GatedDelta, Gqa, Mamba2, Mla, Norm, RmsNorm, ShortConv
from windlass.tensors import Packed, PackedStack, Tensors, plain

CosSin = tuple[torch.Tensor, torch.Tensor]  # of each row, (T, r)


@dataclass(frozen=True, slots=True)
class Projected:
    """What attention needs of each row. For latent attention `value_TKv` is a view of the key:
    its first dimensions are the latent, and a cache need only hold the key."""

    q_THd: torch.Tensor
    key_TKd: torch.Tensor
    value_TKv: torch.Tensor
    gate_THv: torch.Tensor | None  # before the sigmoid


def kv_shape(attention: Attention) -> tuple[int, int, int] | None:
    """(key/value heads, key dim, value dim) of one cached position; value dim is 0 where values are
    a view of the keys. None for attention whose state does not grow."""
    match attention:
        case Gqa():
            return attention.num_kv_heads, attention.head_dim, attention.head_dim
        case Mla():
            return 1, attention.kv_lora_rank + attention.rope.dim, 0
        case GatedDelta() | ShortConv() | Mamba2():
            return None


def value_width(attention: Gqa | Mla) -> int:
    """Dimensions of a value that the attention kernel reads and of each head it returns."""
    return attention.head_dim if isinstance(attention, Gqa) else attention.kv_lora_rank


def project(
    k: Kernels,
    attention: Gqa | Mla,
    norm: Norm,
    w: Tensors,
    h_TD: torch.Tensor,
    cos_sin: CosSin | None,
) -> Projected:
    """Queries, keys, values (and gate) of normalised rows, rotated to their positions.

    `norm` is the model's: norms of queries and keys are of the same kind. `cos_sin` is None for
    attention without positions.
    """
    if isinstance(attention, Mla):
        assert cos_sin is not None, "latent attention has positions"
        return _project_latent(k, attention, w, h_TD, cos_sin)
    return _project_heads(k, attention, norm, w, h_TD, cos_sin)


def attention_output(
    k: Kernels,
    attention: Gqa | Mla,
    w: Tensors,
    o_THv: torch.Tensor,
    gate_THv: torch.Tensor | None,
) -> torch.Tensor:
    """Output projection of what the attention kernel returned (gated in place) -> (T, D)."""
    if isinstance(attention, Mla):
        o_THv = k.batched_linear(o_THv, _heads(w, "v_up.weight"))
    if gate_THv is not None:
        k.gate(o_THv, gate_THv)
    return linear(k, w, "o_proj", o_THv.flatten(1))


def linear(k: Kernels, w: Tensors, name: str, x_TD: torch.Tensor) -> torch.Tensor:
    """`name`'s weight, and its bias where the part has one."""
    return k.linears(x_TD, w, (name,))[0]


def _project_heads(
    k: Kernels,
    attention: Gqa,
    norm: Norm,
    w: Tensors,
    h_TD: torch.Tensor,
    cos_sin: CosSin | None,
) -> Projected:
    names = ["q_proj", "k_proj"]
    names += [] if attention.value_from_key else ["v_proj"]
    names += ["gate_proj"] if attention.output_gate else []
    q, key, *others = k.linears(h_TD, w, tuple(names))
    value = key if attention.value_from_key else others.pop(0)
    if attention.qk_norm == "full":
        q = k.normalise(norm, plain(w, "q_norm.weight"), None, q)
        key = k.normalise(norm, plain(w, "k_norm.weight"), None, key)
    if attention.clip_qkv is not None:
        limit = attention.clip_qkv
        q, key, value = (x.clamp(-limit, limit) for x in (q, key, value))
    q_heads = (h_TD.shape[0], attention.num_heads, attention.head_dim)
    kv_heads = (h_TD.shape[0], attention.num_kv_heads, attention.head_dim)
    q_THd, key_TKd, value_TKd = q.view(q_heads), key.view(kv_heads), value.view(kv_heads)
    if attention.value_norm:
        value_TKd = k.normalise(norm, None, None, value_TKd)
    elif attention.value_from_key:
        value_TKd = k.join((value_TKd,))  # keys are rotated in place
    if attention.qk_norm == "head":
        q_THd = k.normalise(norm, plain(w, "q_norm.weight"), None, q_THd)
        key_TKd = k.normalise(norm, plain(w, "k_norm.weight"), None, key_TKd)
    if attention.rope is not None:
        assert cos_sin is not None, "rotary attention needs cos and sin"
        k.rotate(q_THd, *cos_sin, attention.rope)
        k.rotate(key_TKd, *cos_sin, attention.rope)
    return Projected(q_THd, key_TKd, value_TKd, others[0].view(q_heads) if others else None)


def _project_latent(
    k: Kernels, attention: Mla, w: Tensors, h_TD: torch.Tensor, cos_sin: CosSin
) -> Projected:
    # Absorbed form: instead of expanding each cached latent to keys, the query is taken into the
    # space of latents, so that all heads read one cached row.
    latent_norm = RmsNorm(eps=attention.latent_norm_eps)
    if attention.q_lora_rank is None:
        q = linear(k, w, "q_proj", h_TD)
    else:
        low = linear(k, w, "q_a_proj", h_TD)
        low = k.normalise(latent_norm, plain(w, "q_a_norm.weight"), None, low)
        q = linear(k, w, "q_b_proj", low)
    q_nope, q_rot = torch.split(
        q.view(len(h_TD), attention.num_heads, attention.nope_dim + attention.rope.dim),
        [attention.nope_dim, attention.rope.dim],
        dim=-1,
    )
    q_THc = k.batched_linear(q_nope, _heads(w, "k_up.weight").transpose(1, 2))
    k.rotate(q_rot, *cos_sin, attention.rope)
    latent, key_rot = torch.split(
        linear(k, w, "kv_a_proj", h_TD), [attention.kv_lora_rank, attention.rope.dim], dim=-1
    )
    latent = k.normalise(latent_norm, plain(w, "kv_a_norm.weight"), None, latent)
    k.rotate(key_rot[:, None], *cos_sin, attention.rope)
    key = k.join((latent[:, None], key_rot[:, None]))
    value = key[..., : attention.kv_lora_rank]
    return Projected(k.join((q_THc, q_rot)), key, value, None)


def _heads(w: Tensors, name: str) -> torch.Tensor | PackedStack:
    matrices = w[name]
    assert not isinstance(matrices, Packed), f"{name}: a matrix for each head"
    return matrices

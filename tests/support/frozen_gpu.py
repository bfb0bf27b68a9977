"""Devices and models for the closed forms of layers on a device beside its host."""

import math

from windlass.perf.frozen_gpu_tiers import GpuRates, LayerShape


def _shape(width, inner, num, top_k, heads, kv, weight=2):
    """Attention with `heads` columns of queries and `kv` of keys and of values, all in bf16."""
    matrices = 2 * width * heads + 2 * width * kv
    return LayerShape(
        attention=matrices * weight, shared=0, expert=3 * width * inner * weight, num_experts=num,
        top_k=top_k, kv=2 * kv * 2, query=0, hidden=0, attention_flops=2 * matrices,
        shared_flops=0, expert_flops=6 * width * inner, score_flops=4 * heads,
    )  # fmt: skip


def _rates(link, flops, memory, host):
    return GpuRates(
        down=link, up=math.inf, disk=math.inf, device_memory=memory, host_memory=math.inf,
        host_attention=host, expert=lambda rows: flops, dense=lambda rows: flops, attention=flops,
    )  # fmt: skip


A5000 = _rates(26e9, 70e12, 600e9, 25e9)


H200 = _rates(50e9, 300e12, 4e12, 40e9)


MIXTRAL, MIXTRAL_INT8 = (_shape(4096, 14336, 8, 2, 4096, 1024, w) for w in (2, 1))


QWEN = _shape(2048, 768, 128, 8, 4096, 512)

"""Projections around the attention kernel: independence of rows, widths of the cache."""

from dataclasses import replace

import pytest
import torch

from windlass.decoder.attention import attention_output, kv_shape, project, value_width
from windlass.decoder.rope import RopeTable
from windlass.device.host_memory import HostAllocator
from windlass.kernels.reference import TorchKernels
from windlass.models.shapes import attention_shapes
from windlass.models.spec import GatedDelta, Gqa, Mla, RmsNorm, Rope

HIDDEN = 44
KERNELS = TorchKernels()
NORM = RmsNorm(eps=1e-6)
GQA = Gqa(
    num_heads=6, num_kv_heads=2, head_dim=14, rope=Rope(dim=10, theta=1e4), scale=0.3,
    qkv_bias=True, out_bias=True, qk_norm="head", clip_qkv=1.0, output_gate=True,
)  # fmt: skip
MLA = Mla(
    num_heads=3, q_lora_rank=21, kv_lora_rank=19, nope_dim=9, v_head_dim=11,
    rope=Rope(dim=6, theta=1e4, interleaved=True), scale=0.3, latent_norm_eps=1e-6, bias=True,
)  # fmt: skip
CASES: dict[str, Gqa | Mla] = {
    "heads": GQA,
    "full norm": replace(GQA, qk_norm="full", output_gate=False),
    "no positions": replace(GQA, rope=None),
    "latent": MLA,
    "latent, full query": replace(MLA, q_lora_rank=None),
}


def weights(attention: Gqa | Mla) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) / 4).to(torch.bfloat16)
        for name, shape in attention_shapes(attention, HIDDEN).items()
    }


@pytest.mark.parametrize("name", CASES)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    attention, w = CASES[name], weights(CASES[name])
    generator = torch.Generator().manual_seed(1)
    h_TD = torch.randn(67, HIDDEN, generator=generator)
    cos_sin = None
    if attention.rope is not None:
        cos_sin = RopeTable(attention.rope, HostAllocator()).cos_sin(torch.arange(5, 72))
    whole = project(KERNELS, attention, NORM, w, h_TD, cos_sin)
    o_THv = torch.randn(67, attention.num_heads, value_width(attention), generator=generator)
    output = attention_output(KERNELS, attention, w, o_THv.clone(), whole.gate_THv)
    assert output.shape == (67, HIDDEN)
    for first, last in ((0, 1), (5, 6), (3, 20), (66, 67), (1, 67)):
        part = slice(first, last)
        tables = None if cos_sin is None else (cos_sin[0][part], cos_sin[1][part])
        got = project(KERNELS, attention, NORM, w, h_TD[part].clone(), tables)
        for field in ("q_THd", "key_TKd", "value_TKv", "gate_THv"):
            one, all_rows = getattr(got, field), getattr(whole, field)
            assert (one is None) == (all_rows is None)
            assert one is None or torch.equal(one, all_rows[part]), field
        again = attention_output(KERNELS, attention, w, o_THv[part].clone(), got.gate_THv)
        assert torch.equal(again, output[part])


@pytest.mark.parametrize("name", CASES)
def test_widths_of_the_cache(name: str) -> None:
    attention = CASES[name]
    rope = attention.rope
    cos_sin = None
    if rope is not None:
        cos_sin = RopeTable(rope, HostAllocator()).cos_sin(torch.arange(2))
    got = project(KERNELS, attention, NORM, weights(attention), torch.zeros(2, HIDDEN), cos_sin)
    shape = kv_shape(attention)
    assert shape is not None
    heads, key, value = shape
    assert got.key_TKd.shape == (2, heads, key)
    assert got.q_THd.shape == (2, attention.num_heads, key)
    assert got.value_TKv.shape == (2, heads, value or value_width(attention))
    if not value:  # nothing but the key need be kept
        assert got.value_TKv.data_ptr() == got.key_TKd.data_ptr()


def test_no_cache_for_recurrent_attention() -> None:
    delta = GatedDelta(
        num_k_heads=2, num_v_heads=4, k_head_dim=8, v_head_dim=8, conv_kernel=4, norm_eps=1e-6
    )
    assert kv_shape(delta) is None


def test_no_rows() -> None:
    cos_sin = RopeTable(MLA.rope, HostAllocator()).cos_sin(torch.arange(0))
    got = project(KERNELS, MLA, NORM, weights(MLA), torch.zeros(0, HIDDEN), cos_sin)
    assert got.q_THd.shape == (0, 3, 25)

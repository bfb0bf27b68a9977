"""Rotary positions against transformers' formulas, both configuration spellings, and invariance."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from windlass.decoder.rope import RopeTable, frequencies
from windlass.device.host_memory import HostAllocator
from windlass.errors import ModelError
from windlass.kernels.rowwise import rotate
from windlass.models.config import Config
from windlass.models.rope_config import mla_scale, read_rope, rotary_dim
from windlass.models.spec import LongRopeScaling, NoScaling, Rope

HEAD_DIM = 32
LONG = {"short_factor": [1.0 + 0.1 * i for i in range(16)],
        "long_factor": [1.5 + 0.7 * i for i in range(16)]}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 256},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "yarn full": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 512,
                  "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16, "beta_slow": 2},
    "yarn untruncated": {"rope_type": "yarn", "factor": 32.0, "truncate": False,
                         "original_max_position_embeddings": 400, "rope_theta": 150000.0},
    "yarn fixed": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25,
                   "original_max_position_embeddings": 256},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 128, **LONG},
    "longrope factor": {"rope_type": "longrope", "original_max_position_embeddings": 128,
                        "factor": 3.0, **LONG},
    "longrope fixed": {"rope_type": "longrope", "original_max_position_embeddings": 128,
                       "attention_factor": 1.1, **LONG},
}  # fmt: skip


def read(parameters: dict[str, Any], **outer: Any) -> Rope:
    raw = {"rope_parameters": parameters, "max_position_embeddings": 1024, **outer}
    return read_rope(Config(raw), dim=HEAD_DIM)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("long", [False, True])
def test_frequencies_equal_transformers(kind: str, long: bool) -> None:
    parameters = {"rope_theta": 10000.0, "rope_type": "default", **KINDS[kind]}
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        rope_parameters=dict(parameters),
    )
    if parameters["rope_type"] == "default":
        inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        init = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        inv_freq, factor = init(config, torch.device("cpu"), seq_len=1000 if long else 10)
    rope = read(parameters)
    ours, our_factor = frequencies(rope, long=long)
    torch.testing.assert_close(ours, inv_freq, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor, rel=1e-6)
    positions = torch.tensor([0, 1, 7, 300, 1000])
    cos, sin = RopeTable(rope, HostAllocator()).cos_sin(positions, long_T=long)
    angles = positions[:, None] * inv_freq
    torch.testing.assert_close(cos, angles.cos() * factor, rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, angles.sin() * factor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_both_spellings_are_equal(kind: str) -> None:
    parameters = {"rope_theta": 5000.0, **KINDS[kind]}
    new = read(parameters)
    old = {key: value for key, value in parameters.items() if key != "rope_theta"}
    theta = parameters["rope_theta"]
    assert _old(old, theta) == new
    if "rope_type" in old:
        old["type"] = old.pop("rope_type").replace("longrope", "su")
        assert _old(old, theta) == new


def _old(scaling: dict[str, Any], theta: float) -> Rope:
    raw = {"rope_theta": theta, "rope_scaling": scaling or None, "max_position_embeddings": 1024}
    return read_rope(Config(raw), dim=HEAD_DIM)


def test_defaults_and_layer_types() -> None:
    assert read_rope(Config({}), dim=8) == Rope(dim=8, theta=10_000.0)
    assert read_rope(Config({}), dim=8, default_theta=7.0).theta == 7.0
    nested = {
        "rope_theta": 3.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 11.0},
            "sliding_attention": {"rope_type": "default"},
        },
    }
    assert read_rope(Config(nested), dim=8, layer_type="full_attention").theta == 11.0
    sliding = read_rope(Config(nested), dim=8, layer_type="sliding_attention")
    assert sliding == Rope(dim=8, theta=3.0, scaling=NoScaling())
    with pytest.raises(ModelError, match="full_attention, sliding_attention"):
        read_rope(Config(nested), dim=8)


def test_partial_rotation_width() -> None:
    assert rotary_dim(Config({}), 64) == 64
    assert rotary_dim(Config({}), 64, default=0.25) == 16
    assert rotary_dim(Config({"partial_rotary_factor": 0.5}), 64, default=0.25) == 32
    assert rotary_dim(Config({"rope_parameters": {"partial_rotary_factor": 0.125}}), 64) == 8


def test_phimoe_scales_win() -> None:
    scales = {**KINDS["longrope"], "short_mscale": 1.2, "long_mscale": 1.4, "attention_factor": 9.0}
    scaling = read(scales).scaling
    assert isinstance(scaling, LongRopeScaling)
    assert (scaling.short_attention_factor, scaling.long_attention_factor) == (1.2, 1.4)


def test_the_outer_original_maximum_wins() -> None:
    scaling = read(KINDS["longrope"], original_max_position_embeddings=512).scaling
    assert isinstance(scaling, LongRopeScaling) and scaling.original_max == 512


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2'"),
        ({"rope_type": "linear", "factor": -1.0}, "positive"),
        ({"rope_type": "default", "betafast": 1}, "betafast"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate"),
        ({**KINDS["longrope"], "long_factor": [1.0] * 15}, "long_factor: allowed 16"),
        ({**KINDS["llama3"], "low_freq_factor": 4.0}, "low_freq_factor"),
        ({"rope_theta": 1.0}, "rope_theta"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        read(parameters)


def test_latent_attention_scale() -> None:
    plain = Config({"rope_parameters": {"rope_type": "default"}})
    assert mla_scale(plain, 64) == 0.125
    yarn = {"rope_type": "yarn", "factor": 40.0, "mscale_all_dim": 1.0}
    expected = 0.125 * (0.1 * 3.6888794541139363 + 1) ** 2
    assert mla_scale(Config({"rope_scaling": yarn}), 64) == pytest.approx(expected)
    assert mla_scale(Config({"rope_scaling": {**yarn, "mscale_all_dim": 0}}), 64) == 0.125


@pytest.mark.parametrize("kind", ["default", "yarn full", "longrope"])
def test_a_row_does_not_depend_on_the_others(kind: str) -> None:
    rope = read(KINDS[kind])
    positions = torch.randint(0, 3000, (257,), generator=torch.Generator().manual_seed(1))
    long = positions % 2 == 0
    whole = torch.stack(RopeTable(rope, HostAllocator()).cos_sin(positions, long_T=long))
    alone = RopeTable(rope, HostAllocator())
    for row in range(0, 257, 16):
        at = slice(row, row + 1)
        assert torch.equal(torch.stack(alone.cos_sin(positions[at], long_T=long[at])), whole[:, at])
    assert torch.equal(
        torch.stack(
            RopeTable(rope, HostAllocator()).cos_sin(positions.flip(0), long_T=long.flip(0))
        ).flip(1),
        whole,
    )


def test_only_longrope_looks_at_long() -> None:
    position = torch.tensor([5])
    for kind, differs in (("yarn", False), ("longrope", True)):
        table = RopeTable(read(KINDS[kind]), HostAllocator())
        short, long = (table.cos_sin(position, long_T=torch.tensor([x]))[0] for x in (False, True))
        assert torch.equal(short, long) != differs


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: Rope) -> torch.Tensor:
    result = x.clone()
    rotate(result, cos, sin, rope)
    return result


def test_rotation_keeps_lengths_and_relative_angles() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 24).expand(9, 2, 24), torch.randn(1, 2, 24).expand(9, 2, 24)
    for interleaved in (False, True):
        rope = Rope(dim=16, theta=100.0, interleaved=interleaved)
        cos, sin = RopeTable(rope, HostAllocator()).cos_sin(torch.arange(9))
        q_turned, k_turned = (turned(x, cos, sin, rope) for x in (q, k))
        assert torch.equal(q_turned[..., 16:], q[..., 16:])
        assert torch.equal(q_turned[0], q[0])
        scores = torch.einsum("thd,shd->hts", q_turned, k_turned)
        torch.testing.assert_close(scores[:, 3:, 3:], scores[:, :-3, :-3], rtol=0, atol=1e-5)
        assert not torch.allclose(scores[:, 3, 0], scores[:, 0, 0], atol=1e-3)


def test_interleaved_is_a_permutation() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, 16)
    half, pairs = Rope(dim=16, theta=100.0), Rope(dim=16, theta=100.0, interleaved=True)
    cos, sin = RopeTable(half, HostAllocator()).cos_sin(torch.arange(5))
    order = torch.arange(16).view(8, 2).T.flatten()  # evens, then odds
    expected = turned(x[..., order], cos, sin, half)
    assert torch.equal(turned(x, cos, sin, pairs)[..., order], expected)

"""Short convolution and Mamba-2 against transformers, and their bits, one layer at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Lfm2MoeConfig, NemotronHConfig
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeShortConv
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from segment_rows import rows_of
from windlass.decoder.recurrent import recurrent_attention, state_shapes
from windlass.decoder.state_rows import CHUNK, StateSegment
from windlass.kernels.reference import TorchKernels
from windlass.models.spec import Mamba2, Recurrent, ShortConv

HIDDEN = 32
PROMPT, TOTAL = CHUNK + 1, CHUNK + 9
KERNELS = TorchKernels()
NAMES = {
    "out_proj.weight": "o_proj.weight", "out_proj.bias": "o_proj.bias", "A_log": "a_log",
    "D": "d", "conv1d.weight": "conv.weight", "conv1d.bias": "conv.bias",
    "norm.weight": "out_norm.weight",
}  # fmt: skip


def short_conv(*, bias: bool) -> tuple[Recurrent, torch.nn.Module]:
    config = Lfm2MoeConfig(
        hidden_size=HIDDEN, conv_L_cache=3, conv_bias=bias, num_hidden_layers=1,
        layer_types=["conv"],
    )  # fmt: skip
    return ShortConv(conv_kernel=3, bias=bias), Lfm2MoeShortConv(config, 0)


def mamba(*, heads: int, groups: int, bias: bool) -> tuple[Recurrent, torch.nn.Module]:
    spec = Mamba2(
        num_heads=heads, head_dim=10, num_groups=groups, state_dim=14, conv_kernel=4,
        norm_eps=1e-3, conv_bias=bias,
    )  # fmt: skip
    config = NemotronHConfig(
        hidden_size=HIDDEN, layers_block_type=["linear_attention"], mamba_num_heads=heads,
        mamba_head_dim=10, n_groups=groups, ssm_state_size=14, conv_kernel=4,
        layer_norm_epsilon=1e-3, use_conv_bias=bias, chunk_size=16,
        time_step_min=1e-30,  # see models/families/nemotron_h.py
    )  # fmt: skip
    return spec, NemotronHMamba2Mixer(config, 0)


LAYERS: dict[str, Callable[[], tuple[Recurrent, torch.nn.Module]]] = {
    "conv": lambda: short_conv(bias=False),
    "conv-bias": lambda: short_conv(bias=True),
    "mamba": lambda: mamba(heads=6, groups=3, bias=True),
    "mamba-one-group": lambda: mamba(heads=3, groups=1, bias=False),
}


class Layer:
    """One random layer: description, canonical weights, and the answer of transformers."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.spec, net = LAYERS[name]()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        self.weights = {NAMES.get(n, n): p.detach() for n, p in net.named_parameters()}
        self.weights["conv.weight"] = self.weights["conv.weight"][:, 0]
        if isinstance(self.spec, Mamba2):
            self.weights["state_proj.weight"] = self.weights["in_proj.weight"]
        self.rows = torch.randn(TOTAL, HIDDEN)
        with torch.inference_mode():
            self.expected = net.eval()(self.rows[None])[0]
        # rubbish: a fresh sequence must not see what its slot held
        self.states = [torch.full((4, *shape), 7.0) for shape in state_shapes(self.spec, HIDDEN)]

    def run(self, rows: torch.Tensor, *places: tuple[int, int, int, bool]) -> torch.Tensor:
        """Sequences one after the other, each a slot, its number of rows, the position of the
        first, and whether they are of the prompt."""
        segments, first = [], 0
        for slot, count, position, is_prompt in places:
            segments.append(
                StateSegment(
                    first_row=first,
                    num_rows=count,
                    first_position=position,
                    slot=slot,
                    is_prompt=is_prompt,
                )
            )
            first += count
        given = KERNELS, self.spec, self.weights, rows, rows_of(segments)
        return recurrent_attention(*given, self.states)

    def alone(self) -> torch.Tensor:
        """The prompt, then what was generated."""
        prompt = self.run(self.rows[:PROMPT], (2, PROMPT, 0, True))
        answer = self.run(self.rows[PROMPT:], (2, TOTAL - PROMPT, PROMPT, False))
        return torch.cat((prompt, answer))


@pytest.fixture(params=LAYERS)
def layer(request: Any) -> Layer:
    return Layer(request.param)


def test_rows_of_both_kinds_equal_transformers(layer: Layer) -> None:
    atol = 1e-5 * float(layer.expected.abs().max())
    by_chunk = layer.run(layer.rows, (2, TOTAL, 0, True))
    states = [state[2].clone() for state in layer.states]
    torch.testing.assert_close(by_chunk, layer.expected, rtol=0, atol=atol)
    torch.testing.assert_close(layer.alone(), layer.expected, rtol=0, atol=atol)
    for state, expected in zip(layer.states, states, strict=True):
        torch.testing.assert_close(state[2], expected, rtol=1e-4, atol=1e-5)


def test_cuts_and_neighbours_change_no_bit(layer: Layer) -> None:
    """A prompt cut after a chunk, then its tokens one by one, beside another sequence."""
    rows, whole = layer.rows, layer.alone()
    states = [state[2].clone() for state in layer.states]
    got = [layer.run(rows[:CHUNK], (0, CHUNK, 0, True))]
    got.append(layer.run(rows[[CHUNK, 0, 1]], (0, 1, CHUNK, True), (3, 2, 0, True))[:1])
    for at in range(PROMPT, TOTAL):
        both = torch.stack((-rows[at], rows[at]))
        places = (3, 1, at - PROMPT + 2, False), (0, 1, at, False)
        got.append(layer.run(both, *places)[1:])
    assert torch.equal(torch.cat(got), whole)
    assert all(map(torch.equal, (state[0] for state in layer.states), states))


def test_misaligned_slots_change_no_bit(layer: Layer) -> None:
    whole = layer.alone()
    layer.states = [torch.zeros(s.numel() + 1)[1:].view(s.shape) for s in layer.states]
    assert layer.states[-1][2].data_ptr() % 64
    assert torch.equal(layer.alone(), whole)

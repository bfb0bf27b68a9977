"""The gated short convolution against transformers, and its bits, one layer at a time."""

from typing import Any

import pytest
import torch
from transformers import Lfm2MoeConfig
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeShortConv

from windlass.decoder.recurrent import recurrent_attention, state_shapes
from windlass.decoder.state_rows import CHUNK, StateSegment
from windlass.kernels.reference import TorchKernels
from windlass.models.spec import ShortConv

HIDDEN, TAPS = 32, 3
TOTAL = CHUNK + 9
KERNELS = TorchKernels()


class Layer:
    """One random layer: description, canonical weights, and the answer of transformers."""

    def __init__(self, bias: bool) -> None:
        torch.manual_seed(0)
        self.spec = ShortConv(conv_kernel=TAPS, bias=bias)
        config = Lfm2MoeConfig(
            hidden_size=HIDDEN, conv_L_cache=TAPS, conv_bias=bias, num_hidden_layers=1,
            layer_types=["conv"],
        )  # fmt: skip
        net = Lfm2MoeShortConv(config, 0).eval()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        self.weights = {
            name.replace("out_proj", "o_proj"): tensor.detach()
            for name, tensor in net.named_parameters()
        }
        self.weights["conv.weight"] = self.weights["conv.weight"][:, 0]
        self.rows = torch.randn(TOTAL, HIDDEN)
        with torch.inference_mode():
            self.expected = net(self.rows[None])[0]
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
        return recurrent_attention(KERNELS, self.spec, self.weights, rows, segments, self.states)


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def layer(request: Any) -> Layer:
    return Layer(request.param)


def test_rows_equal_transformers(layer: Layer) -> None:
    got = layer.run(layer.rows, (2, TOTAL, 0, True))
    scale = float(layer.expected.abs().max())
    torch.testing.assert_close(got, layer.expected, rtol=0, atol=1e-5 * scale)


def test_cuts_and_neighbours_change_no_bit(layer: Layer) -> None:
    """A prompt of CHUNK and one row, then generated rows, beside another sequence."""
    rows, prompt = layer.rows, CHUNK + 1
    whole = layer.run(rows, (2, TOTAL, 0, True))
    state = layer.states[0][2].clone()
    got = [layer.run(rows[:CHUNK], (0, CHUNK, 0, True))]
    got.append(layer.run(rows[[CHUNK, 0, 1]], (0, 1, CHUNK, True), (3, 2, 0, True))[:1])
    for at in range(prompt, TOTAL):
        both = torch.stack((-rows[at], rows[at]))
        got.append(layer.run(both, (3, 1, at - prompt + 2, False), (0, 1, at, False))[1:])
    assert torch.equal(torch.cat(got), whole)
    assert torch.equal(layer.states[0][0], state)

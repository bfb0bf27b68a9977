"""The gated delta rule against transformers, one layer at a time and as whole models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from delta_model import DELTA_CASES, VOCAB, DeltaModel, make_delta_checkpoint
from dense_model import TOLERANCE, Checkpoint
from segment_rows import rows_of
from windlass.decoder.delta import delta_attention
from windlass.decoder.recurrent import state_shapes
from windlass.decoder.state_rows import CHUNK, StateSegment
from windlass.kernels.reference import TorchKernels
from windlass.models.spec import GatedDelta

HIDDEN = 32
SIZES = {"shared keys": (2, 6, 8, 10), "own keys": (3, 3, 12, 5)}  # key heads, value heads, dims
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Layer:
    """One random layer: description, canonical weights, and the answer of transformers."""

    def __init__(self, size: str) -> None:
        torch.manual_seed(0)
        keys, values, d, v = SIZES[size]
        self.spec = GatedDelta(
            num_k_heads=keys,
            num_v_heads=values,
            k_head_dim=d,
            v_head_dim=v,
            conv_kernel=4,
            norm_eps=1e-3,
        )
        config = Qwen3NextConfig(
            hidden_size=HIDDEN,
            linear_num_key_heads=keys,
            linear_num_value_heads=values,
            linear_key_head_dim=d,
            linear_value_head_dim=v,
            linear_conv_kernel_dim=4,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
            rms_norm_eps=1e-3,
        )
        net = Qwen3NextGatedDeltaNet(config, 0).eval()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        per_key, rows = values // keys, values // keys * v
        qkvz = net.in_proj_qkvz.weight.detach().view(keys, 2 * d + 2 * rows, HIDDEN)
        ba = net.in_proj_ba.weight.detach().view(keys, 2 * per_key, HIDDEN)
        self.weights: Weights = {
            "q_proj.weight": qkvz[:, :d],
            "k_proj.weight": qkvz[:, d : 2 * d],
            "v_proj.weight": qkvz[:, 2 * d : 2 * d + rows],
            "z_proj.weight": qkvz[:, 2 * d + rows :],
            "b_proj.weight": ba[:, :per_key],
            "a_proj.weight": ba[:, per_key:],
            "conv.weight": net.conv1d.weight.detach()[:, 0],
            "dt_bias": net.dt_bias.detach(),
            "a_log": net.A_log.detach(),
            "out_norm.weight": net.norm.weight.detach(),
            "o_proj.weight": net.out_proj.weight.detach(),
        }
        self.rows = torch.randn(3 * CHUNK + 8, HIDDEN)
        with torch.inference_mode():
            self.expected = net(self.rows[None])[0]
        self.kernels = TorchKernels()
        # rubbish: a fresh sequence must not see what its slot held
        conv, state = state_shapes(self.spec, HIDDEN)
        self.states = torch.full((5, *conv), 7.0), torch.full((5, *state), 7.0)

    def run(self, rows: torch.Tensor, segments: list[StateSegment]) -> torch.Tensor:
        given = self.kernels, self.spec, self.weights, rows, rows_of(segments)
        return delta_attention(*given, self.states)

    def run_alone(self, cuts: list[int], *, prompt: int, slot: int = 2) -> torch.Tensor:
        """One sequence, cut into calls; positions below `prompt` are prompt."""
        outputs = []
        for first, last in zip(cuts, cuts[1:], strict=False):
            segment = StateSegment(
                first_row=0,
                num_rows=last - first,
                first_position=first,
                slot=slot,
                is_prompt=first < prompt,
            )
            outputs.append(self.run(self.rows[first:last], [segment]))
        return torch.cat(outputs)


@pytest.fixture(params=SIZES)
def layer(request: Any) -> Layer:
    return Layer(request.param)


def test_chunks_and_tokens_equal_transformers(layer: Layer) -> None:
    total = len(layer.rows)
    scale = float(layer.expected.abs().max())
    by_chunk = layer.run_alone([0, total], prompt=total)
    state = layer.states[1][2].clone()
    by_token = layer.run_alone([0, total], prompt=0)
    for result in (by_chunk, by_token):
        torch.testing.assert_close(result, layer.expected, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(layer.states[1][2], state, rtol=1e-4, atol=1e-5)


def test_cuts_change_no_bit(layer: Layer) -> None:
    total, prompt = len(layer.rows), 2 * CHUNK + 5
    ends = list(range(prompt, total + 1))
    whole = layer.run_alone([0, *ends], prompt=prompt)
    states = [state[2].clone() for state in layer.states]
    for cuts in ([0, CHUNK, *ends], [0, 2 * CHUNK, *ends], [0, prompt, prompt + 9, total]):
        assert torch.equal(layer.run_alone(cuts, prompt=prompt), whole)
        assert all(map(torch.equal, (state[2] for state in layer.states), states))


def test_other_sequences_and_slots_change_no_bit(layer: Layer) -> None:
    alone = layer.run_alone([0, CHUNK, CHUNK + 20, CHUNK + 21, CHUNK + 22], prompt=CHUNK + 20)
    plans = [
        [("x", 7), ("me", CHUNK)],
        [("me", 20), ("x", 1), ("y", 3)],
        [("y", 1), ("me", 1), ("x", 1)],
        [("x", 1), ("y", 1), ("me", 1)],
    ]
    slots, positions, mine = {"me": 0, "x": 4, "y": 1}, {"me": 0, "x": 0, "y": 0}, []
    for plan in plans:
        segments, rows, first = [], [], 0
        for name, count in plan:
            at = positions[name]
            is_prompt = at < CHUNK + 20 if name == "me" else at == 0
            segments.append(
                StateSegment(
                    first_row=first,
                    num_rows=count,
                    first_position=at,
                    slot=slots[name],
                    is_prompt=is_prompt,
                )
            )
            source = layer.rows if name == "me" else -2 * layer.rows
            rows.append(source[at : at + count])
            first, positions[name] = first + count, at + count
        out = layer.run(torch.cat(rows), segments)
        mine += [out[s.rows] for s in segments if s.slot == slots["me"]]
    assert torch.equal(torch.cat(mine), alone)


def test_misaligned_slots_change_no_bit(layer: Layer) -> None:
    cuts = [0, CHUNK, CHUNK + 1, CHUNK + 2]
    expected = layer.run_alone(cuts, prompt=CHUNK)
    conv, state = layer.states
    layer.states = conv, torch.zeros(state.numel() + 1)[1:].view(state.shape)
    assert layer.states[1][2].data_ptr() % 64
    assert torch.equal(layer.run_alone(cuts, prompt=CHUNK), expected)


def test_a_prompt_cut_inside_a_chunk_is_refused(layer: Layer) -> None:
    layer.run_alone([0, 10], prompt=10)
    with pytest.raises(AssertionError, match="cut inside"):
        layer.run_alone([10, 20], prompt=20)


# --- whole models ---------------------------------------------------------------------------------

PROMPT, TOTAL = 2 * CHUNK + 5, 2 * CHUNK + 12
IDS = torch.randint(3, VOCAB, (TOTAL,), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def check_logits(path: Path, expected: torch.Tensor) -> torch.Tensor:
    """Prompt in one pass, then token by token."""
    model = DeltaModel(Checkpoint(path))
    logits = model.run_alone(IDS, [0, *range(PROMPT, TOTAL + 1)], prompt=PROMPT)
    assert 0.1 < expected.std() < 10, "logits are not of order 1"
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    return logits


@torch.inference_mode()
def expected_logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS[None]).logits[0]


@pytest.mark.parametrize("family", DELTA_CASES)
@pytest.mark.parametrize("hub_format", [True, False], ids=["hub", "stacked"])
def test_logits_equal_transformers(family: str, hub_format: bool, tmp_path: Path) -> None:
    model = make_delta_checkpoint(family, tmp_path, hub_format=hub_format)
    check_logits(tmp_path, expected_logits(model))


@torch.inference_mode()
def test_logits_token_by_token(tmp_path: Path) -> None:
    expected = expected_logits(make_delta_checkpoint("qwen3_next", tmp_path))
    logits = DeltaModel(Checkpoint(tmp_path)).run_alone(IDS, list(range(TOTAL + 1)), prompt=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
def test_the_projections_of_the_other_family(family: str, tmp_path: Path) -> None:
    """Fused and split projections are read by both; logits keep their bits."""
    model = make_delta_checkpoint(family, tmp_path)
    logits = check_logits(tmp_path, expected_logits(model))
    file = tmp_path / "model.safetensors"
    tensors, spec = load_file(file), Checkpoint(tmp_path).spec
    for layer, block in enumerate(spec.blocks):
        if isinstance(block.attention, GatedDelta):
            _swap_projections(
                tensors, f"model.layers.{layer}.linear_attn.in_proj_", block.attention
            )
    save_file(tensors, file)
    with safe_open(file, "pt") as opened:
        assert any("in_proj_qkvz" in name for name in opened.keys()) == (family != "qwen3_next")
    swapped = DeltaModel(Checkpoint(tmp_path))
    with torch.inference_mode():
        again = swapped.run_alone(IDS, [0, *range(PROMPT, TOTAL + 1)], prompt=PROMPT)
    assert torch.equal(again, logits)


def _swap_projections(tensors: Weights, stem: str, delta: GatedDelta) -> None:
    keys, d, hidden = delta.num_k_heads, delta.k_head_dim, 32
    r = delta.num_v_heads // keys
    v = r * delta.v_head_dim
    if f"{stem}qkvz.weight" in tensors:
        qkvz = tensors.pop(f"{stem}qkvz.weight").view(keys, -1, hidden)
        ba = tensors.pop(f"{stem}ba.weight").view(keys, 2 * r, hidden)
        parts = [qkvz[:, :d], qkvz[:, d : 2 * d], qkvz[:, 2 * d : 2 * d + v]]
        split = {"qkv": torch.cat([part.flatten(0, 1) for part in parts])}
        split |= {"z": qkvz[:, 2 * d + v :], "b": ba[:, :r], "a": ba[:, r:]}
        for name, tensor in split.items():
            tensors[f"{stem}{name}.weight"] = tensor.reshape(-1, hidden).contiguous()
        return
    qkv, z, b, a = (tensors.pop(f"{stem}{name}.weight") for name in ("qkv", "z", "b", "a"))
    parts = [*qkv[: 2 * keys * d].view(2, keys, d, hidden), qkv[2 * keys * d :], z]
    for name, group in (("qkvz", parts), ("ba", [b, a])):
        fused = torch.cat([part.reshape(keys, -1, hidden) for part in group], dim=1)
        tensors[f"{stem}{name}.weight"] = fused.reshape(-1, hidden).contiguous()


@torch.inference_mode()
def test_cuts_and_neighbours_change_no_bit_of_a_model(tmp_path: Path) -> None:
    make_delta_checkpoint("qwen3_next", tmp_path)
    model = DeltaModel(Checkpoint(tmp_path))
    ends = list(range(PROMPT, TOTAL + 1))
    alone = model.run_alone(IDS, [0, *ends], prompt=PROMPT)
    assert torch.equal(model.run_alone(IDS, [0, CHUNK, 2 * CHUNK, *ends], prompt=PROMPT), alone)
    mine, other = [], IDS.flip(0)
    for step, (first, last) in enumerate(zip([0, CHUNK, *ends], [CHUNK, *ends], strict=False)):
        count = 9 if step == 0 else 1  # the neighbour: a prompt of 9, then a token a pass
        neighbour = StateSegment(
            first_row=0,
            num_rows=count,
            first_position=9 + step - 1 if step else 0,
            slot=0,
            is_prompt=step == 0,
        )
        me = StateSegment(
            first_row=count,
            num_rows=last - first,
            first_position=first,
            slot=2,
            is_prompt=first < PROMPT,
        )
        start = neighbour.first_position
        rows = torch.cat((other[start : start + count], IDS[first:last]))
        mine.append(model.run(rows, [neighbour, me])[me.rows])
    assert torch.equal(torch.cat(mine), alone)

"""A checkpoint read with the safetensors library and run without a cache, by the functions of
`decoder/` alone: what a family's description means, apart from engine and weight store."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from families import VOCAB
from segment_rows import rows_of
from windlass.checkpoint.layout import build_layout, with_stored_head
from windlass.decoder import block as math
from windlass.decoder.attention import CosSin, attention_output, project
from windlass.decoder.moe import dense_ffn, route, shared_expert
from windlass.decoder.recurrent import recurrent_attention, state_shapes
from windlass.decoder.rope import RopeTable
from windlass.decoder.state_rows import StateSegment
from windlass.device.host_memory import HostAllocator
from windlass.ids import Part, WeightKey
from windlass.kernels.interface import Kernels
from windlass.kernels.reference import TorchKernels
from windlass.models.names import Piece, Reshape, Take, TensorInfo
from windlass.models.registry import read_spec
from windlass.models.spec import Gqa, LongRopeScaling, Mla, ModelSpec, Moe, Recurrent, Rope

# In fp32 the largest difference measured is 3.0e-6 (deepseek_v3, phimoe), logits of order 1.
TOLERANCE = 1e-4


LENGTHS = (30, 4, 12)  # the windows are 5 to 9, LongRoPE's original context is 16


KERNELS = TorchKernels()


class Checkpoint:
    """A directory read with the safetensors library; parts are cut out by the layout's pieces."""

    def __init__(self, path: Path) -> None:
        self.config = json.loads((path / "config.json").read_text())
        self.tensors: dict[str, torch.Tensor] = {}
        self.infos: dict[str, TensorInfo] = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():
                    tensor = self.tensors[name] = opened.get_tensor(name)
                    dtype = opened.get_slice(name).get_dtype()
                    self.infos[name] = TensorInfo(name, file.name, dtype, tuple(tensor.shape), 0, 0)
        spec, self.names = read_spec(self.config)
        self.spec = with_stored_head(spec, self.names, self.infos)
        self.layout = build_layout(self.spec, self.names, self.infos, head_chunk_bytes=1024)

    def part(self, part: Part, layer: int = -1, index: int = -1) -> dict[str, torch.Tensor]:
        pieces = self.layout.parts[WeightKey(part, layer, index)]
        return {piece.name: self._canonical(piece) for piece in pieces}

    def _canonical(self, piece: Piece) -> torch.Tensor:
        x = self.tensors[piece.tensor].flatten()[piece.start : piece.stop].view(piece.shape)
        for op in piece.ops:
            if isinstance(op, Take):
                index = torch.arange(op.start, op.stop, op.step)
                x = x.index_select(op.dim, index)
            elif isinstance(op, Reshape):
                x = x.reshape(op.shape)
            else:
                x = x.transpose(-1, -2)
        return x


def dense_logits(
    checkpoint: Checkpoint, ids: torch.Tensor, kernels: Kernels = KERNELS
) -> torch.Tensor:
    """Logits (T, V) of one prompt without a cache."""
    spec = checkpoint.spec
    x = math.embed(spec, checkpoint.part(Part.EMBED)["weight"][ids])
    for layer in range(len(spec.blocks)):
        w = checkpoint.part(Part.BLOCK, layer)
        if spec.blocks[layer].attention is not None:
            _attend(kernels, spec, layer, w, x)
        if spec.blocks[layer].ffn is not None:
            feed_forward(checkpoint, layer, w, x, kernels)
    final = checkpoint.part(Part.FINAL)
    h = math.final_norm(kernels, spec, final, x)
    chunks, first = [], 0
    for key in checkpoint.layout.keys(Part.HEAD):
        weight = checkpoint.part(*key)["weight"]
        bias = final["head_bias"][first : first + len(weight)] if spec.head_bias else None
        chunks.append(h.new_empty(len(h), weight.shape[0]))
        math.logits(kernels, spec, weight, bias, h, chunks[-1])
        first += len(weight)
    return torch.cat(chunks, dim=-1)


def _attend(
    kernels: Kernels, spec: ModelSpec, layer: int, w: Mapping[str, torch.Tensor], x: torch.Tensor
) -> None:
    attention = spec.blocks[layer].attention
    if isinstance(attention, Recurrent):
        _mix(kernels, spec, layer, w, x)
        return
    assert isinstance(attention, Gqa | Mla)
    cos_sin = None if attention.rope is None else _cos_sin(attention.rope, len(x))
    h = math.attention_input(kernels, spec, w, x)
    got = project(kernels, attention, spec.norm, w, h, cos_sin)
    window = attention.window if isinstance(attention, Gqa) else None
    sinks = w["sinks"] if isinstance(attention, Gqa) and attention.sinks else None
    o = _naive(got.q_THd, got.key_TKd, got.value_TKv, attention.scale, window, sinks)
    y = attention_output(kernels, attention, w, o, got.gate_THv)
    math.add_attention(kernels, spec, layer, w, x, y)


def _cos_sin(rope: Rope, num: int) -> CosSin:
    is_long = isinstance(rope.scaling, LongRopeScaling) and num > rope.scaling.original_max
    return RopeTable(rope, HostAllocator()).cos_sin(torch.arange(num), long_T=is_long)


def _mix(
    kernels: Kernels,
    spec: ModelSpec,
    layer: int,
    w: Mapping[str, torch.Tensor],
    x: torch.Tensor,
) -> None:
    """The prompt as one segment."""
    attention = spec.blocks[layer].attention
    assert isinstance(attention, Recurrent)
    segment = StateSegment(first_row=0, num_rows=len(x), first_position=0, slot=0, is_prompt=True)
    states = [torch.zeros(1, *shape) for shape in state_shapes(attention, spec.hidden_size)]
    h = math.attention_input(kernels, spec, w, x)
    y = recurrent_attention(kernels, attention, w, h, rows_of([segment]), states)
    math.add_attention(kernels, spec, layer, w, x, y)


def _naive(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    num, heads = q.shape[:2]
    key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    scores = torch.einsum("qhd,khd->hqk", q, key) * scale
    distance = torch.arange(num)[:, None] - torch.arange(num)
    hidden = (distance < 0) | (distance >= (window or num))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, num, 1)), dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :num], value)


def feed_forward(
    checkpoint: Checkpoint,
    layer: int,
    w: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    kernels: Kernels = KERNELS,
) -> None:
    """The network of a block, added to the hidden states `x`."""
    spec = checkpoint.spec
    ffn = spec.blocks[layer].ffn
    assert ffn is not None
    if not isinstance(ffn, Moe):
        h = math.ffn_input(kernels, spec, w, x)
        y = dense_ffn(kernels, ffn, checkpoint.part(Part.FFN, layer), h)
        math.add_network(kernels, spec, layer, w, x, y)
        return
    h, router_input = math.routing_inputs(kernels, spec, ffn, w, x)
    weights, ids, _ = route(kernels, ffn, w, router_input)
    outputs = torch.empty(len(h), ffn.top_k, h.shape[1])
    for expert in ids.unique().tolist():
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        part = checkpoint.part(Part.EXPERT, layer, expert)
        outputs[rows, slots] = kernels.expert_ffn(h[rows], part, ffn.expert.activation)
    shared = None
    if ffn.shared is not None:
        own = math.ffn_input(kernels, spec, w, x) if ffn.shared.own_norms else h
        shared = shared_expert(kernels, ffn.shared, w, own)
        shared = math.shared_output(kernels, spec, ffn.shared, w, shared)
    got = math.ExpertOutputs(weights, outputs, shared)
    math.add_experts(kernels, spec, layer, w, x, got)


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in LENGTHS]

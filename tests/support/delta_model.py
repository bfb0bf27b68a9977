"""Tiny checkpoints of the families with gated delta layers, and a model that runs them row by row
or by chunks, over caches, with the decoder's functions alone."""

import functools
from pathlib import Path
from typing import Any

import torch
import transformers

from dense_model import KERNELS, Checkpoint, feed_forward
from segment_rows import rows_of
from windlass.decoder import block as math
from windlass.decoder.attention import attention_output, project, value_width
from windlass.decoder.recurrent import recurrent_attention, state_shapes
from windlass.decoder.rope import RopeTable
from windlass.decoder.state_rows import StateSegment
from windlass.device.host_memory import HostAllocator
from windlass.ids import Part
from windlass.kernels.interface import AttentionOptions, AttentionWork
from windlass.models.spec import Gqa, Recurrent
from windlass.tensors import PagedRows

VOCAB = 101
PAGE_TOKENS, NUM_PAGES = 16, 30

_TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=512,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=20,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=8,
    linear_value_head_dim=10,
    linear_conv_kernel_dim=3,
    rms_norm_eps=1e-3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_SECTIONS = dict(mrope_section=[1, 1, 1], mrope_interleaved=True)
_ROPE = dict(rope_type="default", rope_theta=5e3, partial_rotary_factor=0.5)

DELTA_CASES: dict[str, dict[str, Any]] = {
    "qwen3_next": dict(
        **_TEXT,
        intermediate_size=40,
        full_attention_interval=2,
        mlp_only_layers=[1],
        norm_topk_prob=False,
        rope_parameters=_ROPE,
    ),
    "qwen3_5_moe_text": dict(
        **{**_TEXT, "linear_num_key_heads": 3, "linear_num_value_heads": 3},
        layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"],
        rope_parameters={**_ROPE, **_SECTIONS},
    ),
    "qwen3_5_moe": dict(
        text_config=dict(
            **_TEXT,
            full_attention_interval=2,
            rope_parameters={**_ROPE, **_SECTIONS},
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=1,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            out_hidden_size=32,
            patch_size=4,
            num_position_embeddings=16,
        ),
        tie_word_embeddings=True,
    ),
}


def make_delta_checkpoint(
    family: str, path: Path, *, hub_format: bool = True, **changes: Any
) -> "transformers.PreTrainedModel":
    """Like `families.make_checkpoint`."""
    config = transformers.AutoConfig.for_model(family, **DELTA_CASES[family], **changes)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    auto = (
        transformers.AutoModelForImageTextToText
        if family == "qwen3_5_moe"
        else transformers.AutoModelForCausalLM
    )
    model = auto.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            scale = tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.3
            plain = name.endswith("linear_attn.norm.weight")  # other norms add 1 themselves
            tensor.copy_(noise * scale + (1.0 if plain else 0.0))
    model.save_pretrained(path, save_original_format=hub_format)
    return model


class DeltaModel:
    """A checkpoint with a cache for a few sequences."""

    def __init__(self, checkpoint: Checkpoint, *, num_slots: int = 3) -> None:
        self.checkpoint, self.spec = checkpoint, checkpoint.spec
        checkpoint.part = functools.cache(checkpoint.part)  # type: ignore[method-assign]
        self.caches: list[list[torch.Tensor]] = []
        for block in self.spec.blocks:
            shapes: list[tuple[int, ...]]
            if isinstance(block.attention, Recurrent):
                own = state_shapes(block.attention, self.spec.hidden_size)
                shapes = [(num_slots, *shape) for shape in own]
            else:
                gqa = block.attention
                assert isinstance(gqa, Gqa)
                rows = (NUM_PAGES, gqa.num_kv_heads, PAGE_TOKENS, gqa.head_dim)
                shapes = [rows, rows]
            self.caches.append([torch.full(shape, 3.0) for shape in shapes])

    def run(self, ids: torch.Tensor, segments: list[StateSegment]) -> torch.Tensor:
        """Logits (T, V) of the rows of one pass; `slot` owns every third page, from its own on."""
        x = math.embed(self.spec, self.checkpoint.part(Part.EMBED)["weight"][ids])
        for layer, block in enumerate(self.spec.blocks):
            w = self.checkpoint.part(Part.BLOCK, layer)
            if isinstance(block.attention, Recurrent):
                h = math.attention_input(KERNELS, self.spec, w, x)
                caches = self.caches[layer]
                given = KERNELS, block.attention, w, h, rows_of(segments)
                y = recurrent_attention(*given, caches)
                math.add_attention(KERNELS, self.spec, layer, w, x, y)
            else:
                self._softmax(layer, w, x, segments)
            feed_forward(self.checkpoint, layer, w, x)
        h = math.final_norm(KERNELS, self.spec, self.checkpoint.part(Part.FINAL), x)
        chunks = [self.checkpoint.part(*key) for key in self.checkpoint.layout.keys(Part.HEAD)]
        logits = [h.new_empty(len(h), len(w["weight"])) for w in chunks]
        for w, out in zip(chunks, logits, strict=True):
            math.logits(KERNELS, self.spec, w["weight"], None, h, out)
        return torch.cat(logits, dim=-1)

    def run_alone(
        self, ids: torch.Tensor, cuts: list[int], *, prompt: int, slot: int = 1
    ) -> torch.Tensor:
        """One sequence, cut into passes; positions below `prompt` are prompt."""
        outputs = []
        for first, last in zip(cuts, cuts[1:], strict=False):
            segment = StateSegment(
                first_row=0,
                num_rows=last - first,
                first_position=first,
                slot=slot,
                is_prompt=first < prompt,
            )
            outputs.append(self.run(ids[first:last], [segment]))
        return torch.cat(outputs)

    def _softmax(
        self, layer: int, w: dict[str, torch.Tensor], x: torch.Tensor, segments: list[StateSegment]
    ) -> None:
        attention = self.spec.blocks[layer].attention
        assert isinstance(attention, Gqa) and attention.rope is not None
        spans = [range(s.first_position, s.first_position + s.num_rows) for s in segments]
        positions = torch.tensor([position for span in spans for position in span])
        cos_sin = RopeTable(attention.rope, HostAllocator()).cos_sin(positions)
        h = math.attention_input(KERNELS, self.spec, w, x)
        got = project(KERNELS, attention, self.spec.norm, w, h, cos_sin)
        pages = tuple(tuple(range(s.slot, NUM_PAGES, 3)) for s in segments)
        key, value = self.caches[layer]
        for segment, span, owned in zip(segments, spans, pages, strict=True):
            for row, position in enumerate(span, start=segment.first_row):
                page, place = owned[position // PAGE_TOKENS], position % PAGE_TOKENS
                key[page, :, place] = got.key_TKd[row]
                value[page, :, place] = got.value_TKv[row]
        work = AttentionWork(
            first_row=tuple(s.first_row for s in segments),
            num_rows=tuple(s.num_rows for s in segments),
            first_position=tuple(s.first_position for s in segments),
            pages=pages,
            is_prompt=tuple(s.is_prompt for s in segments),
        )
        options = AttentionOptions(
            scale=attention.scale, value_dim=value_width(attention), window=attention.window
        )
        o = KERNELS.attention(got.q_THd, PagedRows(key), PagedRows(value), work, options)
        y = attention_output(KERNELS, attention, w, o, got.gate_THv)
        math.add_attention(KERNELS, self.spec, layer, w, x, y)

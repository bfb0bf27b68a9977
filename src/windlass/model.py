"""A checkpoint, understood but not loaded: its description, its layout, and what it and the process
weigh. What a plan is made from."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from windlass.decoder.attention import kv_shape, value_width
from windlass.decoder.delta import state_shapes
from windlass.decoder.rope import RopeTable
from windlass.device.host import (
    resident_bytes,
)
from windlass.errors import UsageError
from windlass.ids import Part
from windlass.memory.checkpoint import Checkpoint, WeightSource
from windlass.memory.kv import (
    CacheShape,
    PagedShape,
    StateShape,
    bytes_per_token,
    state_bytes,
)
from windlass.memory.recipe import slot_bytes
from windlass.memory.rows import row_buffer_bytes
from windlass.memory.views import copied_bytes, dtype_of
from windlass.options import (
    EngineOptions,
    read_config,
    resolve_model,
)
from windlass.planner.activations import Backend
from windlass.planner.budget import Sizes, Wanted
from windlass.schedule.block_math import ropes
from windlass.schedule.passes import PassShape
from windlass.spec.kinds import weight_kinds
from windlass.spec.layout import build_layout
from windlass.spec.model import GatedDelta, ModelSpec, Moe
from windlass.spec.names import Layout, NameMap, TensorInfo
from windlass.spec.registry import read_spec
from windlass.synth import random_source
from windlass.units import parse_bytes

_MACHINE_THREADS = torch.get_num_threads()  # before any engine of this process set its own
_ELEMENTS_PER_THREAD = 1 << 17  # of an expert's largest matrix
CACHE_DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
    "int8": torch.int8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint, understood but not loaded."""

    folder: Path
    config: dict[str, Any]
    spec: ModelSpec
    layout: Layout
    source: WeightSource


def pass_shape(spec: ModelSpec, layout: Layout) -> PassShape:
    """What the schedule must know of a model."""
    is_moe = tuple(isinstance(block.ffn, Moe) for block in spec.blocks)
    return PassShape(is_moe, len(layout.keys(Part.HEAD)))


def cache_shapes(spec: ModelSpec) -> list[CacheShape]:
    """What each layer keeps of a sequence."""
    shapes: list[CacheShape] = []
    for block in spec.blocks:
        if isinstance(block.attention, GatedDelta):
            shapes.append(StateShape(*state_shapes(block.attention)))
            continue
        shape = kv_shape(block.attention)
        assert shape is not None, "only recurrent attention has no growing cache"
        width = value_width(block.attention)
        shapes.append(PagedShape(shape[0], shape[1], width, value_in_key=shape[2] == 0))
    return shapes


def read_model(options: EngineOptions, opened: ExitStack) -> Model:
    folder = resolve_model(options.model)
    config = read_config(folder)
    spec, names = read_spec(config)
    _check_quantization(options.quantization, names)
    source: WeightSource
    if options.load_format == "dummy":
        source = random_source(config, seed=options.seed)
    else:
        source = Checkpoint(folder, mode=options.load_mode)
    opened.callback(source.close)
    return Model(folder, config, spec, build_layout(spec, names, source.tensors), source)


def _check_quantization(asserted: str | None, names: NameMap) -> None:
    found = None if names.quantization is None else names.quantization.method
    if asserted is not None and asserted != found:
        raise UsageError(
            f"quantization: got {asserted!r}, but the checkpoint's weights are"
            f" {'not quantised' if found is None else found}"
        )


def sizes_of(model: Model, options: EngineOptions, backend: Backend) -> Sizes:
    shapes, tensors = cache_shapes(model.spec), model.source.tensors
    kept_in = cache_dtype(model, options)
    slots = slot_bytes(model.layout, tensors)
    return Sizes(
        process_bytes=resident_bytes() + copied_bytes(model.layout, tensors),
        slot_bytes=slots,
        num_parts=Counter(key.part for key in model.layout.parts),
        bytes_per_token=bytes_per_token(shapes, CACHE_DTYPES[kept_in]),
        kv_cache_dtype=kept_in,
        bytes_per_position=sum(
            2 * RopeTable(rope).bytes_per_position for rope in ropes(model.spec)
        ),
        row_buffer_bytes=row_buffer_bytes(_embedding(model)),
        state_bytes=state_bytes(shapes),
        backend=backend,
        weight_kinds=weight_kinds(model.layout, tensors),
    )


def _embedding(model: Model) -> TensorInfo:
    (key,) = model.layout.keys(Part.EMBED)
    return model.source.tensors[model.layout.parts[key][0].tensor]


def cache_dtype(model: Model, options: EngineOptions) -> str:
    """What keys and values are kept in: what the user said, or the type that weights have."""
    if options.kv_cache_dtype != "auto":
        return options.kv_cache_dtype
    stored = dtype_of(_embedding(model).dtype)
    return next(name for name, dtype in CACHE_DTYPES.items() if dtype is stored)


def wanted_of(options: EngineOptions, model: Model) -> Wanted:
    return Wanted(
        expert_slots=_expert_slots(options.moe_expert_cache_size, model),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        micro_batch_tokens=options.micro_batch_size,
        max_model_len=options.max_model_len,
        schedule=options.schedule,
        prefix_caching=options.enable_prefix_caching,
    )


def _expert_slots(text: str | None, model: Model) -> int | None:
    """Slots of "auto" (None), of a size, or of a number of experts per layer."""
    if text is None or text == "auto":
        return None
    if text.isdecimal():
        layers = sum(isinstance(block.ffn, Moe) for block in model.spec.blocks)
        return int(text) * layers
    per_slot = slot_bytes(model.layout, model.source.tensors)[Part.EXPERT]
    slots = parse_bytes(text, what="moe-expert-cache-size") // per_slot
    if slots < 1:
        raise UsageError(
            f"moe-expert-cache-size: got {text!r}, allowed auto, a number of experts per layer, or"
            f" a size of at least one expert ({per_slot} bytes)"
        )
    return slots


def useful_threads(model: Model) -> int:
    """Threads that pay: waking one costs about what multiplying a few hundred KiB of weights does,
    and much more where other work keeps the cores busy."""
    expert = model.layout.keys(Part.EXPERT)[0]
    pieces = model.layout.parts[expert]
    matrix = max(prod(p.packed.shape if p.packed else p.shape) for p in pieces)
    return max(1, min(_MACHINE_THREADS, matrix // _ELEMENTS_PER_THREAD))

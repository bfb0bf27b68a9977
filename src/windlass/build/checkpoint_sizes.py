"""What a checkpoint and the process weigh, and what the user fixed: from which a plan is made."""

import logging
from collections import Counter
from math import prod

import torch

from windlass.checkpoint.folder import CheckpointFolder
from windlass.checkpoint.part_reads import make_part_reads, slot_bytes
from windlass.checkpoint.placement import DeviceLayout
from windlass.checkpoint.views import copied_bytes, dtype_of
from windlass.checkpoint.weight_kinds import weight_kinds
from windlass.decoder.attention import kv_shape, value_width
from windlass.decoder.recurrent import state_shapes
from windlass.decoder.rope import bytes_per_position
from windlass.device.process_memory import resident_bytes
from windlass.device.processors import default_threads, quota_note
from windlass.engine.drafts import bytes_per_known_token
from windlass.errors import UsageError
from windlass.forecast.finemoe import FineMoeSettings
from windlass.forecast.interface import ExpertTable
from windlass.forecast.learned import forecast_bytes
from windlass.ids import Part
from windlass.kvcache.kv_cache import (
    CacheShape,
    PagedShape,
    StateShape,
    bytes_per_token,
    state_bytes,
)
from windlass.kvcache.staging import staged_bytes_per_token
from windlass.models.names import Layout, TensorInfo
from windlass.models.spec import Gqa, LongRopeScaling, Mla, ModelSpec, Moe, Recurrent
from windlass.options import (
    EngineOptions,
)
from windlass.perf.sizes import Backend, DeviceSizes, Sizes
from windlass.planner.constraints import PlanConstraints
from windlass.runtime.attention_ops import ropes
from windlass.schedule.passes import PassShape
from windlass.units import parse_bytes
from windlass.weights.row_reader import row_buffer_bytes

_logger = logging.getLogger(__name__)
_ELEMENTS_PER_THREAD = 1 << 17  # of an expert's largest matrix
CACHE_DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
    "int8": torch.int8,
}  # fmt: skip


def pass_shape(spec: ModelSpec, layout: Layout) -> PassShape:
    """What the schedule must know of a model."""
    return PassShape.of(spec, len(layout.keys(Part.HEAD)))


def cache_shapes(spec: ModelSpec) -> list[CacheShape | None]:
    """What each layer keeps of a sequence; None where it has no attention."""
    shapes: list[CacheShape | None] = []
    for block in spec.blocks:
        if block.attention is None:
            shapes.append(None)
            continue
        if isinstance(block.attention, Recurrent):
            shapes.append(StateShape(state_shapes(block.attention, spec.hidden_size)))
            continue
        shape = kv_shape(block.attention)
        assert shape is not None, "only recurrent attention has no growing cache"
        width = value_width(block.attention)
        shapes.append(PagedShape(shape[0], shape[1], width, value_in_key=shape[2] == 0))
    return shapes


def sizes_of(model: CheckpointFolder, options: EngineOptions, backend: Backend) -> Sizes:
    shapes, tensors = cache_shapes(model.spec), model.source.tensors
    kept_in = cache_dtype(model, options)
    guessed = options.speculative_config
    if guessed and state_bytes(shapes):
        raise UsageError(
            "speculative_config: got a model with recurrent layers, allowed others: a wrong guess"
            " would stay in their state"
        )
    slots = slot_bytes(model.layout, tensors)
    return Sizes(
        process_bytes=(
            resident_bytes()
            + copied_bytes(model.layout, tensors)
            + _maps_bytes(model.spec.trunk, options)
        ),
        slot_bytes=slots,
        num_parts=Counter(key.part for key in model.layout.parts),
        bytes_per_token=bytes_per_token(shapes, CACHE_DTYPES[kept_in]),
        staged_bytes_per_token=staged_bytes_per_token(shapes, CACHE_DTYPES[kept_in]),
        kv_cache_dtype=kept_in,
        bytes_per_position=sum(2 * bytes_per_position(rope) for rope in ropes(model.spec)),
        row_buffer_bytes=row_buffer_bytes(_embedding(model)),
        state_bytes=state_bytes(shapes),
        backend=backend,
        weight_kinds=weight_kinds(model.layout, tensors),
        forecast_bytes=_forecast_bytes(model.spec.trunk, options),
        drafts=guessed.num_speculative_tokens if guessed else 0,
        draft_bytes_per_token=bytes_per_known_token(guessed) if guessed else 0,
    )


def device_sizes(
    model: CheckpointFolder, *, budget_bytes: int, process_bytes: int, backend: str
) -> DeviceSizes:
    """Of a device that holds parts of `model`, as `DeviceSizes` names them."""
    tensors = model.source.tensors
    parts = ((key.part, make_part_reads(key, model.layout, tensors)) for key in model.layout.parts)
    return DeviceSizes(
        budget_bytes=budget_bytes,
        process_bytes=process_bytes,
        slot_bytes=DeviceLayout().slot_bytes(parts),
        backend=backend,
    )


def _maps_bytes(spec: ModelSpec, options: EngineOptions) -> int:
    """What the papers' systems hold of earlier passes: fp32, and once more while it is searched."""
    if options.expert_forecast not in ("finemoe", "moe-infinity"):
        return 0
    return 2 * 4 * FineMoeSettings().capacity * (len(ExpertTable.of(spec)) + spec.hidden_size)


def _forecast_bytes(spec: ModelSpec, options: EngineOptions) -> int:
    """What gates that foretell experts hold, where they are asked for."""
    if options.expert_forecast not in ("learned", "gate"):
        return 0
    return forecast_bytes(ExpertTable.of(spec), spec.hidden_size)


def _embedding(model: CheckpointFolder) -> TensorInfo:
    (key,) = model.layout.keys(Part.EMBED)
    return model.source.tensors[model.layout.parts[key][0].tensor]


def cache_dtype(model: CheckpointFolder, options: EngineOptions) -> str:
    """What keys and values are kept in: what the user said, or the type that weights have."""
    if options.kv_cache_dtype != "auto":
        return options.kv_cache_dtype
    stored = dtype_of(_embedding(model).dtype)
    return next(name for name, dtype in CACHE_DTYPES.items() if dtype is stored)


def wanted_of(options: EngineOptions, model: CheckpointFolder) -> PlanConstraints:
    return PlanConstraints(
        expert_slots=_expert_slots(options.moe_expert_cache_size, model),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        micro_batch_tokens=options.micro_batch_size,
        groups=options.batch_groups,
        kv_offloading_share=options.kv_offloading_share,
        max_model_len=options.max_model_len,
        schedule=options.schedule,
        burst_tokens=options.burst_tokens,
        prefix_caching=options.enable_prefix_caching,
    )


def _expert_slots(text: str | None, model: CheckpointFolder) -> int | None:
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


def useful_threads(model: CheckpointFolder) -> int:
    """Threads that pay: waking one costs about what multiplying a few hundred KiB of weights does,
    and much more where other work keeps the cores busy. Logs where a quota decides."""
    expert = model.layout.keys(Part.EXPERT)[0]
    pieces = model.layout.parts[expert]
    matrix = max(prod(p.packed.shape if p.packed else p.shape) for p in pieces)
    threads, useful = default_threads(), max(1, matrix // _ELEMENTS_PER_THREAD)
    if threads < useful and (note := quota_note()) is not None:
        _logger.warning(note)
    return min(threads, useful)


def long_rope_after(spec: ModelSpec) -> int | None:
    """Tokens up to which a sequence uses LongRoPE's short factors; None for other models."""
    for block in spec.blocks:
        rope = block.attention.rope if isinstance(block.attention, Gqa | Mla) else None
        if rope is not None and isinstance(rope.scaling, LongRopeScaling):
            return rope.scaling.original_max
    return None

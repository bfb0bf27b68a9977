"""The composition root: from options to a running engine. The only place that sees all layers."""

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
from windlass.device.base import Device
from windlass.device.cpu import CpuDevice
from windlass.device.host import (
    available_bytes,
    memory_limits,
    peak_resident_bytes,
    resident_bytes,
    return_freed_memory,
)
from windlass.engine.admission import Admission
from windlass.engine.engine import Engine, EngineSetup
from windlass.engine.tokenizer import Tokenizer
from windlass.engine.tokenizer import load as load_tokenizer
from windlass.errors import UsageError
from windlass.experts.forecast import UsageForecast
from windlass.experts.policies import FarthestNextUse
from windlass.ids import Part
from windlass.kernels.base import Kernels
from windlass.kernels.choose import choose_kernels
from windlass.memory.checkpoint import Checkpoint, WeightSource
from windlass.memory.kv import (
    CacheShape,
    KvStore,
    PagedShape,
    StateShape,
    bytes_per_token,
    state_bytes,
)
from windlass.memory.recipe import slot_bytes
from windlass.memory.rows import row_buffer_bytes
from windlass.memory.views import copied_bytes, dtype_of
from windlass.memory.weights import WeightStore
from windlass.options import EngineOptions, checkpoint_stamp, read_config, resolve_model
from windlass.params import SamplingParams
from windlass.plan import Plan
from windlass.planner.activations import Backend
from windlass.planner.budget import Sizes, Wanted, make_plan
from windlass.schedule.announce import Announcer, PassForecast
from windlass.schedule.batch import Batch
from windlass.schedule.embedding import EmbeddingRows
from windlass.schedule.on_device import DeviceRuntime, ropes
from windlass.schedule.passes import PassShape, run_pass
from windlass.schedule.runtime import Outcome
from windlass.spec.layout import build_layout
from windlass.spec.model import GatedDelta, Gqa, LongRopeScaling, Mla, ModelSpec, Moe
from windlass.spec.names import Layout, NameMap, TensorInfo
from windlass.spec.registry import read_spec
from windlass.synth import random_source
from windlass.trace import Tracer
from windlass.units import MIB, parse_bytes
from windlass.version import VERSION

_MACHINE_THREADS = torch.get_num_threads()  # before any engine of this process set its own
_ELEMENTS_PER_THREAD = 1 << 17  # of an expert's largest matrix
_CACHE_DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
    "int8": torch.int8,
}  # fmt: skip
_DEFAULT_SHARE = 0.8  # of the memory that is available, where no budget is given
# Left free below the limit of a memory cgroup: page tables and buffers of the kernel count too
_LIMIT_MARGIN = 32 * MIB


@dataclass(frozen=True, slots=True)
class _Model:
    """A checkpoint, understood but not loaded."""

    folder: Path
    config: dict[str, Any]
    spec: ModelSpec
    layout: Layout
    source: WeightSource


def open_engine(options: EngineOptions, *, device: Device | None = None) -> Engine:
    """Everything between options and the first step; nothing is read but headers and tokenizer.

    `device`: where weights go; the host if None. The engine closes it; so does a failure here.
    """
    return_freed_memory()
    with ExitStack() as opened:
        if device is not None:
            opened.callback(device.close)
        tracer = Tracer(options.trace)
        opened.callback(tracer.close)
        model = _read_model(options, opened)
        threads = options.threads or _useful_threads(model)
        kernels = choose_kernels(
            options.moe_backend, threads=threads, bf16_rows=options.dtype == "bfloat16"
        )
        kernels.linear(torch.zeros(4, 64), torch.zeros(64, 64))  # the BLAS allocates its buffers
        setup = _setup(options, model, Backend(kernels.name, threads))
        if device is None:
            device = CpuDevice(setup.plan.read_threads, tracer=tracer)
            opened.callback(device.close)
        engine = _assemble(setup, model, kernels, device, tracer, opened)
    return engine


def _useful_threads(model: _Model) -> int:
    """Threads that pay: waking one costs about what multiplying a few hundred KiB of weights does,
    and much more where other work keeps the cores busy."""
    expert = model.layout.keys(Part.EXPERT)[0]
    pieces = model.layout.parts[expert]
    matrix = max(prod(p.packed.shape if p.packed else p.shape) for p in pieces)
    return max(1, min(_MACHINE_THREADS, matrix // _ELEMENTS_PER_THREAD))


def _setup(options: EngineOptions, model: _Model, backend: Backend) -> EngineSetup:
    """The plan and all that requests need."""
    tokenizer_folder = resolve_model(options.tokenizer) if options.tokenizer else model.folder
    tokenizer = load_tokenizer(tokenizer_folder, model_folder=model.folder)
    wanted = _wanted(options, model)
    sizes = _sizes(model, options, backend)
    plan = make_plan(model.spec, sizes, options.host_memory or default_budget(), wanted)
    return EngineSetup(
        plan=plan,
        tokenizer=tokenizer,
        default_params=_default_params(model.folder, options),
        vocab_size=model.spec.vocab_size,
        max_model_len=plan.max_model_len,
        longest=options.max_model_len or model.spec.max_positions,
        seed=options.seed,
        fingerprint=_fingerprint(model, tokenizer, options, backend),
        peak_rss=peak_resident_bytes,
    )


def _assemble(
    setup: EngineSetup,
    model: _Model,
    kernels: Kernels,
    device: Device,
    tracer: Tracer,
    opened: ExitStack,
) -> Engine:
    """The engine, which takes over what `opened` holds. Nothing made here may hold the engine: one
    that is dropped must end by itself."""
    plan, spec = setup.plan, model.spec
    assert not (plan.prefix_caching and plan.state_slots), "no state is kept of a prompt's prefix"
    shape = pass_shape(spec, model.layout)
    forecast = PassForecast(_usage_forecast(spec))
    policy = FarthestNextUse(len(spec.blocks), probability=forecast.probability)
    weights = WeightStore(
        model.layout, model.source, device, _slots(plan), policy=policy, tracer=tracer
    )
    opened.callback(weights.close)
    kv = KvStore(
        cache_shapes(spec),
        dtype=_CACHE_DTYPES[plan.kv_cache_dtype],
        num_pages=plan.kv_pages,
        page_tokens=plan.page_tokens,
        state_slots=plan.state_slots,
    )
    num_experts = {
        i: b.ffn.num_experts for i, b in enumerate(spec.blocks) if isinstance(b.ffn, Moe)
    }
    runtime = DeviceRuntime(
        spec,
        kernels,
        weights,
        kv,
        embedding=EmbeddingRows(weights),
        announcer=Announcer(shape, num_experts, weights, forecast),
        forecast=forecast,
        tracer=tracer,
    )
    admission = Admission(
        kv,
        max_num_seqs=plan.max_num_seqs,
        max_rows=plan.max_num_batched_tokens,
        long_rope_after=_long_rope_after(spec),
        mixed_prefill_rows=plan.mixed_prefill_tokens,
    )

    def run(batch: Batch) -> Outcome:
        return run_pass(runtime, shape, batch)

    on_close = opened.pop_all().close
    return Engine(setup, run, weights, admission, tracer=tracer, on_close=on_close)


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


def _usage_forecast(spec: ModelSpec) -> UsageForecast:
    networks = [block.ffn for block in spec.blocks]
    top_k = max(ffn.top_k for ffn in networks if isinstance(ffn, Moe))
    return UsageForecast([f.num_experts if isinstance(f, Moe) else 0 for f in networks], top_k)


def _read_model(options: EngineOptions, opened: ExitStack) -> _Model:
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
    return _Model(folder, config, spec, build_layout(spec, names, source.tensors), source)


def _check_quantization(asserted: str | None, names: NameMap) -> None:
    found = None if names.quantization is None else names.quantization.method
    if asserted is not None and asserted != found:
        raise UsageError(
            f"quantization: got {asserted!r}, but the checkpoint's weights are"
            f" {'not quantised' if found is None else found}"
        )


def _sizes(model: _Model, options: EngineOptions, backend: Backend) -> Sizes:
    shapes, tensors = cache_shapes(model.spec), model.source.tensors
    cache_dtype = _cache_dtype(model, options)
    slots = slot_bytes(model.layout, tensors)
    return Sizes(
        process_bytes=resident_bytes() + copied_bytes(model.layout, tensors),
        slot_bytes=slots,
        num_parts=Counter(key.part for key in model.layout.parts),
        bytes_per_token=bytes_per_token(shapes, _CACHE_DTYPES[cache_dtype]),
        kv_cache_dtype=cache_dtype,
        bytes_per_position=sum(
            2 * RopeTable(rope).bytes_per_position for rope in ropes(model.spec)
        ),
        row_buffer_bytes=row_buffer_bytes(_embedding(model)),
        state_bytes=state_bytes(shapes),
        backend=backend,
    )


def _embedding(model: _Model) -> TensorInfo:
    (key,) = model.layout.keys(Part.EMBED)
    return model.source.tensors[model.layout.parts[key][0].tensor]


def _cache_dtype(model: _Model, options: EngineOptions) -> str:
    """What keys and values are kept in: what the user said, or the type that weights have."""
    if options.kv_cache_dtype != "auto":
        return options.kv_cache_dtype
    stored = dtype_of(_embedding(model).dtype)
    return next(name for name, dtype in _CACHE_DTYPES.items() if dtype is stored)


def _wanted(options: EngineOptions, model: _Model) -> Wanted:
    return Wanted(
        expert_slots=_expert_slots(options.moe_expert_cache_size, model),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        micro_batch_tokens=options.micro_batch_size,
        max_model_len=options.max_model_len,
        prefix_caching=options.enable_prefix_caching,
    )


def _expert_slots(text: str | None, model: _Model) -> int | None:
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


def _slots(plan: Plan) -> dict[Part, int]:
    return {
        Part.EXPERT: plan.expert_slots,
        Part.BLOCK: plan.block_slots,
        Part.FFN: plan.ffn_slots,
        Part.HEAD: plan.head_slots,
        Part.FINAL: 1,
        Part.EMBED: int(plan.resident_embedding),
    }


def default_budget() -> int:
    """Memory for the whole process where the user names none: below every limit on it."""
    budget = resident_bytes() + int(_DEFAULT_SHARE * available_bytes())
    return min([budget, *(group.limit - _LIMIT_MARGIN for group in memory_limits())])


def _default_params(folder: Path, options: EngineOptions) -> SamplingParams:
    path = folder / "generation_config.json"
    if options.generation_config == "vllm" or not path.exists():
        return SamplingParams()
    return SamplingParams.from_generation_config(read_config(folder, path.name))


def _long_rope_after(spec: ModelSpec) -> int | None:
    """Tokens up to which a sequence uses LongRoPE's short factors; None for other models."""
    for block in spec.blocks:
        rope = block.attention.rope if isinstance(block.attention, Gqa | Mla) else None
        if rope is not None and isinstance(rope.scaling, LongRopeScaling):
            return rope.scaling.original_max
    return None


def _fingerprint(
    model: _Model, tokenizer: Tokenizer, options: EngineOptions, backend: Backend
) -> dict[str, object]:
    """What would change results if it changed."""
    return {
        "model": checkpoint_stamp(model.folder),
        "load_format": options.load_format,
        "kernels": backend.name,
        "kv_cache_dtype": _cache_dtype(model, options),
        "tokenizer": tokenizer.digest,
        "generation_config": options.generation_config,
        "seed": options.seed,
        "max_model_len": options.max_model_len,
        "dtype": "bfloat16" if options.dtype == "bfloat16" else "float32",
        "version": VERSION,
    }

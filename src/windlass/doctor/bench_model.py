"""Weights to time kernels on, as a run has them: parts of a checkpoint read as a run reads them, or
of a configuration with random weights in every format. Knows no kernel."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from windlass.checkpoint.layout import build_layout, with_stored_head
from windlass.checkpoint.part_reads import make_part_reads
from windlass.checkpoint.reader import Checkpoint, WeightSource
from windlass.checkpoint.synthetic import preset, random_source
from windlass.checkpoint.views import make_views
from windlass.device.base import ALIGN_BYTES
from windlass.device.host_memory import HostAllocator
from windlass.ids import Part
from windlass.models.names import Layout
from windlass.models.registry import read_spec
from windlass.models.spec import ModelSpec, Moe
from windlass.options import read_config
from windlass.tensors import Packed, PackedStack, StoredTensors, Weight
from windlass.units import MIB

COLD_BYTES = 256 * MIB  # of parts used in turn: beyond the last-level caches that we know
_PRESET = "qwen3-30b-a3b"  # the shapes where no checkpoint is given
_TYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def weight_kind(weight: Weight) -> str:
    """How a matrix is stored, as the keys of hardware.profile.Processor have it."""
    if isinstance(weight, PackedStack):
        weight = weight.matrices[0]
    if isinstance(weight, Packed):
        return weight.format.kind
    return _TYPES[weight.dtype]


def _compressed(bits: int, group: int) -> dict[str, Any]:
    weights = dict(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group)
    group_0 = dict(targets=["Linear"], weights=weights, input_activations=None)
    return dict(
        quant_method="compressed-tensors", format="pack-quantized",
        config_groups=dict(group_0=group_0), ignore=["lm_head"], quantization_status="compressed",
    )  # fmt: skip


# kind -> quantization_config; "" for a plain type
_SETTINGS: Mapping[str, dict[str, Any]] = {
    "bfloat16": {}, "float16": {}, "float32": {},
    "fp8": dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic",
                weight_block_size=[128, 128]),
    "mxfp4": dict(quant_method="mxfp4"),
    "int8": _compressed(8, 128),
    "int4": _compressed(4, 128),
    "gptq": dict(quant_method="gptq", bits=4, group_size=128, sym=True, desc_act=False),
    "awq": dict(quant_method="awq", bits=4, group_size=128, zero_point=True, version="gemm"),
}  # fmt: skip
KINDS = tuple(_SETTINGS)


@dataclass(frozen=True, slots=True)
class BenchModel:
    """What can be read of one model."""

    spec: ModelSpec
    layout: Layout
    source: WeightSource

    @property
    def moe(self) -> Moe:
        return next(b.ffn for b in self.spec.blocks if isinstance(b.ffn, Moe))


def checkpoint_model(folder: Path) -> BenchModel:
    """Of a checkpoint with weights; the caller closes its source."""
    spec, names = read_spec(read_config(folder))
    source = Checkpoint(folder)
    try:
        spec = with_stored_head(spec, names, source.tensors)
        return BenchModel(spec, build_layout(spec, names, source.tensors), source)
    except BaseException:
        source.close()
        raise


def random_model(kind: str) -> BenchModel:
    """Two layers of usual shapes, random weights of `kind`, one of KINDS."""
    config = preset(_PRESET, num_layers=2)
    dtype = kind if kind in _TYPES.values() else "bfloat16"
    if settings := _SETTINGS[kind]:
        config = {**config, "quantization_config": settings}
    spec, names = read_spec(config)
    source = random_source(config, dtype=dtype)
    return BenchModel(spec, build_layout(spec, names, source.tensors), source)


def cold_parts(
    model: BenchModel, part: Part, *, fewest: int = 1, cold_bytes: int = COLD_BYTES
) -> list[StoredTensors]:
    """Parts of a kind in memory, `cold_bytes` or more in all and at least `fewest`; where the model
    has less, copies of them."""
    keys = model.layout.keys(part)
    part_reads = [make_part_reads(key, model.layout, model.source.tensors) for key in keys]
    slot = max(reads.num_bytes for reads in part_reads)
    count = max(fewest, -(-cold_bytes // slot))
    # in huge pages, as a run has them
    arena = HostAllocator().empty(count * slot + ALIGN_BYTES, dtype=torch.uint8)
    start = -arena.data_ptr() % ALIGN_BYTES
    made = []
    for i, reads in zip(range(count), cycle(part_reads), strict=False):
        memory = arena[start + i * slot : start + i * slot + reads.num_bytes]
        for read in reads.reads:
            into = memory[read.at : read.at + read.num_bytes].numpy().data
            model.source.read(read.file, read.offset, into)
        made.append(make_views(reads, memory).tensors)
    return made

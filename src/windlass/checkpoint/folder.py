"""A checkpoint folder, understood but not loaded: its description and its layout."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windlass.checkpoint.layout import build_layout
from windlass.checkpoint.reader import Checkpoint, WeightSource
from windlass.checkpoint.synthetic import random_source
from windlass.errors import UsageError
from windlass.models.names import Layout, NameMap
from windlass.models.registry import read_spec
from windlass.models.spec import ModelSpec
from windlass.options import (
    EngineOptions,
    read_config,
    resolve_model,
)


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """A checkpoint, understood but not loaded."""

    folder: Path
    config: dict[str, Any]
    spec: ModelSpec
    layout: Layout
    source: WeightSource


def read_model(options: EngineOptions, opened: ExitStack) -> CheckpointFolder:
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
    return CheckpointFolder(folder, config, spec, build_layout(spec, names, source.tensors), source)


def _check_quantization(asserted: str | None, names: NameMap) -> None:
    found = None if names.quantization is None else names.quantization.method
    if asserted is not None and asserted != found:
        raise UsageError(
            f"quantization: got {asserted!r}, but the checkpoint's weights are"
            f" {'not quantised' if found is None else found}"
        )

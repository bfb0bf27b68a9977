"""A checkpoint folder, understood but not loaded: its description and its layout."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windlass.checkpoint.layout import build_layout, with_stored_head
from windlass.checkpoint.reader import Checkpoint, WeightSource
from windlass.checkpoint.synthetic import random_source
from windlass.errors import ModelError, UsageError
from windlass.models.names import Layout, NameMap
from windlass.models.registry import read_description
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
    notes: tuple[str, ...] = ()  # settings and weights that nothing read and that may matter


_logger = logging.getLogger(__name__)


def read_model(options: EngineOptions, opened: ExitStack) -> CheckpointFolder:
    """The checkpoint that `options` name; `opened` closes its files. What might have been meant
    and is not read is logged (level WARNING), or raises ModelError where `options.strict`."""
    folder = resolve_model(options.model)
    config = read_config(folder)
    guessed = options.speculative_config
    drafts = guessed is not None and guessed.method == "mtp"
    description = read_description(config, drafts=drafts)
    spec, names = description.spec, description.names
    _check_quantization(options.quantization, names)
    source: WeightSource
    if options.load_format == "dummy":
        source = random_source(config, seed=options.seed, drafts=drafts)
    else:
        source = Checkpoint(folder, mode=options.load_mode)
    opened.callback(source.close)
    spec = with_stored_head(spec, names, source.tensors)
    _check_drafts(spec, source)
    layout = build_layout(spec, names, source.tensors)
    notes = (*description.notes, *layout.notes)
    for note in notes:
        if options.strict:
            raise ModelError(f"{note}; under strict nothing of the kind is allowed")
        _logger.warning(note)
    return CheckpointFolder(folder, config, spec, layout, source, notes)


def _check_drafts(spec: ModelSpec, source: WeightSource) -> None:
    layer = f"layers.{len(spec.blocks) - 1}."
    if spec.drafts and not any(layer in name for name in source.tensors):
        raise UsageError(
            "speculative_config: method: got 'mtp', allowed ngram for these files: they have no"
            f" tensor of {layer.removesuffix('.')}, the layer for multi-token prediction that"
            " config.json names"
        )


def _check_quantization(asserted: str | None, names: NameMap) -> None:
    found = None if names.quantization is None else names.quantization.method
    if asserted is not None and asserted != found:
        raise UsageError(
            f"quantization: got {asserted!r}, but the checkpoint's weights are"
            f" {'not quantised' if found is None else found}"
        )

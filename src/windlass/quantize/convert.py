"""`windlass quantize` as one call: what is checked before anything is written, the folder, the
tensors, and what makes it a checkpoint."""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windlass.checkpoint.layout import build_layout, with_stored_head
from windlass.checkpoint.reader import Checkpoint
from windlass.checkpoint.safetensors import INDEX_FILE
from windlass.device.processors import default_threads, quota_note
from windlass.errors import UsageError
from windlass.formats import HF_QUANT_FILE
from windlass.models.registry import read_description
from windlass.options import checkpoint_stamp, read_config, resolve_model
from windlass.quantize.output_folder import STATE_FILE, Folder, Record, prepare
from windlass.quantize.scheme import IntegerScheme, quantization_config
from windlass.quantize.shards import SHARD_BYTES, TensorPlaces, place
from windlass.quantize.targets import Target, choose_targets, ignored_modules, misfits
from windlass.quantize.writer import write_targets
from windlass.units import MIB, counted

# Of what `rounding.py` computes: another number and a folder of an earlier version is not gone on
# with, so that no checkpoint is half of each.
_METHOD = 1
# Of the source's files, what belongs to the model but for weights
_COPIED = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".py", ".md", ""}
_LARGEST_COPIED = 256 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What to make of which checkpoint, and where. `threads`: None for one per core."""

    model: str
    out: Path
    scheme: IntegerScheme
    experts_only: bool = False
    threads: int | None = None
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A finished checkpoint. `source_bytes`, `seconds`: of this run alone."""

    records: tuple[Record, ...]
    bytes_before: int
    bytes_after: int
    source_bytes: int
    seconds: float
    num_resumed: int  # targets of earlier runs
    was_finished: bool


@dataclass(frozen=True, slots=True)
class Step:
    """Where a run stands, in bytes of the source."""

    done: int
    total: int


def quantize(
    options: QuantizeOptions,
    *,
    say: Callable[[str], None],
    on_step: Callable[[Step], None] = lambda step: None,
) -> Quantized:
    """Writes the checkpoint, or what is left of it. Nothing is written unless all of it can be:
    UsageError, ModelError and CheckpointError come before the first byte, but for an unreadable or
    infinite weight."""
    folder = resolve_model(options.model)
    if options.out.exists() and options.out.samefile(folder):
        raise UsageError(f"out: got the model's own folder {options.out}, allowed another")
    config = read_config(folder)
    _refuse_quantized(config)
    description = read_description(config)
    spec, names = description.spec, description.names
    begin = time.monotonic()
    with closing(Checkpoint(folder)) as source:
        spec = with_stored_head(spec, names, source.tensors)
        layout = build_layout(spec, names, source.tensors)
        for note in (*description.notes, *layout.notes):
            say(note)
        targets = choose_targets(
            (spec, names, layout),
            source.tensors,
            options.scheme,
            experts_only=options.experts_only,
        )
        places = place(targets, options.scheme, shard_bytes=options.shard_bytes)
        if options.threads is None and (line := quota_note()) is not None:
            say(line)
        misfit = misfits(targets, options.scheme)
        if misfit is not None:
            say(f"some experts stay as they are, which vLLM does not load: {misfit}")
        prepare(options.out, _identity(options, folder), places)
        sizes = [target.source.end - target.source.begin for target in targets]
        with Folder(options.out, places, [target.name for target in targets]) as out:
            resumed, was_finished = len(out.records), out.is_finished
            done = before = sum(sizes[:resumed])
            if not was_finished:
                if resumed:
                    say(f"going on: {resumed} of {counted(len(targets), 'tensor')} finished")

                def on_bytes(count: int) -> None:
                    nonlocal done
                    done += count
                    on_step(Step(done, sum(sizes)))

                write_targets(
                    source,
                    out,
                    (targets, places, options.scheme),
                    threads=options.threads or default_threads(),
                    on_bytes=on_bytes,
                )
                ignored = ignored_modules(targets, layout)
                out.complete(
                    _documents(config, options.scheme, ignored, targets, places),
                    _companions(folder),
                )
    return Quantized(
        records=tuple(out.records),
        bytes_before=sum(sizes),
        bytes_after=places.num_bytes,
        source_bytes=done - before,
        seconds=time.monotonic() - begin,
        num_resumed=resumed,
        was_finished=was_finished,
    )


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    for part in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config", HF_QUANT_FILE):
            found = part.get(key) if isinstance(part, Mapping) else None
            if found:
                method = found.get("quant_method") if isinstance(found, Mapping) else None
                raise UsageError(
                    f"model: is quantised already ({method or key}), allowed bf16, fp16 and fp32"
                    " weights"
                )


def _identity(options: QuantizeOptions, folder: Path) -> dict[str, Any]:
    """What the bytes of the result depend on."""
    return {
        "model": checkpoint_stamp(folder),
        "format": f"int{options.scheme.bits}",
        "group": options.scheme.group or None,
        "experts_only": options.experts_only,
        "shard_bytes": options.shard_bytes,
        "method": _METHOD,
    }


def _documents(
    config: Mapping[str, Any],
    scheme: IntegerScheme,
    ignored: list[str],
    targets: list[Target],
    places: TensorPlaces,
) -> dict[str, Any]:
    infos = [info for tensors in places.tensors for info in tensors]
    index = {
        "metadata": {"total_size": sum(info.end - info.begin for info in infos)},
        "weight_map": {info.name: info.file for info in infos},
    }
    documents = {
        "config.json": {**config, "quantization_config": quantization_config(scheme, ignored)}
    }
    return documents if len(places.shards) == 1 else {INDEX_FILE: index, **documents}


def _companions(folder: Path) -> list[Path]:
    """Tokenizer, templates, generation defaults and texts of the source."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix in _COPIED
        and path.name not in ("config.json", INDEX_FILE, STATE_FILE)
        and path.stat().st_size <= _LARGEST_COPIED
    ]

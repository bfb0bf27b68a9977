"""Headers of safetensors files: which tensor lies where. Reads a few kilobytes per file and checks
everything a header can get wrong; knows no model and needs no torch."""

import json
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from windlass.errors import CheckpointError
from windlass.models.names import TensorInfo

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The format's own limit; a larger number means that the file is something else.
_MAX_HEADER_BYTES = 100_000_000

# Of all types that the format has
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of the checkpoint in `folder` by name; `TensorInfo.file` is relative to it.

    One `model.safetensors`, or the shards that `model.safetensors.index.json` names. What is in a
    shard, its own header says; of a tensor in two of them the index decides. Raises CheckpointError
    at the first thing that is wrong.
    """
    if (folder / SINGLE_FILE).exists():
        return _read_file(folder, SINGLE_FILE)
    if not (folder / INDEX_FILE).exists():
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: expected a folder with a checkpoint, found none")
        raise CheckpointError(
            f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither"
            " (only safetensors checkpoints are read)"
        )
    weight_map = _read_index(folder)
    absent = sorted(f for f in set(weight_map.values()) if not (folder / f).exists())
    if absent:
        name = next(name for name, file in weight_map.items() if file == absent[0])
        raise CheckpointError(
            f"{folder / absent[0]}: expected by {INDEX_FILE} (tensor {name}), found no such file"
            + (f"; {len(absent)} files are absent" if len(absent) > 1 else "")
        )
    found: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        for name, info in _read_file(folder, file).items():
            if name in found and weight_map.get(name) not in (found[name].file, file):
                raise CheckpointError(
                    f"{folder / file}: tensor {name}: expected once, found in"
                    f" {found[name].file} too ({INDEX_FILE} does not say which counts)"
                )
            if name not in found or weight_map[name] == file:
                found[name] = info
    return found


def encode_header(tensors: Sequence[TensorInfo]) -> bytes:
    """The beginning of a file that holds `tensors`, whose `begin` and `end` count from where the
    data begin, which is a multiple of 8."""
    entries: dict[str, Any] = {
        info.name: {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.begin, info.end],
        }
        for info in tensors
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10, and the tensors of an expert side by side."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def shard_name(index: int, count: int) -> str:
    """Of the `index`th of `count` weight files, as the hub calls them."""
    return SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_FILE
    document = _parse(path, path.read_bytes())
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: expected a weight_map of tensor names, found {weight_map!r}"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(
                f"{path}: tensor {name}: expected the name of a file in this folder, found {file!r}"
            )
    return weight_map


def _read_file(folder: Path, file: str) -> dict[str, TensorInfo]:
    path = folder / file
    try:
        with path.open("rb") as stream:
            file_bytes = stream.seek(0, 2)
            stream.seek(0)
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(
                    f"{path}: expected a safetensors file, found {file_bytes} bytes"
                )
            (header_bytes,) = struct.unpack("<Q", prefix)
            limit = min(_MAX_HEADER_BYTES, file_bytes - 8)
            if header_bytes > limit:
                raise CheckpointError(
                    f"{path}: expected a header of at most {limit} bytes, found a length of"
                    f" {header_bytes} (not a safetensors file, or truncated)"
                )
            text = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    document = _parse(path, text)
    document.pop("__metadata__", None)
    infos = [_entry(path, file, name, entry, 8 + header_bytes) for name, entry in document.items()]
    _check_ranges(path, infos, file_bytes)
    return {info.name: info for info in infos}


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: expected every name once, found {twice} twice")
        return result

    try:
        document = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found {bytes(text[:40])!r}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, file: str, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {entry!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{where}: expected a dtype of {', '.join(DTYPE_BITS)}, found {dtype!r}"
        )
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise CheckpointError(f"{where}: expected a shape, found {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(f"{where}: expected data_offsets [begin, end], found {offsets!r}")
    begin, end = offsets
    if (end - begin) * 8 != prod(shape) * DTYPE_BITS[dtype]:
        raise CheckpointError(
            f"{where}: expected {prod(shape) * DTYPE_BITS[dtype] // 8} bytes for {dtype} {shape},"
            f" found data_offsets {offsets} ({end - begin} bytes)"
        )
    return TensorInfo(name, file, dtype, tuple(shape), data_start + begin, data_start + end)


def _check_ranges(path: Path, infos: list[TensorInfo], file_bytes: int) -> None:
    before: TensorInfo | None = None
    for info in sorted(infos, key=lambda info: (info.begin, info.end)):
        if info.end > file_bytes:
            raise CheckpointError(
                f"{path}: tensor {info.name}: expected bytes {info.begin} to {info.end}, found the"
                f" end of the file at {file_bytes} (truncated)"
            )
        if before is not None and info.begin < before.end and info.begin < info.end:
            raise CheckpointError(
                f"{path}: tensor {info.name}: expected to begin after {before.name} at"
                f" {before.end}, found to begin at {info.begin} (overlap)"
            )
        if info.end > info.begin:
            before = info

"""Gives the experts of a trained checkpoint their real size: intermediate rows of zeros are added,
so that it computes the same function from megabytes an expert, and routes as it was trained to.

    python bench/forecast_models.py MODEL OUT [--expert-bytes 2MiB]

Of checkpoints that hold one tensor per expert and projection (Qwen3-MoE's names, plain types), as
the demo model and what `demo/larger.py` trains. Writes one file of weights per layer.
"""

import argparse
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from windlass.errors import UsageError
from windlass.options import read_config, resolve_model
from windlass.units import MIB, format_bytes, parse_bytes

_EXPERT = re.compile(r"\.experts\.\d+\.(gate|up|down)_proj\.weight$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_INDEX = "model.safetensors.index.json"


def padded_size(config: dict, expert_bytes: int, element_bytes: int) -> int:
    """Rows of gate and up so that an expert has about `expert_bytes`, a multiple of 64 that holds
    all it has."""
    own, step = config["moe_intermediate_size"], 64
    rows = round(expert_bytes / (3 * config["hidden_size"] * element_bytes * step)) * step
    if rows < own:
        has = 3 * own * config["hidden_size"] * element_bytes
        raise UsageError(
            f"expert-bytes: got {format_bytes(expert_bytes)}, allowed at least the"
            f" {format_bytes(has)} that an expert has"
        )
    return rows


def padded(name: str, tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The tensor with `rows` intermediate rows, if it is one of an expert."""
    found = _EXPERT.search(name)
    if found is None:
        return tensor
    missing = rows - tensor.shape[1 if found[1] == "down" else 0]
    # the last dimension first: columns of down, rows of gate and up
    pad = (0, missing) if found[1] == "down" else (0, 0, 0, missing)
    return torch.nn.functional.pad(tensor, pad)


def pad_checkpoint(model: Path, out: Path, expert_bytes: int) -> int:
    """Writes the padded checkpoint; its intermediate size. UsageError for one of another layout."""
    config = read_config(model)
    files: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    element_bytes = 0
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():
                layer = _LAYER.search(name)
                files[f"model-{layer[1]:0>3}" if layer else "model-rest"].append((path, name))
                if not element_bytes and _EXPERT.search(name):
                    element_bytes = stored.get_tensor(name).element_size()
    if not element_bytes:
        raise UsageError(f"model: {model} has no tensor named {_EXPERT.pattern}")
    rows = padded_size(config, expert_bytes, element_bytes)
    out.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for file, places in files.items():
        path = out / f"{file}.safetensors"
        save_file(_read(places, rows), path, metadata={"format": "pt"})
        path.chmod(0o644)
        index |= {name: f"{file}.safetensors" for _, name in places}
    (out / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1) + "\n")
    for path in model.glob("*.json"):
        if path.name != _INDEX:
            shutil.copyfile(path, out / path.name)
    config["moe_intermediate_size"] = rows
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return rows


def _read(places: Iterable[tuple[Path, str]], rows: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for path, name in places:
        with safe_open(path, framework="pt") as stored:
            tensors[name] = padded(name, stored.get_tensor(name), rows)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a checkpoint folder, or demo")
    parser.add_argument("out", type=Path)
    parser.add_argument("--expert-bytes", default="2MiB", metavar="SIZE")
    args = parser.parse_args()
    try:
        size = parse_bytes(args.expert_bytes, what="expert-bytes")
        rows = pad_checkpoint(resolve_model(args.model), args.out, size)
    except UsageError as error:
        raise SystemExit(f"forecast_models: {error}") from None
    total = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    print(f"{args.out}: {rows} intermediate rows, {total / MIB:.0f} MiB of weights")


if __name__ == "__main__":
    main()

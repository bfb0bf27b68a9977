"""Checkpoints of integers, read as a program without integers would have them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def unpacked(packed: torch.Tensor, bits: int, shape: tuple[int, int]) -> torch.Tensor:
    """By the format's description: code i of a row is in word i // per_word, from bit
    (i % per_word) * bits on, plus half of the range."""
    per_word = 32 // bits
    codes = torch.empty(shape, dtype=torch.int64)
    for i in range(shape[1]):
        word = packed[:, i // per_word].to(torch.int64) & 0xFFFFFFFF
        codes[:, i] = (word >> (i % per_word * bits)) & (2**bits - 1)
    return codes - 2 ** (bits - 1)


def dequantised(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor as a program without integers would have it, in fp32."""
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]["weights"]
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        stored |= load_file(path)
    result = {}
    for name, tensor in stored.items():
        if name.endswith(".weight_packed"):
            module = name.removesuffix("_packed")
            rows, width = stored[f"{module}_shape"].tolist()
            values = unpacked(tensor, group["num_bits"], (rows, width)).float()
            scales = stored[f"{module}_scale"].float()
            blocks = width // group["group_size"] if group["strategy"] == "group" else 1
            assert scales.shape == (rows, blocks)
            grouped = values.view(rows, blocks, -1) * scales[:, :, None]
            result[module] = grouped.view(rows, width)
        elif not name.endswith(("weight_scale", "weight_shape")):
            result[name] = tensor
    return result

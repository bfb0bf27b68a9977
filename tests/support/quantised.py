"""Tiny random checkpoints in every quantised format, and their dequantised twins for transformers.

Quantisers are written from the formats' descriptions, element by element, and share no code with
what they test. Each takes a matrix (N, K) in fp32 and gives its tensors by the ending of their
names, and the matrix that they mean.

How the packing was checked against the formats' own programs: see `test_formats.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from delta_model import DELTA_CASES, make_delta_checkpoint
from engines import write_tokenizer
from families import make_checkpoint

Tensors = dict[str, torch.Tensor]
Quantiser = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def _words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """(a, b) small numbers -> int32 (ceil(a * bits / 32), b): consecutive rows in one word, the
    first in its lowest bits."""
    per_word = 32 // bits
    words = np.zeros((-(-codes.shape[0] // per_word), codes.shape[1]), dtype=np.uint32)
    for i, row in enumerate(codes.astype(np.uint32)):
        words[i // per_word] |= row << np.uint32(bits * (i % per_word))
    return torch.from_numpy(words.view(np.int32))


def _awq_words(codes: np.ndarray) -> torch.Tensor:
    """(a, b) nibbles -> int32 (a, b / 8), columns of a word in AWQ's order."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
    for word in range(words.shape[1]):
        for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            value = codes[:, 8 * word + column].astype(np.uint32)
            words[:, word] |= value << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32))


def _grid(w: torch.Tensor, groups: torch.Tensor, *, bits: int, is_symmetric: bool, dtype: Any):
    """Codes (N, K) of 0 to 2^bits - 1, scales and zero points (N, groups), and what they mean."""
    num, top = int(groups.max()) + 1, 2**bits - 1
    scales = torch.empty(w.shape[0], num)
    zeros = torch.full((w.shape[0], num), 2 ** (bits - 1))
    for g in range(num):
        part = w[:, groups == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if is_symmetric:
            scales[:, g] = part.abs().amax(1) / (2 ** (bits - 1) - 1)
        else:
            scales[:, g] = (high - low) / top
            zeros[:, g] = (-low / scales[:, g]).round().clamp(1, top).int()
    scales = scales.to(dtype).float()
    scale, zero = scales[:, groups], zeros[:, groups]
    codes = (w / scale + zero).round().clamp(0, top)
    return codes.numpy(), scales.to(dtype), zeros.numpy(), (codes - zero) * scale


def _groups(w: torch.Tensor, size: int, *, is_shuffled: bool = False) -> torch.Tensor:
    """Group of each column; all of one where `size` is -1."""
    columns = torch.arange(w.shape[1])
    groups = columns // size if size > 0 else torch.zeros_like(columns)
    if is_shuffled:
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(5))]
    return groups


def fp8_block(scale_dtype: torch.dtype = torch.float32, ending: str = ".weight_scale_inv"):
    """e4m3 and one scale for each 128 x 128 block, ragged at the edges."""

    def quantise(w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, meant = torch.empty_like(w, dtype=torch.float8_e4m3fn), torch.empty_like(w)
        blocks = [-(-size // 128) for size in w.shape]
        scales = torch.empty(blocks, dtype=scale_dtype)
        for i in range(blocks[0]):
            for j in range(blocks[1]):
                part = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                scales[i, j] = w[part].abs().max() / 448
                codes[part] = (w[part] / scales[i, j].float()).to(torch.float8_e4m3fn)
                meant[part] = codes[part].float() * scales[i, j].float()
        return {".weight": codes, ending: scales}, meant

    return quantise


def fp8_rows(w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """e4m3 and one bf16 scale for each row."""
    scales = (w.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (w / scales.float()).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scales}, codes.float() * scales.float()


def fp8_tensor(w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """e4m3, one scale, and the scale of activations that nobody needs."""
    scale = (w.abs().max() / 448).reshape(1)
    codes = (w / scale).to(torch.float8_e4m3fn)
    tensors = {".weight": codes, ".weight_scale": scale, ".input_scale": torch.ones(1)}
    return tensors, codes.float() * scale


def fp8_scalar(w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """The same as transformers calls it, and without a dimension."""
    found, meant = fp8_tensor(w)
    return {
        ".weight": found[".weight"],
        ".weight_scale_inv": found[".weight_scale"].reshape(()),
        ".activation_scale": torch.tensor(1.0),
    }, meant


def compressed(bits: int, size: int, *, is_symmetric: bool = True, is_shuffled: bool = False):
    """compressed-tensors' pack-quantized: signed integers plus 2^(bits - 1), along a row."""

    def quantise(w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = _groups(w, size, is_shuffled=is_shuffled)
        codes, scales, zeros, meant = _grid(
            w, groups, bits=bits, is_symmetric=is_symmetric, dtype=torch.bfloat16
        )
        tensors = {
            ".weight_packed": _words(codes.T, bits).T.contiguous(),
            ".weight_scale": scales,
            ".weight_shape": torch.tensor(w.shape),
        }
        if not is_symmetric:
            tensors[".weight_zero_point"] = _words(zeros, bits)
        if is_shuffled:
            tensors[".weight_g_idx"] = groups.int()
        return tensors, meant

    return quantise


def gptq(
    bits: int,
    size: int,
    *,
    is_shuffled: bool = False,
    is_symmetric: bool = False,
    stored_less: int = 1,
    has_bias: bool = False,
):
    """GPTQ: words along the inputs, zero points stored less one (`gptq`) or as they are. With
    `has_bias` also a bias of zeros, as AutoGPTQ once wrote."""

    def quantise(w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = _groups(w, size, is_shuffled=is_shuffled)
        codes, scales, zeros, meant = _grid(
            w, groups, bits=bits, is_symmetric=is_symmetric, dtype=torch.float16
        )
        tensors = {
            ".qweight": _words(codes.T, bits),
            ".qzeros": _words(zeros - stored_less, bits).T.contiguous(),
            ".scales": scales.T.contiguous(),
            ".g_idx": groups.int(),
        }
        if has_bias:
            tensors[".bias"] = torch.zeros(w.shape[0], dtype=torch.float16)
        return tensors, meant

    return quantise


def awq(size: int):
    """AWQ gemm: words along the outputs, in AWQ's order."""

    def quantise(w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, scales, zeros, meant = _grid(
            w, _groups(w, size), bits=4, is_symmetric=False, dtype=torch.float16
        )
        return {
            ".qweight": _awq_words(codes.T),
            ".qzeros": _awq_words(zeros.T),
            ".scales": scales.T.contiguous(),
        }, meant

    return quantise


def mxfp4(w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """e2m1 with a power of two for each 32 columns (OCP MX): 16 bytes a block."""
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    blocks = w.unflatten(1, (-1, 32))
    exponents = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
    scaled = blocks / torch.exp2(exponents)[..., None]
    codes = (scaled.abs()[..., None] - table).abs().argmin(-1)
    meant = table[codes] * scaled.sign() * torch.exp2(exponents)[..., None]
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    scales = (exponents + 127).to(torch.uint8)
    return {"_blocks": packed, "_scales": scales}, meant.flatten(1)


def make_quantised(
    family: str,
    quantiser: Quantiser,
    settings: dict[str, Any],
    path: Path,
    *,
    everything: bool = False,
    **changes: Any,
) -> torch.nn.Module:
    """A checkpoint of `family` in `path` whose linear modules are quantised, but for routers and
    the head unless `everything` is; returns transformers' model of the weights that it means.

    `settings` become config.json's quantization_config.
    """
    make = make_delta_checkpoint if family in DELTA_CASES else make_checkpoint
    make(family, path, **changes)
    tensors = load_file(path / "model.safetensors")
    twin = path / "twin"
    twin.mkdir()
    stored: Tensors = {}
    for name in list(tensors):
        if family == "gpt_oss" and name.endswith(("gate_up_proj", "down_proj")):
            parts = [quantiser(w.T) for w in tensors[name]]  # stored (inputs, outputs) when dense
            for ending in parts[0][0]:
                stored[name + ending] = torch.stack([part[0][ending] for part in parts])
            tensors[name] = torch.stack([part[1].T for part in parts])
        elif family != "gpt_oss" and _is_linear(name, everything=everything):
            found, tensors[name] = quantiser(tensors[name])
            module = name.removesuffix(".weight")
            own = {module + ending: tensor for ending, tensor in found.items()}
            stored |= {
                key: tensor for key, tensor in own.items() if key not in tensors or key == name
            }
        else:
            stored[name] = tensors[name]
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, twin / "model.safetensors", metadata={"format": "pt"})
    (twin / "config.json").write_text((path / "config.json").read_text())
    save_file({name: tensor.contiguous() for name, tensor in stored.items()},
              path / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    write_settings(path, settings)
    write_tokenizer(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        twin, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def write_settings(path: Path, settings: dict[str, Any] | None) -> None:
    """Sets quantization_config in config.json."""
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = settings
    (path / "config.json").write_text(json.dumps(config))


def _is_linear(name: str, *, everything: bool) -> bool:
    if not name.endswith(".weight"):
        return False
    module = name.split(".")[-2]
    if module in ("gate", "shared_expert_gate", "lm_head"):
        return everything
    others = ("w1", "w2", "w3", "kv_a_proj_with_mqa", "in_proj_qkvz", "in_proj_ba")
    return module.endswith("_proj") or module in others

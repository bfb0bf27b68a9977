"""Random checkpoints of a given configuration, for benchmarks at real shapes: on disk in the hub's
layout, or read from nowhere. The same configuration and seed give the same bytes either way."""

import json
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import log2, prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from windlass.checkpoint.layout import ITEM_BYTES, Expected, expected_stored
from windlass.checkpoint.safetensors import INDEX_FILE, encode_header, natural_key, shard_name
from windlass.errors import UsageError
from windlass.models.names import TensorInfo
from windlass.models.registry import read_description
from windlass.models.spec import ModelSpec, RmsNorm
from windlass.units import GIB, MIB, format_bytes

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "qwen3-moe-1b": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 32000,
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 3072,
        "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "vocab_size": 50304,
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 1024, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "max_position_embeddings": 4096,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "clip_qkv": None,
        "attention_bias": False, "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936,
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
    },
}  # fmt: skip

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_BY_NAME = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Standard deviation of all codes of a format, each as likely as the others
_CODE_STD = {"int4": 4.6, "int8": 74.0, "e2m1": 2.9, "e4m3": 100.0}

# Elements of the one random block that all tensors repeat, each from its own place. A prime, so
# that no power of two divides it and the rows of a matrix differ.
_BLOCK = 1_048_573
_SPARE_DISK = 64 * MIB  # left free beside the checkpoint

_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PAD_ID, _EOS_ID = 256, 258
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def preset(name: str, *, num_layers: int | None = None) -> dict[str, Any]:
    """A configuration of PRESETS, with fewer or more layers if asked. Raises UsageError."""
    if name not in PRESETS:
        raise UsageError(f"preset: got {name!r}, allowed {', '.join(PRESETS)}")
    if num_layers is not None and num_layers < 1:
        raise UsageError(f"num-layers: got {num_layers}, allowed a positive integer")
    config = dict(PRESETS[name])
    return config if num_layers is None else config | {"num_hidden_layers": num_layers}


def write_random_checkpoint(
    config: Mapping[str, Any],
    out: Path,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    shard_bytes: int = 4 * GIB,
    tokenizer: bool = True,
) -> int:
    """Writes shards, index, configurations and a byte-level tokenizer into the new or empty folder
    `out`; returns the bytes of the weights.

    Needs a few megabytes of memory whatever the size. Raises UsageError where the folder is not
    empty or the disk too full, and ModelError for a configuration that Windlass does not run.
    """
    weights = _Weights(config, dtype=dtype, seed=seed, shard_bytes=shard_bytes)
    if tokenizer and weights.spec.vocab_size <= _EOS_ID:
        raise UsageError(
            f"vocab_size: got {weights.spec.vocab_size}, allowed at least {_EOS_ID + 1} "
            "for bytes and special tokens"
        )
    _prepare(out, weights.num_bytes)
    for shard in weights.shards:
        with (out / shard.file).open("wb") as stream:
            stream.write(shard.header)
            for info in shard.tensors:
                for piece in weights.pieces(info, 0, info.end - info.begin):
                    stream.write(piece)
    if len(weights.shards) > 1:
        _write_json(out / INDEX_FILE, _index(weights))
    # last, so that an interrupted folder is not taken for a checkpoint
    _write_settings(config, out, weights.spec if tokenizer else None, dtype)
    return weights.num_bytes


def write_settings(config: Mapping[str, Any], out: Path, *, dtype: str = "bfloat16") -> None:
    """The same without weights, which load_format "dummy" does without."""
    spec = read_description(config).spec
    _prepare(out, 0)
    _write_settings(config, out, spec, dtype)


def _write_settings(
    config: Mapping[str, Any], out: Path, tokenized: ModelSpec | None, dtype: str
) -> None:
    """Configurations, and a tokenizer for the vocabulary of `tokenized`."""
    special = {}
    if tokenized is not None:
        _write_tokenizer(out, tokenized)
        special = {"eos_token_id": _EOS_ID, "pad_token_id": _PAD_ID}
    _write_json(out / "generation_config.json", {"do_sample": False, **special})
    _write_json(out / "config.json", {**config, **special, "dtype": dtype, "torch_dtype": dtype})


def random_source(
    config: Mapping[str, Any], *, dtype: str = "bfloat16", seed: int = 0, drafts: bool = False
) -> "RandomSource":
    """Weights of `write_random_checkpoint` without files, to run a configuration alone. `drafts`:
    with the layer that drafts."""
    weights = _Weights(config, dtype=dtype, seed=seed, shard_bytes=4 * GIB, drafts=drafts)
    return RandomSource(weights)


class RandomSource:
    """A `WeightSource` whose tensors are computed as they are read. Holds no files; thread-safe."""

    def __init__(self, weights: "_Weights") -> None:
        self._weights = weights
        self._shards = {shard.file: shard for shard in weights.shards}
        self._begins = {s.file: [info.begin for info in s.tensors] for s in weights.shards}
        self.tensors: Mapping[str, TensorInfo] = {
            info.name: info for shard in weights.shards for info in shard.tensors
        }

    def read(self, file: str, offset: int, into: memoryview) -> None:
        """Fills `into` with the bytes that the file would have there, but for its header."""
        end = offset + len(into)
        tensors = self._shards[file].tensors
        first = max(0, bisect_right(self._begins[file], offset) - 1)
        for info in tensors[first:]:
            if info.begin >= end:
                break
            start, stop = max(info.begin, offset), min(info.end, end)
            at = start - offset
            for piece in self._weights.pieces(info, start - info.begin, stop - info.begin):
                into[at : at + len(piece)] = piece
                at += len(piece)

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class _Shard:
    file: str
    header: bytes
    tensors: tuple[TensorInfo, ...]  # begin and end in the file


class _Weights:
    """Where each tensor lies, and its bytes."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        dtype: str,
        seed: int,
        shard_bytes: int,
        drafts: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"dtype: got {dtype!r}, allowed {', '.join(DTYPES)}")
        described = read_description(config, drafts=drafts)
        self.spec, names = described.spec, described.names
        self._seed = seed
        expected = expected_stored(self.spec, names)
        types = {
            name: one.stored.dtypes[0] if one.stored else DTYPES[dtype]
            for name, one in expected.items()
        }
        shapes = {name: one.shape for name, one in expected.items()}
        self.shards = _place(shapes, types, shard_bytes)
        self.num_bytes = sum(s.tensors[-1].end for s in self.shards)
        self._values = {
            name: _packed_values(one) if one.stored else _mean_and_std(self.spec, name, one.shape)
            for name, one in expected.items()
        }
        normal = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed))
        self._blocks = {
            values: _block(values, normal, _TORCH[dtype]) for values in set(self._values.values())
        }

    def pieces(self, info: TensorInfo, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes `start:stop` of a tensor, in parts."""
        values = self._values[info.name]
        block = self._blocks[values]
        first = 0
        if not isinstance(values, bytes):
            first = zlib.crc32(f"{self._seed}:{info.name}".encode()) % _BLOCK
            first *= len(block) // _BLOCK
        while start < stop:
            at = (first + start) % len(block)
            piece = block[at : at + stop - start]
            yield piece
            start += len(piece)


class _Normal(NamedTuple):
    """Random numbers of a plain tensor."""

    mean: float
    std: float


class _AnyCode(NamedTuple):
    """Random codes of a packed matrix; fp8 has two that are no numbers."""

    has_nan: bool


_Values = _Normal | _AnyCode | bytes  # bytes are repeated


def _block(values: _Values, normal: torch.Tensor, dtype: torch.dtype) -> memoryview:
    """What a tensor of such values repeats."""
    if isinstance(values, bytes):
        return memoryview(values * (_BLOCK // len(values) + 1))
    if isinstance(values, _Normal):
        block = (normal * values.std + values.mean).to(dtype).view(torch.uint8)
    else:
        block = normal.view(torch.uint8)[::4].clone()  # the low bits of a mantissa are uniform
        if values.has_nan:
            block[block & 0x7F == 0x7F] = 0
    return block.numpy().data.toreadonly()


def _packed_values(expected: Expected) -> _Values:
    """Of a tensor of a quantised matrix: random codes, whose scales, all the same, give the
    elements a standard deviation of about 1 / sqrt(inputs)."""
    assert expected.scheme is not None and expected.stored is not None
    form, kind = expected.scheme.format, expected.stored.dtypes[0]
    match expected.stored.role:
        case "codes":
            return _AnyCode(form.code == "e4m3")
        case "zeros":
            zero = (8 if form.code == "int4" else 128) - form.zero_add
            return bytes([17 * zero if form.code == "int4" else zero])
        case "groups":
            return (torch.arange(expected.width) // form.columns).int().numpy().tobytes()
        case _:
            scale = 1 / (_CODE_STD[form.code] * sqrt(expected.width))
            if kind == "U8":
                return bytes([127 + round(log2(scale))])
            number = torch.tensor(scale).to(_BY_NAME[kind])
            return number.view(1).view(torch.uint8).numpy().tobytes()


def _mean_and_std(spec: ModelSpec, name: str, shape: tuple[int, ...]) -> _Normal:
    """Activations keep a scale of about 1 through every matrix: std is 1 / sqrt(inputs)."""
    if "norm" in name and len(shape) == 1:
        # the norm inside the gated delta rule has plain weights in every family
        centred = isinstance(spec.norm, RmsNorm) and spec.norm.plus_one
        return _Normal(0.0 if centred and "linear_attn" not in name else 1.0, 0.05)
    if name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
        return _Normal(1.0, 0.05)
    if name.endswith("A_log"):
        return _Normal(-1.0, 1.0)
    if len(shape) == 1:
        return _Normal(0.0, 1.0 if name.endswith("sinks") else 0.02)
    if name.endswith(("embed_tokens.weight", "wte.weight")) and not spec.tied_head:
        return _Normal(0.0, 1.0)
    return _Normal(0.0, 1 / sqrt(shape[-1]))


def _place(
    shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str], shard_bytes: int
) -> tuple[_Shard, ...]:
    """Cuts the tensors into shards of about `shard_bytes` and lays each out as safetensors: wider
    types first, so that each tensor begins at a multiple of its type's size."""
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for name in sorted(shapes, key=natural_key):
        size = prod(shapes[name]) * ITEM_BYTES[types[name]]
        if filled and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(TensorInfo(name, "", types[name], shapes[name], 0, size))
        filled += size
    return tuple(
        _shard(
            shard_name(i, len(groups)),
            _end_to_end(sorted(group, key=lambda info: -ITEM_BYTES[info.dtype])),
        )
        for i, group in enumerate(groups)
    )


def _end_to_end(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    placed, at = [], 0
    for info in tensors:
        size = info.end - info.begin
        placed.append(replace(info, begin=at, end=at + size))
        at += size
    return placed


def _shard(file: str, tensors: list[TensorInfo]) -> _Shard:
    header = encode_header(tensors)
    start = len(header)
    moved = (
        replace(info, file=file, begin=start + info.begin, end=start + info.end) for info in tensors
    )
    return _Shard(file, header, tuple(moved))


def _index(weights: _Weights) -> dict[str, Any]:
    tensors = [info for shard in weights.shards for info in shard.tensors]
    return {
        "metadata": {"total_size": sum(info.end - info.begin for info in tensors)},
        "weight_map": {info.name: info.file for info in tensors},
    }


def _prepare(out: Path, num_bytes: int) -> None:
    """Makes the folder; raises UsageError where it is not empty or the disk too full."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out}: got a file or a folder with files, allowed an empty or new folder"
        )
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes + _SPARE_DISK > free:
        raise UsageError(
            f"{out}: the checkpoint has {format_bytes(num_bytes)}, the disk {format_bytes(free)} "
            f"free, allowed at most all but {format_bytes(_SPARE_DISK)}"
        )
    out.mkdir(parents=True, exist_ok=True)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(out: Path, spec: ModelSpec) -> None:
    """Ids 0 to 255 are bytes, then come special tokens; the rest of the vocabulary, which text
    never encodes to but a random model likes to say, reads as its number."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {token: len(vocab) + i for i, token in enumerate(_SPECIALS)}
    vocab |= {f"Ġ{i}": i for i in range(len(vocab), spec.vocab_size)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in _SPECIALS])
    backend.save(str(out / "tokenizer.json"))
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": _SPECIALS[2],
            "pad_token": _SPECIALS[0],
            "model_max_length": spec.max_positions,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHATML,
        },
    )

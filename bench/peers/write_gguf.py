"""The GGUF twin of a safetensors checkpoint: the same numbers under llama.cpp's names.

    python -m peers.write_gguf MODEL OUT FORMAT          FORMAT: bf16, q8_0 or q4_0

Every matrix is in the format, embedding and head too; norms and routers are fp32, as in files made
by llama.cpp's own converter. A tokenizer.json beside the weights (BPE of bytes) comes along;
without one prompts are token ids. Needs `gguf`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open

_TYPES = {"bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
_FILE_TYPES = {
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
_ARCHITECTURES = {"qwen3_moe": "qwen3moe", "olmoe": "olmoe"}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {
    "ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj",
}  # fmt: skip


class _Source:
    """Tensors of a checkpoint by name, from all of its files."""

    def __init__(self, folder: Path) -> None:
        self._files = [
            safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))
        ]
        self._where = {name: file for file in self._files for name in file.keys()}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)


def _names(config: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """GGUF's names with the checkpoint's tensors that each is made of."""
    for name, source in _OUTER.items():
        yield name, [source]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, source in _BLOCK.items():
            yield f"blk.{layer}.{name}.weight", [f"{prefix}{source}.weight"]
        for name, source in _EXPERTS.items():
            experts = range(config["num_experts"])
            yield (
                f"blk.{layer}.{name}.weight",
                [f"{prefix}mlp.experts.{expert}.{source}.weight" for expert in experts],
            )


def _is_kept(name: str) -> bool:
    return "norm" in name or "ffn_gate_inp" in name


def _stored(tensor: torch.Tensor, kind: Type) -> np.ndarray:
    """The bytes of a matrix in a format, one row of bytes per row."""
    if kind is Type.BF16:
        return tensor.bfloat16().contiguous().view(torch.uint8).numpy()
    values = tensor.float().contiguous().numpy()
    return values if kind is Type.F32 else gguf.quants.quantize(values, kind)


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any], file_type: int) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_file_type(file_type)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] == "qwen3_moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])


def _describe_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        writer.add_tokenizer_model("none")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    ids = dict(found["model"]["vocab"])
    special = {each["content"]: each["id"] for each in found["added_tokens"]}
    tokens = [f"[unused{number}]" for number in range(vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * vocab_size
    for token, number in (ids | special).items():
        tokens[number] = token
        kinds[number] = gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in found["model"]["merges"]])
    writer.add_eos_token_id(min(special.values()))
    writer.add_add_bos_token(False)


def write_twin(folder: Path, out: Path, form: str) -> None:
    """Writes the file beside its final name and renames it, so that a file is always whole."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    source, kind = _Source(folder), _TYPES[form]
    part = out.with_suffix(".part")
    writer = gguf.GGUFWriter(part, _ARCHITECTURES[config["model_type"]])
    _describe(writer, config, _FILE_TYPES[form])
    _describe_tokenizer(writer, folder, config["vocab_size"])
    tensors = list(_names(config))
    for name, sources in tensors:
        stacked = (len(sources),) if len(sources) > 1 else ()
        shape = (*stacked, *source.shape(sources[0]))
        as_type = Type.F32 if _is_kept(name) else kind
        if as_type is Type.F32:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
            continue
        stored = gguf.quant_shape_to_byte_shape(shape, as_type)
        size = int(np.prod(stored))
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, sources in tensors:  # one at a time: a stack of experts is the most that is held
        as_type = Type.F32 if _is_kept(name) else kind
        parts = [_stored(source.read(one), as_type) for one in sources]
        writer.write_tensor_data(np.stack(parts) if len(parts) > 1 else parts[0])
    writer.close()
    part.rename(out)


if __name__ == "__main__":
    write_twin(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

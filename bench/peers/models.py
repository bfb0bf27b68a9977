"""The models that are compared: shapes, files in every engine's format, and what they weigh."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import launch
from windlass.checkpoint.synthetic import preset, write_random_checkpoint

_SEED = 0
_GROUP = 32  # weights per scale, as in q8_0 and q4_0
_QUANTIZE_LIMIT_S = 3600.0
_WORKING_BYTES = 1_500_000_000  # of an engine: libraries, activations, logits
_SMALL = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
    "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 2048,
}  # fmt: skip
_QUICK: dict[str, tuple[str, dict[str, Any]]] = {
    "small-qwen3-moe": ("qwen3-moe-1b", {
        **_SMALL, "num_key_value_heads": 2, "head_dim": 32, "moe_intermediate_size": 64,
    }),
    "small-olmoe": ("olmoe-1b-7b", {
        **_SMALL, "num_key_value_heads": 4, "intermediate_size": 64,
    }),
}  # fmt: skip

# Shapes of synth.PRESETS with so many layers
_CUT: dict[str, tuple[str, int]] = {"qwen3-30b-a3b-12-layers": ("qwen3-30b-a3b", 12)}

FULL_MODELS = ("qwen3-moe-1b", "olmoe-1b-7b")  # by default
CUT_MODELS = tuple(_CUT)  # where asked for by name
QUICK_MODELS = tuple(_QUICK)
ROUNDED = " rounded"  # the same weights, products of rows rounded to bf16 (--dtype bfloat16)
# What Windlass and llama.cpp call a format of the same size
TWINS = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}


@dataclass(frozen=True, slots=True)
class Model:
    """One shape and the folder of its files."""

    name: str
    config: dict[str, Any]
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "bf16"

    def file(self, engine: str, form: str) -> Path:
        """Where an engine finds the weights: a GGUF file or a folder."""
        form = form.removesuffix(ROUNDED)
        if engine == "llama.cpp":
            return self.folder / f"{form}.gguf"
        return self.checkpoint if engine == "transformers" else self.folder / form

    @property
    def checkpoint_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.checkpoint.glob("*.safetensors"))

    def weight_bytes(self, engine: str, form: str) -> int:
        if engine == "transformers" and form == "float32":
            return 2 * self.checkpoint_bytes
        path = self.file(engine, form)
        if path.is_file():
            return path.stat().st_size
        return sum(part.stat().st_size for part in path.glob("*.safetensors"))

    @property
    def kv_bytes_per_token(self) -> int:
        """With two bytes per number, which all engines use but transformers in fp32."""
        config = self.config
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        layers = config["num_hidden_layers"]
        return 2 * 2 * int(layers * config["num_key_value_heads"] * head_dim)

    def shape(self) -> dict[str, Any]:
        return {"config": self.config, "checkpoint_bytes": self.checkpoint_bytes,
                "kv_bytes_per_token": self.kv_bytes_per_token}  # fmt: skip


def load(name: str, folder: Path) -> Model:
    """A model by name; nothing is written yet."""
    if name in _QUICK:
        base, changes = _QUICK[name]
        return Model(name, preset(base) | changes, folder / name)
    if name in _CUT:
        base, layers = _CUT[name]
        return Model(name, preset(base, num_layers=layers), folder / name)
    return Model(name, preset(name), folder / name)


def prepare(model: Model, engine: str, form: str) -> str | None:
    """Writes the weights of an engine in a format, unless they are there; why not, if impossible.
    The random checkpoint is what the others are made from."""
    prepare_checkpoint(model)
    path = model.file(engine, form)
    if path.exists():
        return None
    print(f"{model.name}: writing {path.name}", flush=True)
    if engine == "llama.cpp":
        command = [str(launch.PYTHON), "-m", "peers.write_gguf"]
        command += [str(model.checkpoint), str(path), form]
    else:
        command = [sys.executable, "-m", "windlass.cli", "quantize", "--model"]
        command += [str(model.checkpoint), "--out", str(path), "--format", path.name]
        command += ["--group", str(_GROUP)]
    done = subprocess.run(
        command, env=launch.environ(1), capture_output=True, text=True, check=False,
        timeout=_QUANTIZE_LIMIT_S,
    )  # fmt: skip
    if done.returncode == 0:
        return None
    if path.is_dir():
        shutil.rmtree(path)
    said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
    return f"{path.name} cannot be written: {said[-1]}"


def prepare_checkpoint(model: Model) -> None:
    """Writes the random checkpoint, unless it is there."""
    written = model.checkpoint / "config.json"
    if not written.exists():
        print(f"{model.name}: writing the random checkpoint", flush=True)
        write_random_checkpoint(model.config, model.checkpoint, seed=_SEED)
        return
    found = json.loads(written.read_text(encoding="utf-8"))
    if any(found.get(key) != value for key, value in model.config.items()):
        sys.exit(f"{model.checkpoint}: holds another model; give another --dir")


def at_once(model: Model, engine: str, form: str, *, tokens: int, sequences: int) -> int:
    """Sequences that fit beside the weights, `sequences` or a half, a quarter ... of it; 0 where
    not even one does. For engines that do not find out by themselves."""
    per_sequence = model.kv_bytes_per_token * tokens
    if engine == "llama.cpp":  # rounded up for each sequence
        per_sequence = model.kv_bytes_per_token * (-(-tokens // 256) * 256)
    if engine == "transformers":  # a part is held twice while chunks are merged
        per_sequence = per_sequence * (2 if form == "float32" else 1) * 9 // 8
    room = launch.memory_budget() - model.weight_bytes(engine, form) - _WORKING_BYTES
    count = sequences
    while count and count * per_sequence > room:
        count //= 2
    return count

"""Tiny random checkpoints with a layer for multi-token prediction, and what that layer should say:
transformers has none, but its block is one of the model's own."""

import copy
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file

from engines import write_tokenizer
from families import make_checkpoint, rewrite_config

LAYERS = 3  # of the model; the layer behind them predicts


class Nextn(NamedTuple):
    """Of a checkpoint: transformers' model with that layer's block as its last one, and the tensors
    around it."""

    model: "transformers.PreTrainedModel"
    around: dict[str, torch.Tensor]

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """(T, D) of the model, after its last norm."""
        trunk = copy.deepcopy(self.model.model)
        trunk.layers, trunk.config.num_hidden_layers = trunk.layers[:LAYERS], LAYERS
        found: torch.Tensor = trunk(ids[None], use_cache=False).last_hidden_state[0]
        return found

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(T - 1, V): what follows the second token, the third, ..., guessed from the model's state
        one token before."""
        own = copy.deepcopy(self.model)
        own.model.layers, own.model.config.num_hidden_layers = own.model.layers[LAYERS:], 1
        own.model.norm.weight.data = self.around["shared_head.norm"]
        eps = own.model.norm.variance_epsilon

        def normed(rows: torch.Tensor, name: str) -> torch.Tensor:
            return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps) * self.around[name]

        parts = (
            normed(own.model.embed_tokens(ids[1:]), "enorm"),
            normed(self.states(ids)[:-1], "hnorm"),
        )
        joined = torch.cat(parts, -1) @ self.around["eh_proj"].T
        found: torch.Tensor = own(inputs_embeds=joined[None], use_cache=False).logits[0]
        return found


def make_nextn(
    family: str, path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Nextn:
    """Saves a random checkpoint in `path`, with a tokenizer beside it."""
    model = make_checkpoint(family, path, seed=seed, dtype=dtype, num_hidden_layers=LAYERS + 1)
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed + 1)
    around = {
        name: 1 + 0.3 * torch.randn(width, generator=generator)
        for name in ("enorm", "hnorm", "shared_head.norm")
    }
    around["eh_proj"] = torch.randn(width, 2 * width, generator=generator) * (2 * width) ** -0.5
    around = {name: tensor.to(dtype) for name, tensor in around.items()}
    file = path / "model.safetensors"
    tensors = load_file(file)
    here = f"model.layers.{LAYERS}."
    tensors |= {f"{here}{name}.weight": tensor for name, tensor in around.items()}
    tensors |= {
        f"{here}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{here}shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    save_file(tensors, file)
    rewrite_config(path, num_hidden_layers=LAYERS, num_nextn_predict_layers=1)
    write_tokenizer(path)
    return Nextn(model, around)

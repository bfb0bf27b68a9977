"""Each setting of a spec, changed, changes the logits or does not fit the checkpoint."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from dense_model import TOLERANCE, Checkpoint, dense_logits, prompts
from families import CASES, make_checkpoint
from windlass.checkpoint.layout import build_layout
from windlass.decoder.block import embed
from windlass.errors import CheckpointError
from windlass.ids import Part
from windlass.kernels.interface import AttentionOptions, AttentionWork
from windlass.kernels.reference import TorchKernels, gelu
from windlass.models.spec import (
    Activation,
    ClampedSwiGlu,
    GeGlu,
    Moe,
    NoGroups,
    ReluSquared,
    RoutingGroups,
    SparseMixer,
)
from windlass.tensors import Packed, PackedStack, PagedRows, Tensors

Stored = torch.Tensor | Packed | PackedStack

# Settings that no logits can show, or that only hold bounds. Tables are fp32 here, which holds
# every multiplier as it is: see `test_a_multiplier_in_the_type_of_the_table`.
_SILENT = {"family", "max_positions", "vocab_size", "num_experts", "embed_multiplier_as_stored"}

_CHANGES: dict[str, Callable[[Any], Any]] = {
    "eps": lambda v: v + 0.1,
    "latent_norm_eps": lambda v: v + 0.1,
    "renorm_floor": lambda v: 3.0 if v is not None else 0.0,
    "renorm_eps": lambda v: v + 0.5 if v is not None else 0.0,
    "renorm_order": lambda v: 3 - v,
    "window": lambda v: None if v else 3,
    "clip_qkv": lambda v: None if v else 0.3,
    "rope": lambda v: None,
    "score": lambda v: "max" if v == "top2_sum" else "top2_sum",
    "groups": lambda v: NoGroups() if isinstance(v, RoutingGroups) else None,
    "shared": lambda v: None,
    "kept": lambda v: v + 1,
    "beta_fast": lambda v: v * 2,
    "beta_slow": lambda v: v * 2,
    "original_max": lambda v: v // 2,
    "top_k": lambda v: v - 1,
    "num_heads": lambda v: v // 2,
}


class PlainKernels(TorchKernels):
    """torch as it is: faster for tiny models than kernels that keep rows independent."""

    def linear(
        self,
        x_TD: torch.Tensor,
        w: Stored,
        bias_E: Stored | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert isinstance(w, torch.Tensor) and not isinstance(bias_E, Packed | PackedStack)
        result = functional.linear(x_TD, w.reshape(-1, x_TD.shape[1]), bias_E)
        return result if out is None else out.copy_(result)

    def batched_linear(
        self, x_THa: torch.Tensor, w_Hba: torch.Tensor | PackedStack
    ) -> torch.Tensor:
        assert isinstance(w_Hba, torch.Tensor)
        return torch.einsum("tha,hba->thb", x_THa, w_Hba)

    def expert_ffn(self, x_ND: torch.Tensor, w: Tensors, activation: Activation) -> torch.Tensor:
        up = self.linear(x_ND, w["up"], w.get("up_bias"))
        if isinstance(activation, ReluSquared):
            return self.linear(functional.relu(up) ** 2, w["down"], w.get("down_bias"))
        gate = self.linear(x_ND, w["gate"], w.get("gate_bias"))
        if isinstance(activation, ClampedSwiGlu):
            gate, limit = gate.clamp(max=activation.limit), activation.limit
            hidden = (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(activation.alpha * gate)
        else:
            hidden = (gelu if isinstance(activation, GeGlu) else functional.silu)(gate) * up
        return self.linear(hidden, w["down"], w.get("down_bias"))

    def pointwise(
        self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        return function(x)

    def attention(
        self,
        q_THd: torch.Tensor,
        keys: PagedRows,
        values: PagedRows,
        work: AttentionWork,
        options: AttentionOptions,
    ) -> torch.Tensor:
        raise AssertionError("these models run without a cache")


KERNELS = PlainKernels()


def changed(node: Any) -> Iterator[tuple[str, Any]]:
    """Every record like `node` with one setting changed, and which."""
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), field.name
        if dataclasses.is_dataclass(value):
            for path, new in changed(value):
                yield f"{name}.{path}", dataclasses.replace(node, **{name: new})
        new = None if _means_nothing(node, name) else _change(name, value)
        if new is not None or (name in ("window", "clip_qkv", "shared") and value is not None):
            yield name, dataclasses.replace(node, **{name: new})


def _means_nothing(node: Any, name: str) -> bool:
    """Settings without effect beside others: the order of a norm that is not taken, the number of
    choices of a router that always makes two."""
    if name == "renorm_order":
        return node.renorm_floor is None
    return name == "top_k" and isinstance(node.routing, SparseMixer)


def _change(name: str, value: Any) -> Any:
    if name in _SILENT or name in ("attention", "ffn", "rope", "routing", "expert", "qk_norm"):
        return None
    if name in _CHANGES:
        return _CHANGES[name](value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value * 1.3
    if isinstance(value, int):
        return value * 2
    if isinstance(value, tuple) and value and isinstance(value[0], float):
        return tuple(x * 1.3 for x in value)
    return None


def mutants(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    spec = checkpoint.spec
    for path, new in changed(dataclasses.replace(spec, blocks=())):
        yield path, dataclasses.replace(new, blocks=spec.blocks)
    for block in dict.fromkeys(spec.blocks):
        for path, new in changed(block):
            blocks = tuple(new if one == block else one for one in spec.blocks)
            kind = "experts" if isinstance(block.ffn, Moe) else "dense"
            yield f"{kind}: {path}", dataclasses.replace(spec, blocks=blocks)


def _logits(checkpoint: Checkpoint) -> Iterator[torch.Tensor]:
    """Of two prompts, one after the other: most changes show in the first."""
    return (dense_logits(checkpoint, prompts()[i], KERNELS) for i in (0, 2))


@pytest.mark.parametrize("family", [*CASES, "exaone_moe", "mellum"])
@torch.inference_mode()
def test_every_setting_matters(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    expected = list(_logits(checkpoint))
    tried, survivors = 0, []
    for path, spec in mutants(checkpoint):
        tried += 1
        checkpoint.spec = spec
        try:
            checkpoint.layout = build_layout(spec, checkpoint.names, checkpoint.infos)
            is_other = any(
                (got - own).abs().max() > TOLERANCE
                for got, own in zip(_logits(checkpoint), expected, strict=True)
            )
        except (CheckpointError, AssertionError, RuntimeError):
            continue  # does not fit the checkpoint
        if not is_other:
            survivors.append(path)
    assert tried > 20
    assert not survivors


def test_a_multiplier_in_the_type_of_the_table(tmp_path: Path) -> None:
    """As transformers has it: sqrt(32) is 5.65625 in bf16."""
    embedding = make_checkpoint("gemma4_text", tmp_path, dtype=torch.bfloat16).model.embed_tokens
    checkpoint, ids = Checkpoint(tmp_path), torch.arange(9)
    rows = checkpoint.part(Part.EMBED)["weight"][ids]
    got = embed(checkpoint.spec, rows)
    assert torch.equal(got, rows.float() * 5.65625)
    assert torch.equal(got.bfloat16(), embedding(ids))

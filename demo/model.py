"""The demo model: Qwen3-MoE in compact torch, fast to train on a CPU, exported by its hub names.

Shape suffixes: B batch, T tokens, N = B*T rows, M = N*top_k routed rows, D hidden, H query heads,
G key/value heads, K head size, E experts, F expert width, V vocabulary.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; names as in config.json."""

    vocab_size: int = 4096
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 24
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 48
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 1024


class GroupedMatmul(torch.autograd.Function):
    """Rows sorted by expert, one matrix product per expert."""

    @staticmethod
    def forward(ctx, x_MD: Tensor, w_EFD: Tensor, counts: list[int]) -> Tensor:
        y_MF = x_MD.new_empty(x_MD.shape[0], w_EFD.shape[1])
        start = 0
        for expert, count in enumerate(counts):
            rows = slice(start, start + count)
            torch.mm(x_MD[rows], w_EFD[expert].T, out=y_MF[rows])
            start += count
        ctx.save_for_backward(x_MD, w_EFD)
        ctx.counts = counts
        return y_MF

    @staticmethod
    def backward(ctx, grad_MF: Tensor):
        x_MD, w_EFD = ctx.saved_tensors
        grad_MF = grad_MF.contiguous()
        grad_x_MD = torch.empty_like(x_MD)
        grad_w_EFD = torch.empty_like(w_EFD)
        start = 0
        for expert, count in enumerate(ctx.counts):
            rows = slice(start, start + count)
            torch.mm(grad_MF[rows], w_EFD[expert], out=grad_x_MD[rows])
            torch.mm(grad_MF[rows].T, x_MD[rows], out=grad_w_EFD[expert])
            start += count
        return grad_x_MD, grad_w_EFD, None


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the tied head, by chunks of rows, gradients made in the forward."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, w_VD: Tensor, target_N: Tensor) -> Tensor:
        rows = x_ND.shape[0]
        grad_x_ND, grad_w_VD = torch.empty_like(x_ND), torch.zeros_like(w_VD)
        loss = x_ND.new_zeros(())
        for start in range(0, rows, 512):
            part = slice(start, min(start + 512, rows))
            target_N1 = target_N[part].unsqueeze(1)
            logits_NV = x_ND[part] @ w_VD.T
            logits_NV -= logits_NV.amax(dim=1, keepdim=True)
            picked_N1 = logits_NV.gather(1, target_N1)
            total_N1 = logits_NV.exp_().sum(dim=1, keepdim=True)
            loss += (total_N1.log() - picked_N1).sum()
            grad_NV = logits_NV.div_(total_N1 * rows)
            grad_NV.scatter_add_(1, target_N1, torch.full_like(picked_N1, -1 / rows))
            torch.mm(grad_NV, w_VD, out=grad_x_ND[part])
            grad_w_VD.addmm_(grad_NV.T, x_ND[part])
        ctx.save_for_backward(grad_x_ND, grad_w_VD)
        return loss / rows

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x_ND, grad_w_VD = ctx.saved_tensors
        return grad_x_ND * grad, grad_w_VD * grad, None


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    left, right = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos_TK + torch.cat((-right, left), dim=-1) * sin_TK


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)
        self.q_norm = Norm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = Norm(shape.head_dim, shape.rms_norm_eps)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        batch, length, _ = x_BTD.shape
        heads = (batch, length, -1, self.shape.head_dim)
        q_BHTK = rotate(self.q_norm(self.q_proj(x_BTD).view(heads)).transpose(1, 2), cos_TK, sin_TK)
        k_BGTK = rotate(self.k_norm(self.k_proj(x_BTD).view(heads)).transpose(1, 2), cos_TK, sin_TK)
        v_BGTK = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k_BHTK = k_BGTK.repeat_interleave(group, dim=1)
        v_BHTK = v_BGTK.repeat_interleave(group, dim=1)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.o_proj(y_BHTK.transpose(1, 2).reshape(batch, length, -1))


class Experts(nn.Module):
    """Router and experts. `balance` is the switch loss, `choice_NK` the last routing."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        size, width, count = shape.hidden_size, shape.moe_intermediate_size, shape.num_experts
        self.shape = shape
        self.gate = nn.Linear(size, count, bias=False)
        self.gate_up_EFD = nn.Parameter(torch.randn(count, 2 * width, size) * size**-0.5)
        self.down_EDF = nn.Parameter(torch.zeros(count, size, width))
        self.balance = torch.zeros(())
        self.choice_NK = torch.zeros((0, 0), dtype=torch.long)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        top_k, num_experts = self.shape.num_experts_per_tok, self.shape.num_experts
        scores_NE = self.gate(x_ND).softmax(dim=-1)
        weights_NK, choice_NK = scores_NE.topk(top_k, dim=-1)
        weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        order_M = choice_NK.flatten().argsort(stable=True)
        counts = torch.bincount(choice_NK.flatten(), minlength=num_experts)
        share_E = counts / counts.sum()
        self.balance = num_experts * (share_E * scores_NE.mean(dim=0)).sum()
        self.choice_NK = choice_NK

        x_MD = x_ND.index_select(0, order_M // top_k)
        h_MF = GroupedMatmul.apply(x_MD, self.gate_up_EFD, counts.tolist())
        gate_MF, up_MF = h_MF.chunk(2, dim=-1)
        scale_M1 = weights_NK.flatten().index_select(0, order_M).unsqueeze(1)
        h_MF = F.silu(gate_MF) * up_MF * scale_M1
        y_MD = GroupedMatmul.apply(h_MF, self.down_EDF, counts.tolist())
        back_M = torch.empty_like(order_M)
        back_M[order_M] = torch.arange(order_M.numel())
        y_ND = y_MD.index_select(0, back_M).view(-1, top_k, x_ND.shape[-1]).sum(dim=1)
        return y_ND.view_as(x_BTD)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Experts(shape)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TK, sin_TK)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class DemoModel(nn.Module):
    """Logits from token ids; the output head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for layer in self.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.normal_(layer.mlp.gate.weight, std=0.02)
        half = shape.head_dim // 2
        steps = shape.rope_theta ** -(torch.arange(half) / half)
        angles = torch.outer(torch.arange(shape.max_position_embeddings), steps).repeat(1, 2)
        self.register_buffer("cos_TK", angles.cos(), persistent=False)
        self.register_buffer("sin_TK", angles.sin(), persistent=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return F.linear(self.hidden(ids_BT), self.embed_tokens.weight)

    def loss(self, ids_BT: Tensor, target_BT: Tensor) -> Tensor:
        """Mean next-token loss in nats."""
        x_ND = self.hidden(ids_BT).flatten(0, 1)
        return HeadLoss.apply(x_ND, self.embed_tokens.weight, target_BT.flatten())

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """The last hidden state, normed."""
        length = ids_BT.shape[1]
        cos_TK, sin_TK = self.cos_TK[:length], self.sin_TK[:length]
        x_BTD = self.embed_tokens(ids_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos_TK, sin_TK)
        return self.norm(x_BTD)

    def balance(self) -> Tensor:
        """Mean load-balancing loss of the last forward; 1 is perfectly even."""
        return torch.stack([layer.mlp.balance for layer in self.layers]).mean()


def hub_tensors(model: DemoModel) -> dict[str, Tensor]:
    """Tensors by the names that Qwen3-MoE checkpoints have on the hub, in bfloat16."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("gate_up_EFD"):
            stem = name.removesuffix("gate_up_EFD")
            for expert, gate_up_FD in enumerate(value):
                gate_FD, up_FD = gate_up_FD.chunk(2)
                tensors[f"model.{stem}experts.{expert}.gate_proj.weight"] = gate_FD
                tensors[f"model.{stem}experts.{expert}.up_proj.weight"] = up_FD
        elif name.endswith("down_EDF"):
            stem = name.removesuffix("down_EDF")
            for expert, down_DF in enumerate(value):
                tensors[f"model.{stem}experts.{expert}.down_proj.weight"] = down_DF
        else:
            tensors[f"model.{name}"] = value
    return {name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}


def load_hub_tensors(model: DemoModel, tensors: dict[str, Tensor]) -> None:
    """The inverse of `hub_tensors`."""
    state = model.state_dict()
    for name, value in state.items():
        stem, _, leaf = f"model.{name}".rpartition(".")
        prefixes = [f"{stem}.experts.{expert}" for expert in range(model.shape.num_experts)]
        if leaf == "gate_up_EFD":
            parts = [
                torch.cat([tensors[f"{p}.gate_proj.weight"], tensors[f"{p}.up_proj.weight"]])
                for p in prefixes
            ]
            value.copy_(torch.stack(parts))
        elif leaf == "down_EDF":
            value.copy_(torch.stack([tensors[f"{p}.down_proj.weight"] for p in prefixes]))
        else:
            value.copy_(tensors[f"model.{name}"])


def export(model: DemoModel, folder: Path, *, eos_ids: list[int], pad_id: int) -> None:
    """Writes config.json, generation_config.json and model.safetensors."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **asdict(model.shape),
        "intermediate_size": 4 * model.shape.hidden_size,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": pad_id,
        "decoder_sparse_step": 1,
        "eos_token_id": eos_ids[0],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
        "pad_token_id": pad_id,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.01,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
    }
    generation = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "eos_token_id": eos_ids,
        "pad_token_id": pad_id,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    partial = folder / "model.safetensors.partial"
    save_file(hub_tensors(model), partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")

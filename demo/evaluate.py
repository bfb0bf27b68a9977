"""Measures the shipped demo model and writes `demo/evaluation.json` and two pictures.

Held-out bits per byte per domain against xz, expert use per domain, and equality with
transformers. Reads only the shipped files and `build/demo-data/heldout.jsonl`.
"""

import json
import lzma
import math
from collections import defaultdict
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from model import DemoModel, Shape, load_hub_tensors
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "demo-data"
SHIPPED = ROOT / "src" / "windlass" / "data" / "demo"
WINDOW = 1024
STRIDE = 512


def load_model() -> DemoModel:
    """The shipped bfloat16 weights, computed in fp32."""
    config = json.loads((SHIPPED / "config.json").read_text())
    model = DemoModel(Shape(**{name: config[name] for name in Shape.__dataclass_fields__}))
    load_hub_tensors(model, load_file(SHIPPED / "model.safetensors"))
    return model.eval()


def heldout() -> dict[str, list[str]]:
    """Held-out texts per domain."""
    texts: dict[str, list[str]] = defaultdict(list)
    for line in (BUILD / "heldout.jsonl").open():
        document = json.loads(line)
        texts[document["domain"]].append(document["text"])
    return dict(texts)


def xz_bytes(texts: list[str]) -> int:
    """Size under `xz -9 -e` of all held-out text of a domain as one file."""
    return len(lzma.compress("\n".join(texts).encode(), preset=9 | lzma.PRESET_EXTREME))


@torch.inference_mode()
def score(model: DemoModel, ids: list[int], counts_LE: Tensor) -> float:
    """Nats of ids[1:]; a token has 512 to 1023 tokens of context, fewer near the start.

    Adds the routing of the scored rows to `counts_LE`.
    """
    nats = 0.0
    done = 0
    while done < len(ids) - 1:
        begin = max(0, done - (WINDOW - STRIDE))
        window = torch.tensor(ids[begin : begin + WINDOW + 1])
        fresh = slice(done - begin, None)
        logits_TV = model(window[None, :-1])[0]
        nats += F.cross_entropy(logits_TV[fresh], window[1:][fresh], reduction="sum").item()
        for layer, counts_E in zip(model.layers, counts_LE, strict=True):
            chosen = layer.mlp.choice_NK[fresh].flatten()
            counts_E += torch.bincount(chosen, minlength=len(counts_E))
        done = begin + len(window) - 1
    return nats


def mutual_information(share_DE: Tensor) -> float:
    """Bits that the expert chosen tells about the domain, domains equally likely."""
    joint_DE = share_DE / len(share_DE)
    independent_DE = joint_DE.sum(1, keepdim=True) * joint_DE.sum(0, keepdim=True)
    mask = joint_DE > 0
    return (joint_DE[mask] * (joint_DE[mask] / independent_DE[mask]).log2()).sum().item()


@torch.inference_mode()
def transformers_difference(model: DemoModel, ids: list[int]) -> float:
    """Largest difference between our logits and those of transformers, fp32."""
    from transformers import Qwen3MoeForCausalLM

    reference = Qwen3MoeForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    window = torch.tensor([ids])
    return (reference(window).logits - model(window)).abs().max().item()


def plot_loss(rows: list[dict[str, float]]) -> None:
    """Training loss against tokens seen, with its moving average."""
    tokens = [row["tokens"] / 1e6 for row in rows]
    losses = [row["loss"] for row in rows]
    smooth = [
        sum(part) / len(part)
        for part in (losses[max(0, i - 9) : i + 1] for i in range(len(losses)))
    ]
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(tokens, losses, color="0.75", linewidth=0.8, label="ten seconds")
    axes.plot(tokens, smooth, color="C0", label="mean of ten points")
    axes.set(xlabel="million tokens seen", ylabel="training loss, nats per token")
    axes.legend()
    figure.savefig(SHIPPED / "loss.png", dpi=90)


def plot_experts(domains: list[str], share_DLE: Tensor) -> None:
    """Heat map: share of each expert in the rows of each domain."""
    num_layers = share_DLE.shape[1]
    figure, panels = plt.subplots(num_layers, 1, figsize=(7, 9), layout="constrained", sharex=True)
    top = share_DLE.max().item()
    for layer, axes in enumerate(panels):
        image = axes.imshow(share_DLE[:, layer], aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axes.set_yticks(range(len(domains)), domains, fontsize=7)
        axes.set_ylabel(f"layer {layer}")
    panels[-1].set_xlabel("expert")
    figure.colorbar(image, ax=panels, label="share of routed rows", shrink=0.5)
    figure.savefig(SHIPPED / "experts.png", dpi=80)


def main() -> None:
    torch.set_num_threads(2)
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    model = load_model()
    shape = model.shape
    texts = heldout()
    domains = list(texts)
    rows = {}
    counts_DLE = torch.zeros(len(domains), shape.num_hidden_layers, shape.num_experts)
    for index, domain in enumerate(domains):
        num_bytes = sum(len(text.encode()) for text in texts[domain])
        nats, tokens = 0.0, 0
        for text in texts[domain]:
            ids = tokenizer.encode(text).ids
            nats += score(model, [end, *ids], counts_DLE[index])
            tokens += len(ids)
        joined_bytes = num_bytes + len(texts[domain]) - 1
        rows[domain] = {
            "bytes": num_bytes,
            "bytes_per_token": num_bytes / tokens,
            "bits_per_byte": nats / math.log(2) / num_bytes,
            "xz_bits_per_byte": 8 * xz_bytes(texts[domain]) / joined_bytes,
        }
        print(domain, {name: round(value, 3) for name, value in rows[domain].items()}, flush=True)
    share_DLE = counts_DLE / counts_DLE.sum(dim=-1, keepdim=True)
    layers = [
        {
            "mutual_information_bits": mutual_information(share_DLE[:, layer]),
            "largest_share": share_DLE[:, layer].max().item(),
            "least_used_share": share_DLE[:, layer].mean(dim=0).min().item(),
            "top_expert": dict(zip(domains, share_DLE[:, layer].argmax(-1).tolist(), strict=True)),
        }
        for layer in range(shape.num_hidden_layers)
    ]
    sample = tokenizer.encode(texts[domains[0]][0]).ids[:512]
    log = [json.loads(line) for line in (ROOT / "demo" / "log.jsonl").open()]
    result = {
        "parameters": sum(param.numel() for param in model.parameters()),
        "trained_s": log[-1]["elapsed_s"],
        "trained_tokens": log[-1]["tokens"],
        "trained_steps": log[-1]["step"],
        "final_loss": sum(row["loss"] for row in log[-10:]) / 10,
        "transformers_max_difference": transformers_difference(model, sample),
        "domains": rows,
        "layers": layers,
    }
    (ROOT / "demo" / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    plot_loss(log)
    plot_experts(domains, share_DLE)


if __name__ == "__main__":
    main()

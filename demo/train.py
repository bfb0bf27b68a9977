"""Trains the demo model for a fixed time and exports it. Resumes from its last checkpoint.

`python demo/train.py --minutes 70`, after data.py and tokenizer.py. The schedule follows the time
trained, so the run ends annealed on any machine. Each process has one thread and its own rows:
with sizes this small that is faster than one process with several threads.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import Batches, Corpus
from model import DemoModel, Shape, export
from muon import Muon
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "demo-data"
SHIPPED = ROOT / "src" / "windlass" / "data" / "demo"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is fixed of a run besides its time."""

    muon_lr: float = 0.02
    adam_lr: float = 0.003
    weight_decay: float = 0.02
    balance_weight: float = 0.03
    warmup_steps: int = 100
    decay_from: float = 0.3
    chat_from: float = 0.8
    chat_share: float = 0.3
    save_every_s: float = 240.0
    batch_tokens: int = 4096
    trunk_factor: float = 1.0  # of the learning rate of what is not a router or an expert


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Warm-up, plateau, then linear to almost zero."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    left = min(1.0, (1.0 - progress) / (1.0 - recipe.decay_from))
    return warm * max(0.005, left)


def window_length(progress: float) -> int:
    """Short windows first: attention is a quarter of the cost at 512 tokens."""
    return 256 if progress < 0.5 else 512 if progress < 0.85 else 1024


def batch_tokens(recipe: Recipe, progress: float) -> int:
    """Small batches while the loss falls fast."""
    return 2048 if progress < 0.1 else recipe.batch_tokens


def optimizers(model: DemoModel, recipe: Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of layers, AdamW for routers, norms and the embedding."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, param in model.named_parameters():
        in_mlp = ".mlp." in name
        matrix = param.ndim > 1 and name.startswith("layers") and not name.endswith("gate.weight")
        groups.setdefault((matrix, in_mlp), []).append(param)

    def group_list(matrix: bool, lr: float) -> list[dict]:
        factors = ((True, 1.0), (False, recipe.trunk_factor))
        return [
            {"params": groups[matrix, in_mlp], "lr": lr * factor, "initial_lr": lr * factor}
            for in_mlp, factor in factors
        ]

    muon_groups = group_list(True, recipe.muon_lr)
    adam_groups = group_list(False, recipe.adam_lr)
    return (
        Muon(muon_groups, lr=recipe.muon_lr, momentum=0.95, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(adam_groups, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    )


class Trainer:
    """Model, optimisers and clock of one run. Its checkpoint and log lie in `folder`."""

    def __init__(self, recipe: Recipe, batches: Batches, model: DemoModel, folder: Path) -> None:
        self.recipe, self.batches, self.model = recipe, batches, model
        self.checkpoint, self.log_path = folder / "checkpoint.pt", folder / "log.jsonl"
        self.optimizers = optimizers(model, recipe)
        self.step, self.tokens, self.elapsed_s = 0, 0, 0.0
        self.started, self.resumed_s = time.monotonic(), 0.0
        self.loss = self.balance = 0.0

    def train_step(self, progress: float) -> None:
        """One update from the rows of this process and of the others."""
        world = dist.get_world_size()
        chat_share = self.recipe.chat_share if progress >= self.recipe.chat_from else 0.0
        own_tokens = batch_tokens(self.recipe, progress) // world
        inputs, targets = self.batches.next(
            own_tokens, window_length(progress), chat_share=chat_share
        )
        factor = learning_rate(self.recipe, self.step, progress)
        loss = self.model.loss(inputs, targets)
        balance = self.model.balance()
        (loss + self.recipe.balance_weight * balance).backward()
        self.average([loss.item(), balance.item(), time.monotonic() - self.started])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        self.step += 1
        self.tokens += inputs.numel() * world

    def average(self, own: list[float]) -> None:
        """Averages gradients and figures over the processes, which so agree on the clock too."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor(own)])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        *parts, figures = flat.split([*(grad.numel() for grad in grads), len(own)])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))
        self.loss, self.balance, since_start_s = figures.tolist()
        self.elapsed_s = self.resumed_s + since_start_s

    def save(self) -> None:
        if dist.get_rank() > 0:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def resume(self) -> None:
        state = torch.load(self.checkpoint)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens = state["step"], state["tokens"]
        self.elapsed_s = self.resumed_s = state["elapsed_s"]

    def run(self, budget_s: float) -> None:
        """Trains until the time is used up."""
        self.started = time.monotonic()
        saved_at = logged_at = self.elapsed_s
        losses: list[float] = []
        while self.elapsed_s < budget_s:
            self.train_step(self.elapsed_s / budget_s)
            losses.append(self.loss)
            if self.elapsed_s - logged_at > 10:
                logged_at = self.elapsed_s
                self.log(sum(losses) / len(losses))
                losses.clear()
            if self.elapsed_s - saved_at > self.recipe.save_every_s:
                saved_at = self.elapsed_s
                self.save()
        self.save()

    def log(self, loss: float) -> None:
        if dist.get_rank() == 0:
            row = {
                "step": self.step,
                "elapsed_s": round(self.elapsed_s, 1),
                "tokens": self.tokens,
                "loss": round(loss, 4),
                "balance": round(self.balance, 3),
            }
            with self.log_path.open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(row, flush=True)


def load_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))


def train(rank: int, world: int, minutes: float) -> None:
    """One of `world` training processes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method="tcp://127.0.0.1:29517", rank=rank, world_size=world
    )
    run(DemoModel(Shape()), Recipe(), BUILD, minutes)


def run(model: DemoModel, recipe: Recipe, folder: Path, minutes: float) -> None:
    """Trains, from the checkpoint in the folder if there is one."""
    corpus = Corpus(BUILD / "train.jsonl", load_tokenizer(), seed=time.time_ns() + dist.get_rank())
    trainer = Trainer(recipe, Batches(corpus), model, folder)
    if trainer.checkpoint.exists():
        trainer.resume()
    print(f"{corpus.num_tokens} tokens, from {trainer.elapsed_s:.0f} s", flush=True)
    trainer.run(minutes * 60)


def export_checkpoint(model: DemoModel, folder: Path, target: Path) -> None:
    """Writes the folder's last checkpoint in the layout of the hub."""
    tokenizer = load_tokenizer()
    end, turn_end = (tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>"))
    model.load_state_dict(torch.load(folder / "checkpoint.pt")["model"])
    export(model, target, eos_ids=[turn_end, end], pad_id=end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=70.0, help="training time")
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint")
    args = parser.parse_args()
    if not args.export_only:
        mp.spawn(train, args=(args.processes, args.minutes), nprocs=args.processes)
    export_checkpoint(DemoModel(Shape()), BUILD, SHIPPED)


if __name__ == "__main__":
    main()

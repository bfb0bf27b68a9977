"""Muon: momentum whose matrix updates are orthogonalised by a Newton-Schulz iteration.

Follows Keller Jordan's published recipe; stacked experts are one batch of matrices. Every process
holds all state; the iteration, which is the cost, is divided among them.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Pushes the singular values of each matrix in the last two dimensions towards 1."""
    x = update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices and stacks of matrices only."""

    def __init__(
        self, params: list[dict], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        rank, world = dist.get_rank(), dist.get_world_size()
        for group in self.param_groups:
            params = group["params"]
            updates = torch.zeros(sum(param.numel() for param in params))
            parts = updates.split([param.numel() for param in params])
            for index, (param, part) in enumerate(zip(params, parts, strict=True)):
                state = self.state[param]
                if not state:
                    state["velocity"] = torch.zeros_like(param)
                velocity = state["velocity"]
                velocity.lerp_(param.grad, 1 - group["momentum"])
                if index % world == rank:
                    update = orthogonalise(param.grad.lerp(velocity, group["momentum"]))
                    part.view_as(param).copy_(update)
            dist.all_reduce(updates)
            for param, part in zip(params, parts, strict=True):
                scale = max(1.0, param.shape[-2] / param.shape[-1]) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(part.view_as(param), alpha=-group["lr"] * scale)

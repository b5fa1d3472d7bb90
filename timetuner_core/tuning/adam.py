"""Adam that can go on from a saved state."""

from collections.abc import Callable

import torch
from torch import Tensor


def resumed_adam(
    tensors: list[Tensor], memories: list[Tensor], lr: float, done: int
) -> tuple[torch.optim.Adam, Callable[[], list[Tensor]]]:
    """Adam as it was after `done` iterations, from its two moments of each tensor, `(num_steps, 2)`; and a
    function that gives these moments as they are now."""
    optimizer = torch.optim.Adam(tensors, lr=lr)
    for tensor, memory in zip(tensors, memories, strict=True):
        exp_avg, exp_avg_sq = memory.to(tensor).clone().unbind(dim=1)
        optimizer.state[tensor] = {
            "step": torch.tensor(float(done)),
            "exp_avg": exp_avg.contiguous(),
            "exp_avg_sq": exp_avg_sq.contiguous(),
        }

    def moments() -> list[Tensor]:
        states = [optimizer.state[tensor] for tensor in tensors]
        return [torch.stack([s["exp_avg"], s["exp_avg_sq"]], dim=1).cpu() for s in states]

    return optimizer, moments

"""AdamW's parameter groups and the learning rate of every step."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import OptimConfig

_UNDECAYED = ("table", "prefix")  # positions, class and register tokens


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in two groups: matrices and kernels decay; norms, biases, tokens and positions do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        kept = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in _UNDECAYED
        (free if kept else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in model.parameters())
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of step `step` (from 0) of `steps`: linear warm-up, then cosine annealing."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    shape = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr + (1 - config.final_lr) * shape)
